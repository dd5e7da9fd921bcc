"""The flags that every training stage has, and what their values must be."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from model.presets import PRESETS
from trainer.runtime.arguments import (
    ROOT,
    arg,
    check_installed,
    check_not_negative,
    check_positive,
    check_ratio,
)


@dataclass
class TrainArgs:
    """The flags of every training stage; a stage's own dataclass adds and overrides."""

    data_path: list[str] = arg(
        [], "files of rows (.jsonl, .gz, .xz); FILE@0.4 takes that fraction of the rows"
    )
    save_dir: str = arg(
        str(ROOT / "out"), "folder that holds the folders of all runs", aliases=("out_dir",)
    )
    save_weight: str = arg("", "name of this run, saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    from_weight: str = arg(
        "none",
        "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file, or none",
        aliases=("model_name_or_path",),
    )
    tokenizer_path: str = arg(
        "",
        "folder of another tokenizer, such as train_tokenizer.py writes (default: that of "
        "--from_weight, or else MiniMind's own)",
        aliases=("tokenizer_name_or_path",),
    )
    from_resume: bool = arg(False, "resume an interrupted run from its last checkpoint")
    overwrite: bool = arg(False, "replace the run of that name, if there is one")
    preset: str = arg(
        "", "shape of the network (default: minimind-3 with a GPU, tiny without)", list(PRESETS)
    )
    hidden_size: int | None = arg(
        None, "width of the network, instead of the preset's", aliases=("dim",)
    )
    num_hidden_layers: int | None = arg(
        None, "layers, instead of the preset's", aliases=("n_layers",)
    )
    use_moe: bool = arg(False, "mixture of 4 experts, instead of the preset's feed-forward")
    max_seq_len: int = arg(
        512,
        "tokens of a batch row, into which sequences are packed",
        aliases=("max_length", "cutoff_len"),
    )
    epochs: int = arg(1, "passes over the data", aliases=("num_train_epochs", "num_epochs"))
    max_steps: int | None = arg(
        None, "stop after this many optimizer steps, whatever --epochs says"
    )
    batch_size: int = arg(
        8,
        "batch rows of a micro-batch",
        aliases=("per_device_train_batch_size", "device_batch_size"),
    )
    accumulation_steps: int = arg(
        1, "micro-batches of an optimizer step", aliases=("gradient_accumulation_steps",)
    )
    learning_rate: float = arg(5e-4, "peak learning rate", aliases=("lr",))
    schedule: str = arg(
        "cosine",
        "after the warm-up: cosine to the floor, or wsd: stable, then a linear decay",
        choices=["cosine", "wsd"],
    )
    warmup_ratio: float = arg(
        0.02, "fraction of the steps with a rising learning rate", aliases=("warmup_share",)
    )
    decay_ratio: float = arg(
        0.2,
        "wsd: fraction of the steps, at the end, that decay",
        aliases=("decay_share", "warmdown_ratio"),
    )
    min_lr_ratio: float = arg(
        0.1,
        "learning rate of the last step, as a fraction of the peak",
        aliases=("min_lr_share", "final_lr_frac"),
    )
    optimizer: str = arg(
        "adamw",
        "adamw for all parameters, or muon for the layers' matrices, which learns more per token",
        choices=["adamw", "muon"],
    )
    dropout: float = arg(0.0, "dropout on what a layer adds to the residual stream")
    weight_decay: float = arg(0.1, "decay of the matrices (norms have none)")
    beta2: float = arg(0.95, "AdamW: decay rate of the second moment", aliases=("adam_beta2",))
    grad_clip: float = arg(
        1.0, "largest norm of the gradient; 0: no clipping", aliases=("max_grad_norm",)
    )
    device: str = arg(
        "auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one", aliases=("device_type",)
    )
    dtype: str = arg(
        "auto",
        "arithmetic of the matrix products; auto: bfloat16 on a GPU that has it, else float32",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    use_compile: bool = arg(
        False,
        "torch.compile the network: slow first steps, faster ones after",
        aliases=("torch_compile",),
    )
    gradient_checkpointing: bool = arg(
        False,
        "compute each layer again in backward: a third slower, far less memory",
        aliases=("activation_checkpointing",),
    )
    deepspeed: str = arg(
        "", "DeepSpeed ZeRO by this file: trainer/ds_zero1.json, ds_zero2.json, ds_zero3.json"
    )
    deterministic: bool = arg(
        False,
        "on a GPU use kernels that always sum in the same order: slower, resumes bit for bit",
        aliases=("full_determinism",),
    )
    num_workers: int | None = arg(
        None,
        "processes that build batches during training (default: 2 with a GPU, else none)",
        aliases=("dataloader_num_workers",),
    )
    num_proc: int | None = arg(
        None,
        "processes that tokenize (default: all cores)",
        aliases=("dataset_num_proc", "preprocessing_num_workers"),
    )
    cache_dir: str = arg(str(ROOT / "dataset" / "cache"), "folder for the tokens, made once")
    bad_rows: str = arg(
        "stop", "a faulty row stops the run, or is counted and skipped", choices=["stop", "skip"]
    )
    val_path: list[str] = arg(
        [], "validate on each of these files, instead of a fraction of the data"
    )
    val_ratio: float = arg(
        0.01, "fraction of the documents held out for validation", aliases=("val_share",)
    )
    val_max_rows: int = arg(500, "hold out at most this many documents")
    val_interval: int = arg(
        200,
        "steps between validations; the last step always validates",
        aliases=("eval_steps", "eval_every"),
    )
    log_interval: int = arg(
        10, "steps between two lines in metrics.jsonl", aliases=("logging_steps",)
    )
    save_interval: int = arg(
        200,
        "steps between checkpoints; the last step is always saved",
        aliases=("save_steps", "save_every"),
    )
    keep: int = arg(
        2,
        "checkpoints to keep: the newest, and older ones in case it is damaged",
        aliases=("save_total_limit",),
    )
    max_bad_steps: int = arg(
        5, "non-finite updates in a row that send the run back to its last checkpoint, or stop it"
    )
    use_wandb: bool = arg(
        False, "report to Weights & Biases: the same as --tracker wandb", aliases=("track",)
    )
    tracker: str = arg(
        "none",
        "experiment tracker that gets the metrics too",
        choices=["none", "wandb", "swanlab", "tensorboard"],
        aliases=("report_to",),
    )
    wandb_project: str = arg(
        "MiniMind", "project of the tracker", aliases=("project", "wandb_project_name")
    )
    wandb_run_name: str = arg(
        "", "name of the run in the tracker (default: its folder's)", aliases=("run_name",)
    )
    seed: int = arg(42, "of the initial weights, the order of the data and every random choice")
    inspect: int = arg(0, "print this many sequences, the trained tokens in colour, and stop")
    json: str = arg("", "write the last metrics of the run to this file too")
    local_rank: int = arg(0, "given by the deepspeed launcher to its processes")

    # a step may be cut into micro-batches by --accumulation_steps, and DeepSpeed may be used
    ACCUMULATES: ClassVar[bool] = True
    # flags that may change on resume: they do not affect the numbers, or are checked separately
    FREE: ClassVar[tuple[str, ...]] = (
        *("save_dir", "cache_dir", "from_resume", "overwrite", "device", "dtype", "num_workers"),
        *("num_proc", "log_interval", "save_interval", "inspect", "json", "from_weight", "keep"),
        *("batch_size", "accumulation_steps", "use_compile", "gradient_checkpointing", "deepspeed"),
        *("deterministic", "max_bad_steps", "use_wandb", "tracker", "wandb_project"),
        *("wandb_run_name", "local_rank"),
    )

    def rows_per_step(self, world_size: int) -> int:
        """Batch rows of an optimizer step; a resumed run keeps it, whatever its number of ranks."""
        return self.batch_size * self.accumulation_steps * world_size

    def check(self) -> None:
        """ValueError for values out of range and for flags that contradict each other."""
        check_positive(self, "max_seq_len", "epochs", "batch_size", "accumulation_steps")
        check_positive(self, "val_interval", "log_interval", "save_interval", "learning_rate")
        check_positive(self, "max_steps", "hidden_size", "num_hidden_layers", "num_proc", "keep")
        check_positive(self, "max_bad_steps")
        check_not_negative(self, "grad_clip", "weight_decay", "seed", "inspect", "num_workers")
        check_ratio(self, "dropout", "warmup_ratio", "decay_ratio", "min_lr_ratio", "val_ratio")
        if self.max_seq_len < 2:
            raise ValueError(
                "--max_seq_len 1: a sequence needs a token to see and one to predict; give 2 or "
                "more"
            )
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError("--warmup_ratio and --decay_ratio add up to more than 1")
        if "decay_ratio" in self.given and self.schedule != "wsd":
            raise ValueError(
                "--decay_ratio has an effect with --schedule wsd only; leave it out or choose wsd"
            )
        if self.val_path and "val_ratio" in self.given:
            raise ValueError(
                "--val_path and --val_ratio are two ways to choose the held-out rows: leave one out"
            )
        if "val_max_rows" in self.given and (self.val_path or not self.val_ratio):
            raise ValueError(
                "--val_max_rows limits --val_ratio, which is not used here: leave it out"
            )
        if self.overwrite and self.from_resume:
            raise ValueError("--overwrite starts again and --from_resume resumes: choose one")
        if self.dropout == 1:
            raise ValueError("--dropout 1 leaves nothing: give less than 1")
        if self.use_moe and "moe" in self.preset:
            raise ValueError(
                f"--use_moe with --preset {self.preset}, which is one already: leave one of them "
                "out"
            )
        self.check_tracker()
        if self.deepspeed:
            self.check_deepspeed()

    def check_tracker(self) -> None:
        """ValueError for a tracker that is not installed, and for flags that it does not use."""
        if self.use_wandb and self.tracker not in ("none", "wandb"):
            raise ValueError(
                f"--use_wandb is --tracker wandb, but --tracker {self.tracker} is given: choose one"
            )
        tracker = "wandb" if self.use_wandb else self.tracker
        names = sorted({"wandb_project", "wandb_run_name"} & self.given)
        if names and tracker in ("none", "tensorboard"):
            flags = " and ".join(f"--{name}" for name in names)
            raise ValueError(
                f"{flags} with --tracker {tracker}: only wandb and swanlab use that; leave it out, "
                "or choose one of them"
            )
        if tracker != "none" and os.environ.get("RANK", "0") == "0":  # the others do not report
            check_installed(f"--tracker {tracker}", tracker)

    def check_deepspeed(self) -> None:
        """ValueError for a file that cannot be used, and for what DeepSpeed cannot do here."""
        if self.optimizer != "adamw":
            raise ValueError(
                f"--deepspeed shards AdamW's states, not those of --optimizer {self.optimizer}: "
                "leave one of them out"
            )
        if self.dtype == "float16":
            raise ValueError("--deepspeed works with --dtype bfloat16 or float32: choose one")
        stage = deepspeed_stage(self.deepspeed)  # a mistake in the file is found now, not later
        if self.use_compile and stage == 3:
            raise ValueError(
                f"--use_compile with ZeRO stage 3 ({self.deepspeed}), which takes the parameters "
                "away from compiled code: leave --use_compile out, or take stage 1 or 2"
            )
        check_installed("--deepspeed", "deepspeed", "deepspeed==0.19.8")


@dataclass
class ConversationArgs(TrainArgs):
    """The flags of the stages that learn an assistant's answers in conversations."""

    keep_thoughts: bool = arg(
        False, "learn the reasoning of earlier turns too, each from the conversation up to its turn"
    )
    last_turn_only: bool = arg(
        False, "learn only what follows the user's last message", aliases=("mask_history",)
    )

    def turn_options(self) -> dict[str, bool]:
        """The two flags as options of a dataset."""
        return {"keep_thoughts": self.keep_thoughts, "last_turn_only": self.last_turn_only}

    def check(self) -> None:
        """TrainArgs.check, and that the two flags do not contradict each other."""
        super().check()
        if self.keep_thoughts and self.last_turn_only:
            raise ValueError(
                "--keep_thoughts learns earlier turns, --last_turn_only does not: leave one out"
            )


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed configuration in a file, without the settings that our flags decide ("auto").

    ValueError for a file that cannot be used or that repeats a flag of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--deepspeed {path}: no such file; trainer/ds_zero2.json is one")
    try:
        config = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    ours = {
        "train_batch_size": "--batch_size",
        "train_micro_batch_size_per_gpu": "--batch_size",
        "optimizer": "--optimizer",
        "gradient_accumulation_steps": "--accumulation_steps",
        "gradient_clipping": "--grad_clip",
        "bf16": "--dtype",
        "fp16": "--dtype",
        "scheduler": "--schedule",
        "torch_autocast": "--dtype",
    }
    twice = [name for name in config if name in ours and config[name] != "auto"]
    if twice:
        flags = ", ".join(sorted({ours[name] for name in twice}))
        raise ValueError(f"{path}: leave {', '.join(twice)} out, {flags} says that")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"{path}: zero_optimization.stage is {zero.get('stage')}; give 1, 2 or 3, or leave "
            "--deepspeed out"
        )
    offloads = (zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param"))
    if "nvme" in offloads:
        raise ValueError(f"{path}: offloading to nvme is not supported here; offload to cpu")
    return {name: value for name, value in config.items() if name not in ours}


def deepspeed_stage(path: str) -> int:
    """The ZeRO stage, 1 to 3, of a DeepSpeed configuration file."""
    return read_deepspeed_config(path)["zero_optimization"]["stage"]
