"""The flags that every stage of reinforcement learning has. Imports nothing heavy, for --help."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from trainer.runtime.arguments import arg, check_not_negative, check_positive
from trainer.runtime.stage_args import TrainArgs

THINKING = {"model": None, "on": True, "off": False}  # --enable_thinking as `encode_prompt` has it
BACKENDS = ("torch", "vllm", "sglang")  # this process, and the programs of a server
# rewards of trainer/rl/rewards.py, by name; others are found by the pattern of their name
BUILT_IN = tuple("answer format think length overlong repetition tools valid_calls".split())
SOURCES = {
    "function": r"(.+\.py):(\w+)",
    "model": r"model(!?):(.+)",
    "judge": r"judge:(https?://[^#]+)#(.+)",
}
KNOWN = ", ".join(
    [*BUILT_IN, "FILE.py:FUNCTION", "model:FOLDER", "model!:FOLDER", "judge:URL#MODEL"]
)
SLACK = 1e-6  # beyond 0 and 1, of a weighted sum in floats


@dataclass
class PolicyArgs(TrainArgs):
    """The flags that every stage of reinforcement learning has."""

    data_path: list[str] = arg(
        [], "rows of prompts; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = arg(
        "full_sft", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file"
    )
    max_seq_len: int = arg(
        512, "longest prompt and completion together, in tokens; also the length of a batch row"
    )
    max_completion_length: int = arg(
        128,
        "longest completion, in tokens",
        aliases=("max_new_tokens", "response_length", "max_gen_len"),
    )
    num_prompts: int = arg(
        16, "prompts of a step, of all ranks together", aliases=("examples_per_step",)
    )
    num_generations: int = arg(
        8, "completions that are sampled for each of them", aliases=("num_samples",)
    )
    temperature: float = arg(1.0, "of sampling and of training: logits are divided by it")
    enable_thinking: str = arg(
        "model",
        "reasoning before the answer: on, off, or as the model likes",
        choices=list(THINKING),
    )
    rewards: list[str] = arg(
        ["answer=1"],
        "reward of a completion: a weighted sum of NAME=WEIGHT; see trainer/rl/rewards.py",
    )
    overlong_buffer: int = arg(
        0, "reward `overlong`: how many tokens before the longest length the penalty begins"
    )
    num_minibatches: int = arg(
        1,
        "updates from a step's completions, each from its part of them",
        aliases=("num_mini_batches",),
    )
    update_epochs: int = arg(
        1, "how often a step's completions are learned from", aliases=("num_iterations",)
    )
    beta: float = arg(
        0.0,
        "weight of the KL divergence from the network that training starts from; 0: none is kept",
        aliases=("kl_coef", "kl_weight"),
    )
    kl_estimator: str = arg(
        "k3",
        "how that is estimated from the sampled tokens; k1 is none for a loss: its gradient is 0 "
        "on average",
        choices=["k2", "k3"],
        aliases=("kl_kind",),
    )
    lora_rank: int = arg(
        0,
        "train low-rank adapters of this rank instead of all weights; 0: all weights",
        aliases=("lora_r",),
    )
    rollout_batch_size: int = arg(64, "completions that are sampled in one batch")
    rollout_url: str = arg(
        "",
        "let a server sample, such as http://127.0.0.1:8000 (default: this process)",
        aliases=("vllm_server_base_url", "sglang_base_url"),
    )
    rollout_backend: str = arg(
        "",
        "what samples: torch is this process, vllm and sglang are the programs of the server "
        "(default: vllm with --rollout_url, else torch)",
        choices=list(BACKENDS),
        aliases=("rollout_engine",),
    )
    rollout_dir: str = arg(
        "",
        "folder that both sides see, for this run's weights alone",
        aliases=("sglang_shared_path",),
    )
    max_staleness: int = arg(
        0, "how many steps the server's weights may be behind; 0: they are handed over after each"
    )
    num_transcripts: int = arg(
        4, "completions that are written to transcripts.jsonl with each logged step"
    )
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    val_ratio: float = arg(0.05, "fraction of the prompts held out for validation; 0: none")
    val_max_rows: int = arg(200, "hold out at most this many prompts")
    val_interval: int = 20
    log_interval: int = 1

    ACCUMULATES: ClassVar[bool] = False
    # other weights at the beginning are another run; how completions are sampled is free
    FREE: ClassVar[tuple[str, ...]] = (
        *(name for name in TrainArgs.FREE if name != "from_weight"),
        *("rollout_batch_size", "num_transcripts", "rollout_url", "rollout_backend"),
        *("rollout_dir", "max_staleness"),
    )

    @property
    def thinking(self) -> bool | None:
        """True, False or None, as `encode_prompt` takes it."""
        return THINKING[self.enable_thinking]

    def rows_per_step(self, world_size: int) -> int:
        """Completions: how ranks and micro-batches divide them changes nothing."""
        return self.num_prompts * self.num_generations

    def check(self) -> None:
        """TrainArgs.check; the ranges of these flags, and flags without effect here."""
        super().check()
        check_positive(self, "max_completion_length", "num_prompts", "num_generations")
        check_positive(self, "temperature", "num_minibatches", "update_epochs")
        check_positive(self, "rollout_batch_size")
        check_not_negative(self, "beta", "lora_rank", "overlong_buffer", "num_transcripts")
        check_not_negative(self, "max_staleness")
        reward_weights(self)
        self.check_rollout()
        if self.max_completion_length >= self.max_seq_len:
            raise ValueError(
                f"--max_completion_length {self.max_completion_length} leaves no room for a prompt "
                f"in --max_seq_len {self.max_seq_len}: give a larger --max_seq_len, or shorter "
                "completions"
            )
        if self.from_weight == "none":
            raise ValueError(
                "--from_weight none: a network that has learned nothing finds no reward; name one "
                "that answers"
            )
        if "kl_estimator" in self.given and not self.beta:
            raise ValueError(
                "--kl_estimator has an effect with --beta only: leave it out, or give --beta"
            )
        self.check_unused()

    def check_rollout(self) -> None:
        """ValueError unless the flags of a rollout server are complete; resolves the backend."""
        self.rollout_backend = self.rollout_backend or ("vllm" if self.rollout_url else "torch")
        if self.rollout_url and self.rollout_backend == "torch":
            raise ValueError(
                "--rollout_backend torch samples in this process, --rollout_url "
                f"{self.rollout_url} on a server: leave one of them out"
            )
        if self.rollout_url and not self.rollout_dir:
            raise ValueError(
                "--rollout_url needs --rollout_dir, a folder through which the server gets the "
                "weights: give one that both sides see"
            )
        if self.rollout_url:
            return
        unused = [f"--{name}" for name in ("max_staleness", "rollout_dir") if name in self.given]
        if self.rollout_backend != "torch":
            unused.append(f"--rollout_backend {self.rollout_backend}")
        if unused:
            raise ValueError(
                f"{unused[-1]} without --rollout_url, so completions are sampled here: leave it "
                "out, or give the server's address, such as --rollout_url http://127.0.0.1:8998"
            )

    def check_unused(self) -> None:
        """ValueError for a flag of TrainArgs that cannot take effect in reinforcement learning."""
        if "accumulation_steps" in self.given:
            raise ValueError(
                "--accumulation_steps: a step's completions are cut into as many micro-batches of "
                "--batch_size rows as they need; leave it out, and choose the step's size with "
                "--num_prompts and --num_generations"
            )
        if self.dropout:
            raise ValueError(
                "--dropout would train another policy than the one that has sampled: leave it out"
            )
        if unused := sorted({"num_proc", "cache_dir"} & self.given):
            raise ValueError(
                f"--{unused[0]}: prompts are few, and turned into tokens at the start of each run: "
                "leave it out"
            )
        if self.deepspeed:
            raise ValueError(
                "--deepspeed is not for reinforcement learning here, where each rank also samples "
                "with the whole network: leave it out; torchrun averages the gradients of several "
                "GPUs"
            )


def reward_weights(args: PolicyArgs) -> dict[str, float]:
    """{name: weight} of --rewards. ValueError for a mistake in it or a flag without effect."""
    weights = {}
    for part in args.rewards:
        name, sign, number = part.rpartition("=")
        if not sign:
            raise ValueError(f"--rewards {part}: give NAME=WEIGHT, for example {part}=1")
        is_source = any(re.fullmatch(pattern, name) for pattern in SOURCES.values())
        if name not in BUILT_IN and not is_source:
            raise ValueError(f"--rewards {name}: there is no such reward. Take of: {KNOWN}")
        if name in weights:
            raise ValueError(f"--rewards {name} is given twice: give it once, with one weight")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(
                f"--rewards {part}: {number!r} is no finite number; give a weight like {name}=0.5"
            )
    longest = args.max_completion_length
    if "overlong" in weights and not 0 < args.overlong_buffer <= longest:
        raise ValueError(
            f"--rewards overlong with --overlong_buffer {args.overlong_buffer}: give the number of "
            f"tokens before the longest length over which the penalty grows, from 1 to {longest}"
        )
    if args.overlong_buffer and "overlong" not in weights:
        raise ValueError(
            "--overlong_buffer has an effect with the reward overlong only: add overlong=1 to "
            "--rewards, or leave it out"
        )
    return weights


def check_success_rewards(args: PolicyArgs) -> None:
    """ValueError for --rewards that go beyond 0 to 1, and for a step of one prompt (SPO)."""
    weights = reward_weights(args)
    outside = [
        name
        for name, weight in weights.items()
        if weight < 0 or name in ("length", "overlong", "repetition")
    ]
    if outside or sum(weights.values()) > 1 + SLACK:
        raise ValueError(
            f"--rewards {' '.join(args.rewards)}: SPO counts rewards as fractions of a success, "
            "from 0 to 1. Give parts that are not negative, with weights that sum to 1, or take "
            "train_grpo.py, which bears any"
        )
    if args.num_prompts < 2:
        raise ValueError(
            "--num_prompts 1: one completion cannot be compared with the others of its step; give "
            "2 or more"
        )
