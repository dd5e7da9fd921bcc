"""What a checkpoint costs: the fraction of training time that saving takes, when training waits for
it and when it is written in the background.

    python scripts/bench.py saving                                        # tiny, minimind2-small
    python scripts/bench.py saving --preset minimind-3 --batch_size 64 --json out/bench_saving.json

The same block of steps is timed without a save, with one that training waits for, and with one that
a thread writes meanwhile, in turns, until everything is on the disk. `cost s` is the additional
time of a block with a save; `stall s` is how long training stands still; `training fraction` is the
fraction of the training time with a save every --save_interval steps.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from model.presets import PRESETS
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import DeviceArgs
from trainer.runtime.arguments import arg, check_positive
from trainer.runtime.stage_args import TrainArgs

KINDS = ("no save", "waited for", "in the background")
COLUMNS = "preset save step_s checkpoint_mb stall_s cost_s training_fraction"


@dataclass
class Args(DeviceArgs, BenchArgs):
    preset: list[str] = arg(["tiny", "minimind2-small"], "shapes", choices=list(PRESETS), nargs="+")
    batch_size: int = arg(8, "batch rows of a step")
    max_seq_len: int = arg(512, "tokens of a batch row")
    steps: int = arg(4, "steps of a block: they should take longer than a save")
    rounds: int = arg(5, "blocks of each kind")
    save_interval: int = arg(
        TrainArgs.save_interval, "steps between two saves, to compute the fraction of training"
    )

    def check(self) -> None:
        check_positive(self, "batch_size", "steps", "rounds", "save_interval")


def measure(args: Args, results: Results) -> None:
    """Two rows per preset."""
    from scripts.benchmarks.steps import open_dataset
    from scripts.benchmarks.timing import open_device

    open_device(args, results)
    dataset = open_dataset("pretrain", [], args.max_seq_len)
    for preset in args.preset:
        with tempfile.TemporaryDirectory() as folder:
            for row in _measure_preset(preset, args, dataset, Path(folder)):
                results.add(row)


def _measure_preset(preset, args, dataset, folder):
    """Time the three kinds of blocks in turns; yields a row for each kind of save."""
    from scripts.benchmarks.steps import Ours
    from scripts.benchmarks.timing import take_turns

    shared = {name: getattr(args, name) for name in ("device", "batch_size", "max_seq_len")}
    ours = Ours.start(TrainArgs(preset=preset, max_steps=args.steps, **shared), dataset)
    checkpoint = ours.checkpoint(folder)
    _time_block("waited for", ours, checkpoint, 0)  # warm-up
    turns = {kind: partial(_time_block, kind, ours, checkpoint) for kind in KINDS}
    times = {kind: list(zip(*turn)) for kind, turn in take_turns(turns, args.rounds).items()}
    (newest, *_) = sorted(folder.glob("checkpoints/step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*"))
    bare = median(times["no save"][0])
    step = bare / len(ours.batches)
    for kind in KINDS[1:]:
        cost = median(times[kind][0]) - bare
        yield {
            "preset": preset,
            "save": kind,
            "step_s": step,
            "checkpoint_mb": size / 1e6,
            "stall_s": median(times[kind][1]),
            "cost_s": cost,
            "training_fraction": max(0.0, cost) / (args.save_interval * step + max(0.0, cost)),
        }


def _time_block(kind, ours, checkpoint, number):
    """(seconds of all steps with a save before the first of them, seconds until that one began)."""
    from scripts.benchmarks.timing import timed

    def save():
        if kind != "no save":
            checkpoint.save(number + 1, targets=0, guard_state={})
        if kind == "waited for":
            checkpoint.wait()

    def train():
        for step in range(len(ours.batches)):
            ours.step(step)
        checkpoint.wait()

    stall, took = (timed(work, ours.run.device)[0] for work in (save, train))
    return stall + took, stall
