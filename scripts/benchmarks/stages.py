"""What the stages after supervised fine-tuning cost: time and memory of each, compared with plain
SFT of the same rows.

    python scripts/bench.py stages                                      # tiny, the toy world's rows
    python scripts/bench.py stages --preset minimind2-small --rows 100 --rounds 1

Each stage trains one epoch on the first --rows rows of its file as a process of its own, and so
does train_full_sft.py, in turns; a pair is two SFT rows, one for each side. Time is that of the
training steps, without imports and tokenizing (with a cached reference also without its one forward
pass over the data); memory is the peak of the process, on a GPU what PyTorch took there. The start
is a network with random weights, which costs as much as a trained one.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

from dataset.files.jsonl import dump_row, read_rows
from model.presets import PRESETS
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import DeviceArgs
from trainer.runtime.arguments import ROOT, arg, check_positive

TOY = ROOT / "dataset" / "toy_mini"
SFT = "train_full_sft"
# name -> script, file of rows, flags; START is the network that all of them start from
STAGES = {
    "lora": "train_lora sft",
    "lora, dora": "train_lora sft --use_dora",
    "dpo": "train_dpo dpo",
    "dpo, reference on the fly": "train_dpo dpo --reference on_the_fly",
    "orpo": "train_dpo dpo --loss_type orpo",
    "kto": "train_dpo dpo --loss_type kto",
    "reward": "train_reward dpo",
    "distillation": "train_distillation sft --teacher START",
    "distillation, half on-policy": "train_distillation sft --teacher START --on_policy_ratio 0.5",
    "reason": "train_reason reason",
    "reason, think tokens count 5 times": "train_reason reason --think_token_weight 5",
}
COLUMNS = """stage seconds sft_seconds ratio ratio_range memory_gb sft_memory_gb
memory_ratio"""


@dataclass
class Args(DeviceArgs, BenchArgs):
    stages: list[str] = arg(list(STAGES), "which of the stages", choices=list(STAGES), nargs="+")
    preset: str = arg("tiny", "shape of the network", choices=list(PRESETS))
    rows: int = arg(800, "rows of the file that each stage trains on")
    rounds: int = arg(3, "times that each is measured; the median counts")
    batch_size: int = arg(4, "batch rows of a step")
    max_seq_len: int = arg(512, "tokens of a batch row")

    def check(self) -> None:
        check_positive(self, "rows", "rounds", "batch_size")


def measure(args: Args, results: Results) -> None:
    """A row per stage; medians over the rounds."""
    from dataset.toy_world import write_world

    write_world("mini", TOY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {name: write_files(folder, name, args.rows) for name in ("sft", "dpo", "reason")}
        start = ["--preset", args.preset, "--max_steps", "1", "--save_weight", "start"]
        train(SFT, files["sft"][0], folder, args, "--from_weight", "none", *start)
        for stage in dict.fromkeys(args.stages):
            results.add(_measure_stage(stage, files, folder, args))


def write_files(folder: Path, name: str, count: int) -> tuple[Path, Path]:
    """(file of the first rows of a stage, file of the same as SFT rows) in `folder`."""
    rows = [row for _, row in islice(read_rows(TOY / f"{name}_train.jsonl"), count)]
    own, plain = folder / f"{name}.jsonl", folder / f"{name}_plain.jsonl"
    own.write_text("".join(map(dump_row, rows)), encoding="utf-8")
    if name == "dpo":
        sides = ("chosen", "rejected")
        rows = [{"conversations": row[side]} for row in rows for side in sides]
    plain.write_text("".join(map(dump_row, rows)), encoding="utf-8")
    return own, plain


def _measure_stage(stage, files, folder, args):
    """Train the stage and SFT in turns; returns a row."""
    from scripts.benchmarks.timing import compare, take_turns

    script, name, *flags = STAGES[stage].split()
    start = str(folder / "out" / f"start_{args.preset}")
    flags = ["--from_weight", start, *(start if flag == "START" else flag for flag in flags)]
    runs = {"stage": (script, files[name][0], flags), "sft": (SFT, files[name][1], flags[:2])}

    def run(side, _):
        script, path, flags = runs[side]
        return train(script, path, folder, args, *flags)

    turns = take_turns({side: partial(run, side) for side in ("sft", "stage")}, args.rounds)
    seconds, memory = ({side: [one[i] for one in turns[side]] for side in runs} for i in (0, 1))
    return {
        "stage": stage,
        "seconds": median(seconds["stage"]),
        "sft_seconds": median(seconds["sft"]),
        **compare(seconds["stage"], seconds["sft"]),
        "memory_gb": median(memory["stage"]),
        "sft_memory_gb": median(memory["sft"]),
        "memory_ratio": median(memory["stage"]) / median(memory["sft"]),
    }


def train(script: str, path: Path, folder: Path, args: Args, *flags: str) -> tuple[float, float]:
    """(seconds of the training steps, peak memory in GB) of one epoch in a process of its own."""
    result = folder / "result.json"
    always = {
        "data_path": path,
        "save_dir": folder / "out",
        "batch_size": args.batch_size,
        "max_seq_len": args.max_seq_len,
        "val_ratio": 0,
        "device": args.device,
        "cache_dir": folder / "cache",
        "json": result,
        "overwrite": 1,
        "epochs": 1,
    }
    words = [sys.executable, str(ROOT / "trainer" / f"{script}.py")]
    words += [word for name, value in always.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*words, *flags], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{' '.join([*words, *flags])} ended with {done.returncode}: "
            f"{done.stderr.strip()[-2000:]}"
        )
    metrics = json.loads(result.read_text(encoding="utf-8"))
    return metrics["seconds"], metrics["peak_memory_gb"]
