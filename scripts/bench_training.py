"""Training speed: useful tokens per second of our step beside transformers' own model of the same shape, in one run.

    python scripts/bench_training.py                                             # tiny and minimind2-small, toy world's SFT rows
    python scripts/bench_training.py --preset tiny --stage pretrain --steps 30 --json out/bench_training.json
    python scripts/bench_training.py --preset minimind-3 --data_path my_chats.jsonl --batch_size 64 --steps 40

Ours is the step of trainer/train_pretrain.py and trainer/train_full_sft.py: packed rows, documents that do not see each
other, the head on target positions alone. Theirs is the standard architecture that our checkpoint folder names (Qwen3,
Llama, ...), read from such a folder, on the same sequences, padded to the longest of a batch of --reference_batch. Both
start from the same weights, update once per step with the same AdamW and clipping, and divide the loss by the same
number of targets, so the losses agree (the loss that balances experts is left out on both sides: ours counts it by document).
They take turns in blocks of a few steps: a machine that slows down slows both.

Only target tokens count as useful. `limit` is what leaving out the padding can give and nothing else: the positions
that theirs computes per real token. `of the matrix rate` is the arithmetic of a step, 6 per weight and position and
12 * layers * heads * head width per pair of positions that see each other, over the rate of one large product.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import IGNORE, PackedBatches
from dataset.toy_world import write_world
from model.model_minimind import PRESETS
from trainer.arguments import TrainArgs, arg, check_not_negative, check_positive, command, parse_args
from trainer.costs import matrix_rate, step_work, training_flops, wait_for
from trainer.metrics import write_json
from trainer.optim import build_optimizer
from trainer.run import Run
from trainer.steps import count_targets
from trainer.weights import load_model

TOY = ROOT / "dataset" / "toy_mini"
STAGES = {"pretrain": PretrainDataset, "sft": SFTDataset}
BLOCK = 2  # steps that one side does before it is the other's turn


@dataclass
class BenchArgs:
    preset: list[str] = arg(["tiny", "minimind2-small"], "shapes to measure", choices=list(PRESETS), nargs="+")
    stage: str = arg("sft", "whose rows and loss mask", choices=list(STAGES))
    data_path: list[str] = arg([], "files of rows (default: the toy world's for that stage)", nargs="+")
    rows: int = arg(0, "use only the first so many sequences; 0: all")
    steps: int = arg(10, "measured steps of each side, after the warm-up")
    warmup: int = arg(2, "steps of each side before that, not counted")
    batch_size: int = arg(8, "packed rows of our micro-batch, which is also the step")
    max_seq_len: int = arg(512, "tokens of a packed row")
    reference_batch: int = arg(8, "sequences of one of their batches, gradients added up over a step; 0: the whole step in one")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "arithmetic of the matrix products of both", choices=["auto", "float32", "bfloat16", "float16"])
    use_compile: bool = arg(False, "torch.compile both networks; give more --warmup")
    seed: int = arg(42, "decides the weights and what is packed with what")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "steps", "batch_size")
        check_not_negative(self, "rows", "warmup", "reference_batch")


class FirstRows(list):
    """The first sequences of a dataset, in memory, as PackedBatches reads them."""

    @property
    def lengths(self):
        return np.array([len(sequence["input_ids"]) for sequence in self])


class Ours:
    """Our step on packed rows; `settings` (TrainArgs) name the optimizer, AdamW by default."""

    def __init__(self, model, run, batches, settings=None):
        self.model, self.run, self.batches, self.net = model, run, batches, run.wrap(model)
        self.optimizer = build_optimizer(model, settings or TrainArgs())

    def step(self, step):
        """One update; returns its loss."""
        micro_batches = self.batches[step]
        num_targets = count_targets(micro_batches)
        total = 0.0
        for micro in micro_batches:
            with self.run.autocast():
                loss = self.net(**self.run.to_device(micro), num_items_in_batch=num_targets, skip_logits=True).loss
            self.run.backward(loss)
            total += loss.item()
        self.run.clip_and_step(self.model, self.optimizer, total)
        return total

    def work(self, step):
        """(positions, positions of the head, pairs of positions that see each other) that a step computes."""
        return step_work(self.batches[step])


class Theirs:
    """transformers' model on the same sequences, padded; `size` of them in a batch (0: all)."""

    def __init__(self, model, run, batches, size):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.model = AutoModelForCausalLM.from_pretrained(folder).to(run.device).train()
        self.run, self.batches, self.size, self.net = run, batches, size, run.wrap(self.model)
        self.optimizer = build_optimizer(self.model, TrainArgs())

    def padded(self, step):
        """The batches of a step: lists of what the model takes, each as wide as its longest sequence."""
        rows = self.batches.rows(0)[step * self.batches.rows_per_step :][: self.batches.rows_per_step]
        sequences = [self.batches.dataset[index] for row in rows for index in row]
        size = self.size or len(sequences)
        return [pad(sequences[at : at + size], self.batches.pad_id) for at in range(0, len(sequences), size)]

    def step(self, step):
        """One update, by the sum of the losses of the step's batches; returns it."""
        padded = self.padded(step)
        num_targets = count_targets(padded)
        total = 0.0
        for micro in padded:
            with self.run.autocast():
                loss = self.net(**self.run.to_device(micro), num_items_in_batch=num_targets, use_cache=False).loss
            self.run.backward(loss)
            total += loss.item()
        self.run.clip_and_step(self.model, self.optimizer, total)
        return total

    def work(self, step):
        """As Ours.work; every position goes through the head, and every later one sees every earlier one."""
        shapes = [micro["input_ids"].shape for micro in self.padded(step)]
        positions = sum(B * T for B, T in shapes)
        return positions, positions, sum(B * T * (T + 1) // 2 for B, T in shapes)


def pad(sequences, pad_id):
    """Sequences beside each other, as wide as the longest: input_ids, labels, attention_mask, int64 [B, T]."""
    shape = len(sequences), max(len(sequence["input_ids"]) for sequence in sequences)
    input_ids, labels, mask = torch.full(shape, pad_id), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        input_ids[b, :length] = torch.from_numpy(sequence["input_ids"])
        labels[b, :length] = torch.from_numpy(sequence["labels"])
        mask[b, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def timed(side, steps, device):
    """Seconds that `side` takes for `steps`, and their losses."""
    wait_for(device)
    start = time.perf_counter()
    losses = [side.step(step) for step in steps]
    wait_for(device)
    return time.perf_counter() - start, losses


def measure(preset, args, paths):
    """The figures of one preset, as a dict (see `main` for what is printed)."""
    settings = TrainArgs(preset=preset, device=args.device, dtype=args.dtype, use_compile=args.use_compile, seed=args.seed)
    run = Run(settings)
    model, tokenizer = load_model(settings, run.device)
    model.config.router_aux_loss_coef = 0.0  # what theirs is loaded from says the same
    dataset = STAGES[args.stage](paths, tokenizer, args.max_seq_len)
    if args.rows:
        dataset = FirstRows(dataset[index] for index in range(min(args.rows, len(dataset))))
    batches = PackedBatches(dataset, batch_size=args.batch_size, accumulation_steps=1, max_seq_len=args.max_seq_len,
                            seed=args.seed, epochs=1, pad_id=tokenizer.pad_token_id)
    if len(batches) < args.warmup + args.steps:
        raise ValueError(f"the rows fill {len(batches)} steps: give more of them, or make --warmup {args.warmup} plus "
                         f"--steps {args.steps} or --batch_size {args.batch_size} smaller")
    sides = Ours(model, run, batches), Theirs(model, run, batches, args.reference_batch)
    for side in sides:
        timed(side, range(args.warmup), run.device)

    end = args.warmup + args.steps
    seconds, losses, rates = [0.0, 0.0], [[], []], []
    for first in range(args.warmup, end, BLOCK):
        rates.append(matrix_rate(run.device, run.dtype))
        for i, side in enumerate(sides):
            took, block_losses = timed(side, range(first, min(first + BLOCK, end)), run.device)
            seconds[i] += took
            losses[i] += block_losses
    steps = range(args.warmup, end)
    work = [np.sum([side.work(step) for step in steps], axis=0) for side in sides]
    packed = [index for step in steps for row in batches.rows(0)[step * args.batch_size :][: args.batch_size] for index in row]
    real_tokens = int(sum(dataset.lengths[index] for index in packed))
    targets = int(work[0][1])
    ratio, limit = seconds[1] / seconds[0], work[1][0] / real_tokens
    rate = median(rates)
    shares = [training_flops(model.config, *w) / s / rate for w, s in zip(work, seconds)]
    return {
        "preset": preset, "stage": args.stage, "device": str(run.device), "dtype": str(run.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "reference": type(sides[1].model).__name__, "steps": args.steps,
        "sequences": len(packed), "real_tokens": real_tokens, "targets": targets,
        "our_positions": int(work[0][0]), "their_positions": int(work[1][0]),
        "our_targets_per_s": targets / seconds[0], "their_targets_per_s": targets / seconds[1],
        "ratio": ratio, "limit": limit, "ratio_of_limit": ratio / limit, "matrix_gflops_per_s": rate / 1e9,
        "our_matrix_share": shares[0], "their_matrix_share": shares[1], "our_losses": losses[0], "their_losses": losses[1],
    }


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    if not args.data_path:
        write_world("mini", TOY)
    figures = []
    print("| preset | stage | reference | our targets/s | theirs | ratio | limit | ratio / limit | matrix product "
          "| ours, of the matrix rate | theirs |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for preset in args.preset:
        f = measure(preset, args, args.data_path or [str(TOY / f"{args.stage}_train.jsonl")])
        figures.append(f)
        print(f"| {preset} | {f['stage']} | {f['reference']} | {f['our_targets_per_s']:,.0f} | {f['their_targets_per_s']:,.0f} "
              f"| {f['ratio']:.2f} | {f['limit']:.2f} | {f['ratio_of_limit']:.0%} | {f['matrix_gflops_per_s']:,.0f} GFLOP/s "
              f"| {f['our_matrix_share']:.0%} | {f['their_matrix_share']:.0%} |", flush=True)
    f = figures[-1]
    print(f"{f['device']}, {f['dtype']}, {f['threads']} threads; {f['steps']} steps of {args.batch_size} packed rows of "
          f"{args.max_seq_len}: {f['sequences']:,} sequences, {f['real_tokens']:,} tokens, {f['targets']:,} targets, "
          f"{f['our_positions']:,} positions packed and {f['their_positions']:,} padded")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command(main)
