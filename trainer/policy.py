"""What the stages of reinforcement learning share: their flags, the network in training, and how a rollout is collected."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.prompt_dataset import PromptDataset, PromptSteps
from dataset.token_cache import fingerprint
from dataset.toy_world import write_world
from model.model_lora import AdapterOnly, LoRASettings, add_adapter
from model.native_format import network_sha256
from trainer.arguments import TrainArgs, arg, check_not_negative, check_positive
from trainer.evaluation import validation_sets
from trainer.metrics import writing
from trainer.policy_losses import token_log_probs
from trainer.record import GO_ON
from trainer.remote_rollout import BACKENDS, RemoteRollout
from trainer.rewards import check_row, reward_weights
from trainer.rollout import Rollout, answer_samples, draw_seed, share_of
from trainer.weights import ROOT, find_weight, load_model

TOY = ROOT / "dataset" / "toy_mini"
THINKING = {"model": None, "on": True, "off": False}


@dataclass
class PolicyArgs(TrainArgs):
    """The flags that every stage of reinforcement learning has."""

    data_path: list[str] = arg([], "rows of prompts; FILE@0.4 takes that share of them (default: the toy world)", nargs="+")
    from_weight: str = arg("full_sft", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    max_seq_len: int = arg(512, "longest prompt and answer together, in tokens; also the length of packed rows")
    max_new_tokens: int = arg(128, "longest answer, in tokens")
    num_prompts: int = arg(16, "prompts of a step, of all ranks together")
    num_generations: int = arg(8, "answers that are sampled for each of them")
    temperature: float = arg(1.0, "of sampling and of training: logits are divided by it")
    enable_thinking: str = arg("model", "a thought before the answer: on, off, or as the model likes", choices=list(THINKING))
    rewards: list[str] = arg(["answer=1"], "what an answer is worth: a weighted sum of NAME=WEIGHT; see trainer/rewards.py",
                             nargs="+")
    overlong_buffer: int = arg(0, "reward `overlong`: how many tokens before the longest length the penalty begins")
    num_minibatches: int = arg(1, "updates from a step's answers: each has its share of them")
    update_epochs: int = arg(1, "how often a step's answers are learned from")
    kl_weight: float = arg(0.0, "weight of the KL divergence from the network that training starts from; 0: none is kept")
    kl_kind: str = arg("k3", "how that is estimated from the sampled tokens; k1 is none for a loss: its gradient is 0 on average",
                       choices=["k2", "k3"])
    lora_rank: int = arg(0, "train low-rank adapters of this rank instead of all weights; 0: all weights")
    rollout_batch_size: int = arg(64, "answers that are written side by side")
    rollout_url: str = arg("", "let a server write the answers, such as http://127.0.0.1:8000 (default: this process)")
    rollout_backend: str = arg("vllm", "what runs there", choices=list(BACKENDS))
    rollout_dir: str = arg("", "folder that both sides see, for this run's weights alone")
    max_staleness: int = arg(0, "how many steps the server's weights may be behind; 0: they are handed over after each")
    num_transcripts: int = arg(4, "answers that are written to transcripts.jsonl with each logged step")
    learning_rate: float = arg(1e-4, "peak learning rate")
    weight_decay: float = arg(0.0, "decay of the matrices (norms have none)")
    val_share: float = arg(0.05, "share of the prompts held out for validation; 0: none")
    val_max_rows: int = arg(200, "hold out at most so many prompts")
    val_interval: int = arg(20, "steps between two validations; the last step always validates")
    log_interval: int = arg(1, "steps between two lines in metrics.jsonl")

    ACCUMULATES = False
    FREE = tuple(name for name in (*TrainArgs.FREE, "rollout_batch_size", "num_transcripts", "rollout_url", "rollout_backend",
                                         "rollout_dir", "max_staleness")
                 if name != "from_weight")

    def rows_per_step(self, world_size):
        """Answers: how they are cut into micro-batches, or shared among ranks, changes nothing."""
        return self.num_prompts * self.num_generations

    def check(self):
        """TrainArgs.check; the ranges of these flags, and those that have no effect in reinforcement learning."""
        super().check()
        check_positive(self, "max_new_tokens", "num_prompts", "num_generations", "temperature", "num_minibatches",
                       "update_epochs", "rollout_batch_size")
        check_not_negative(self, "kl_weight", "lora_rank", "overlong_buffer", "num_transcripts", "max_staleness")
        if self.rollout_url and not self.rollout_dir:
            raise ValueError("--rollout_url needs --rollout_dir, a folder through which the server gets the weights: give one "
                             "that both sides see")
        unused = sorted({"rollout_backend", "rollout_dir", "max_staleness"} & self.given)
        if unused and not self.rollout_url:
            raise ValueError(f"--{unused[0]} without --rollout_url, where answers are written here: leave it out, or give the "
                             "server's address")
        if self.max_new_tokens >= self.max_seq_len:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens} leaves no room for a prompt in --max_seq_len "
                             f"{self.max_seq_len}: give a larger --max_seq_len, or fewer new tokens")
        if "accumulation_steps" in self.given:
            raise ValueError("--accumulation_steps: a step's answers are cut into as many micro-batches of --batch_size rows as "
                             "they need; leave it out, and choose the step's size with --num_prompts and --num_generations")
        if self.dropout:
            raise ValueError("--dropout would train on another policy than the one that has answered: leave it out")
        if self.from_weight == "none":
            raise ValueError("--from_weight none: a network that has learned nothing finds no reward; name one that answers")
        if "kl_kind" in self.given and not self.kl_weight:
            raise ValueError("--kl_kind has an effect with --kl_weight only: leave it out, or give a weight")
        if unused := sorted({"num_proc", "cache_dir"} & self.given):
            raise ValueError(f"--{unused[0]}: prompts are few, and turned into tokens at the start of each run: leave it out")
        reward_weights(self)
        if self.inspect:
            raise ValueError("--inspect shows what a row trains on, and here that is first sampled: leave it out, and look into "
                             "transcripts.jsonl in the run's folder")
        if self.deepspeed:
            raise ValueError("--deepspeed is not for reinforcement learning here, where each rank also writes answers with the "
                             "whole network: leave it out; torchrun averages the gradients of several GPUs")

    @property
    def thinking(self):
        """True, False or None, as `encode_prompt` takes it."""
        return THINKING[self.enable_thinking]


def load_policy(args, run):
    """(network to train, what a checkpoint saves of it, tokenizer, frozen copy as reference or None).

    With --lora_rank the network's weights are frozen, and the checkpoint is the adapter.
    """
    base = find_weight(args.from_weight, args, run.device).resolve()
    model, tokenizer = load_model(args, run.device)
    reference = copy.deepcopy(model).eval().requires_grad_(False) if args.kl_weight else None
    if not args.lora_rank:
        return model, model, tokenizer, reference
    settings = LoRASettings(args.lora_rank, 2.0 * args.lora_rank)
    add_adapter(model, settings)
    base = base.relative_to(ROOT) if base.is_relative_to(ROOT) else base
    return model, AdapterOnly(model, settings, base), tokenizer, reference


def prompt_sets(args, run, model, tokenizer, stage="rl"):
    """(training prompts, {name: held-out ones}, fingerprint of these and of the weights that training begins with).

    Of --data_path, or of the toy world's `stage`.
    """
    if not args.data_path:
        run.ranks.from_first(lambda: write_world("mini", TOY))
        args.data_path = [str(TOY / f"{stage}_train.jsonl")]
        if not args.val_path and not {"val_share", "val_max_rows"} & args.given:
            args.val_path = [str(TOY / f"{stage}_heldout.jsonl")]

    names = reward_weights(args)

    def build(paths):
        return PromptDataset(paths, tokenizer, args.max_seq_len - args.max_new_tokens, bad_rows=args.bad_rows,
                             enable_thinking=args.thinking, check=lambda row: check_row(row, names))

    dataset = build(args.data_path)
    run.say(dataset.report)
    training, held_out = validation_sets(args, dataset, build)
    start = run.ranks.from_first(lambda: network_sha256(model))
    return training, held_out, fingerprint(data=training.fingerprint, start=start)


def prompt_steps(dataset, args):
    """The steps of a run."""
    return PromptSteps(len(dataset), args.num_prompts, args.seed, args.epochs, args.max_steps)


def open_rollout(saved, model, tokenizer, run, args):
    """What writes the answers: this process, or the server of --rollout_url."""
    return RemoteRollout(saved, model, tokenizer, run, args) if args.rollout_url else Rollout(model, tokenizer, run, args)


def sample_groups(rollout, dataset, items, rewards, run, args, step, attempt=0):
    """The Samples of all ranks, with their rewards: --num_generations for each of `items`, one group after another.

    Each rank answers its share of the prompts. A seed depends on (run, step, attempt, prompt's place, number in the group).
    """
    mine = share_of(list(enumerate(items)), run.ranks)
    asked = [(item, draw_seed(args.seed, step, attempt, place, n)) for place, item in mine for n in range(args.num_generations)]
    samples = answer_samples(rollout, dataset, [item for item, _ in asked], [seed for _, seed in asked], args.max_new_tokens,
                             args.thinking)
    return run.ranks.gather(rate(samples, rewards))


def rate(samples, rewards):
    """The samples, with `rewards` {each part, "total"} noted in them."""
    totals, parts = rewards(samples)
    for i, sample in enumerate(samples):
        sample.rewards = {**{name: values[i] for name, values in parts.items()}, "total": totals[i]}
    return samples


def policy_outputs(net, batch, num_tokens, temperature):
    """(log-probabilities [n], entropies [n], the balance loss's part of the step's loss) at a micro-batch's sampled tokens.

    num_tokens: of the whole update. The last is 0 unless the network is a mixture of experts.
    """
    out = net(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"], num_items_in_batch=num_tokens,
              skip_nll=True, logits_to_keep=batch["is_source"])
    return *token_log_probs(out.logits, batch["targets"], temperature), out.loss


def reference_log_probs(reference, batch, temperature):
    """log p of a micro-batch's sampled tokens under a frozen network, [n]."""
    with torch.no_grad():
        return policy_outputs(reference, batch, 1, temperature)[0]


def token_sums(num_tokens, loss, *figures):
    """[a micro-batch's part of the update's loss, its parts of the means of `figures` over the update's tokens], float64."""
    return torch.stack([loss.double(), *((x.double() / num_tokens).sum() for x in figures)]).detach()


def reward_table(samples, num_generations):
    """The totals of the samples, float64 [groups, G]."""
    totals = torch.tensor([sample.rewards["total"] for sample in samples], dtype=torch.float64)
    return totals.view(-1, num_generations)


def sample_figures(samples, rollout):
    """{name: mean over the samples}: rewards by part, their spread, lengths, the share that ended by itself, and of the step's
    time that of sampling."""
    lengths = [sample.num_sampled for sample in samples]
    totals = [sample.rewards["total"] for sample in samples]
    figures = {f"reward/{name}": float(np.mean([sample.rewards[name] for sample in samples])) for name in samples[0].rewards}
    return figures | {"reward/std": float(np.std(totals)), "length/mean": float(np.mean(lengths)), "length/max": max(lengths),
                      "complete_share": float(np.mean([sample.is_complete for sample in samples])),
            "rollout_share": rollout.watch.share()}


class Transcripts:
    """transcripts.jsonl in a run's folder: what was answered, for the eye. Lines of steps after `done` are not this run's."""

    def __init__(self, folder, args, run, done):
        self.path, self.args, self.last = Path(folder) / "transcripts.jsonl", args, done
        self.is_on = run.ranks.is_first and args.num_transcripts > 0
        if run.ranks.is_first:
            self.keep_lines(done)

    def keep_lines(self, done):
        """Drop the lines of steps after `done`, and one that is half written."""
        if self.path.exists():
            with writing(self.path, GO_ON):
                lines = self.path.read_bytes().split(b"\n")[:-1]  # an answer may hold what else ends a line for Python
                self.path.write_bytes(b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= done))

    def write(self, step, samples):
        """Add some of a step's samples, from the worst to the best by their reward, every --log_interval steps."""
        if not self.is_on or not samples or step % self.args.log_interval:
            return
        if step <= self.last:  # the run has gone back
            self.keep_lines(step - 1)
        self.last = step
        ordered = sorted(samples, key=lambda sample: sample.rewards["total"])
        with writing(self.path, GO_ON), open(self.path, "a", encoding="utf-8") as file:
            for i in np.unique(np.linspace(0, len(ordered) - 1, self.args.num_transcripts).round().astype(int)):
                sample = ordered[i]
                row = {"step": step, "item": sample.item, "rewards": sample.rewards, "is_complete": sample.is_complete,
                       "messages": sample.messages, "text": sample.text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def held_out_scores(rollout, held_out, rewards, run, args, hold=None):
    """({"val_reward/part/name": mean over the likeliest answers to held-out prompts}, a sentence with an example).

    hold: (held-out view, numbers of its rows) -> Samples; default: of one reply each.
    """
    def one_reply(view, items):
        return answer_samples(rollout, view, items, [0] * len(items), args.max_new_tokens, args.thinking, temperature=0)

    scores, sentences, hold = {}, [], hold or one_reply
    rollout.refresh(now=True)
    for name, view in held_out.items():
        items = share_of(list(range(len(view))), run.ranks)
        samples = run.ranks.gather(rate(hold(view, items), rewards))
        means = {part: float(np.mean([sample.rewards[part] for sample in samples])) for part in samples[0].rewards}
        scores |= {f"val_reward/{part}/{name}": mean for part, mean in means.items()}
        sentences.append(f"{name}: " + ", ".join(f"{part} {mean:.3f}" for part, mean in means.items())
                         + f"; {view.rows[0]['conversations'][-1]['content'].strip()!r} -> {samples[0].text.strip()!r}")
    rollout.watch.share()  # what was written here is not the next step's
    return scores, "\n".join(sentences)
