"""What a checkpoint costs: the share of training time that saving takes, waited for and written in the background.

    python scripts/bench_saving.py                                            # tiny and minimind2-small
    python scripts/bench_saving.py --preset minimind-3 --batch_size 64 --json out/bench_saving.json

The same block of steps is timed without a save, with one that training waits for, and with one that a thread writes
meanwhile, in turns, until everything is on the disk. What a block takes longer than the first kind is the cost of the
save; per --save_interval steps it is a share of the training time.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import PretrainDataset
from dataset.packing import PackedBatches
from dataset.toy_world import write_world
from model.model_minimind import PRESETS
from scripts.bench_training import Ours
from trainer.arguments import TrainArgs, arg, check_positive, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.costs import wait_for
from trainer.metrics import write_json
from trainer.run import Run
from trainer.weights import load_model

TOY = ROOT / "dataset" / "toy_mini"
KINDS = ("no save", "waited for", "in the background")


@dataclass
class BenchArgs:
    preset: list[str] = arg(["tiny", "minimind2-small"], "shapes to measure", choices=list(PRESETS), nargs="+")
    batch_size: int = arg(8, "packed rows of a step")
    max_seq_len: int = arg(512, "tokens of a packed row")
    steps: int = arg(4, "steps of a block: they should take longer than a save")
    rounds: int = arg(5, "blocks of each kind")
    save_interval: int = arg(TrainArgs.save_interval, "steps between two saves that the share is for")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "batch_size", "steps", "rounds", "save_interval")


def block(kind, ours, checkpoint, first, args):
    """Seconds of `args.steps` steps, with a save before the first of them as `kind` says; and how long that call took."""
    start = time.perf_counter()
    if kind != "no save":
        checkpoint.save(first + 1, 0)
        if kind == "waited for":
            checkpoint.wait()
    wait_for(ours.run.device)
    blocked = time.perf_counter() - start
    for step in range(args.steps):
        ours.step(step % len(ours.batches))
    checkpoint.wait()
    wait_for(ours.run.device)
    return time.perf_counter() - start, blocked


def measure(preset, args, folder):
    """The figures of one preset, as a dict."""
    settings = TrainArgs(preset=preset, device=args.device, batch_size=args.batch_size, max_seq_len=args.max_seq_len)
    run = Run(settings)
    model, tokenizer = load_model(settings, run.device)
    dataset = PretrainDataset([str(TOY / "pretrain_train.jsonl")], tokenizer, args.max_seq_len)
    batches = PackedBatches(dataset, batch_size=args.batch_size, accumulation_steps=1, max_seq_len=args.max_seq_len, seed=0,
                            epochs=1, max_steps=args.steps, pad_id=tokenizer.pad_token_id)
    ours = Ours(model, run, batches, settings)
    checkpoint = Checkpoint(folder / preset, settings, run, model, tokenizer, ours.optimizer, dataset.fingerprint)
    (folder / preset).mkdir()
    block("waited for", ours, checkpoint, 0, args)  # warm-up
    seconds, blocked = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS:
            took, stalled = block(kind, ours, checkpoint, number, args)
            seconds[kind].append(took)
            blocked[kind].append(stalled)
    bare = median(seconds["no save"])
    interval = args.save_interval * bare / args.steps
    cost = {kind: median(seconds[kind]) - bare for kind in KINDS[1:]}
    size = sum(path.stat().st_size for path in (folder / preset / "checkpoints").rglob("*") if path.is_file())
    return {"preset": preset, "device": str(run.device), "step_seconds": bare / args.steps, "save_interval": args.save_interval,
            "checkpoint_mb": size / 1e6 / len(checkpoint.steps()),
            "stall_seconds": {kind: median(blocked[kind]) for kind in KINDS[1:]}, "cost_seconds": cost,
            "share_of_training": {kind: max(0.0, x) / (interval + max(0.0, x)) for kind, x in cost.items()}}


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    write_world("mini", TOY)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.preset:
            rows.append(measure(preset, args, Path(folder)))
            print("{preset} on {device}: a step {step_seconds:.2f} s, a checkpoint {checkpoint_mb:.0f} MB".format(**rows[-1]))
            for kind in KINDS[1:]:
                print(f"  {kind}: training stands still for {rows[-1]['stall_seconds'][kind]:.3f} s, and takes "
                      f"{rows[-1]['cost_seconds'][kind]:.3f} s longer in all: {rows[-1]['share_of_training'][kind]:.3%} of the "
                      f"time with a save every {args.save_interval} steps", flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    command(main)
