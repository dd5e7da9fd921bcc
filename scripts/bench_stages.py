"""What the stages after supervised fine-tuning cost: time and memory of each beside plain SFT of the same rows.

    python scripts/bench_stages.py                                                  # tiny, the toy world's rows
    python scripts/bench_stages.py --preset minimind2-small --rows 100 --rounds 1 --json out/bench_stages.json

Each stage trains once through the same first --rows rows of its file as a process of its own, and so does train_full_sft.py,
in turns; a pair is two SFT rows, one for each side. Time is that of the training steps, without imports and tokenizing
(with a cached reference also without its one forward pass over the data); memory is the largest of the process, on a GPU
what PyTorch took there. The start is a network with random weights, which costs what a trained one costs.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.toy_world import write_world
from model.model_minimind import PRESETS
from trainer.arguments import arg, check_positive, command, parse_args
from trainer.metrics import write_json

TOY = ROOT / "dataset" / "toy_mini"
# name -> (script, file of rows, its flags)
STAGES = {
    "lora": ("train_lora", "sft", []),
    "lora, dora": ("train_lora", "sft", ["--use_dora"]),
    "dpo": ("train_dpo", "dpo", []),
    "dpo, reference on the fly": ("train_dpo", "dpo", ["--reference", "on_the_fly"]),
    "orpo": ("train_dpo", "dpo", ["--loss_type", "orpo"]),
    "kto": ("train_dpo", "dpo", ["--loss_type", "kto"]),
    "reward": ("train_reward", "dpo", []),
    "distillation": ("train_distillation", "sft", ["--teacher", "START"]),
    "distillation, half on-policy": ("train_distillation", "sft", ["--teacher", "START", "--on_policy_share", "0.5"]),
    "reason": ("train_reason", "reason", []),
    "reason, marks count 5 times": ("train_reason", "reason", ["--mark_weight", "5"]),
}


@dataclass
class BenchArgs:
    stages: list[str] = arg(list(STAGES), "which of the stages", choices=list(STAGES), nargs="+")
    preset: str = arg("tiny", "shape of the network", choices=list(PRESETS))
    rows: int = arg(800, "rows of the file that each stage trains on")
    rounds: int = arg(3, "times that each is measured; the median counts")
    batch_size: int = arg(4, "packed rows of a step")
    max_seq_len: int = arg(512, "tokens of a packed row")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "rows", "rounds", "batch_size")


def write_rows(folder, name, count):
    """(file of the stage's first rows, file of the same as SFT rows) in `folder`."""
    lines = (TOY / f"{name}_train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if name != "dpo":
        return path, path
    sides = [{"conversations": json.loads(line)[side]} for line in lines for side in ("chosen", "rejected")]
    plain = folder / f"{name}_sides.jsonl"
    plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sides), encoding="utf-8")
    return path, plain


def train(script, path, folder, args, *flags):
    """(seconds of the training steps, largest memory in GB) of one epoch in a process of its own."""
    result = folder / "result.json"
    flags = [str(folder / "out" / f"start_{args.preset}") if flag == "START" else flag for flag in flags]
    words = [sys.executable, str(ROOT / "trainer" / f"{script}.py"), "--data_path", str(path), "--save_dir", str(folder / "out"),
             "--batch_size", str(args.batch_size), "--max_seq_len", str(args.max_seq_len), "--val_share", "0",
             "--device", args.device, "--cache_dir", str(folder / "cache"), "--json", str(result), "--overwrite", "--epochs", "1",
             *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    figures = json.loads(result.read_text())
    return figures["seconds"], figures["peak_memory_gb"]


def measure(folder, args):
    """One row per stage: seconds and memory, of it and of SFT, and their ratios; medians over the rounds."""
    start = str(folder / "out" / f"start_{args.preset}")
    write_world("mini", TOY)
    files = {name: write_rows(folder, name, args.rows) for name in ("sft", "dpo", "reason")}
    train("train_full_sft", files["sft"][0], folder, args, "--from_weight", "none", "--preset", args.preset, "--max_steps", "1",
          "--save_weight", "start")
    rows = []
    for stage in dict.fromkeys(args.stages):
        script, name, flags = STAGES[stage]
        own, plain = [], []
        for _ in range(args.rounds):
            plain.append(train("train_full_sft", files[name][1], folder, args, "--from_weight", start))
            own.append(train(script, files[name][0], folder, args, "--from_weight", start, *flags))
        seconds, memory, sft_seconds, sft_memory = (median(run[i] for run in runs) for runs in (own, plain) for i in (0, 1))
        rows.append({"stage": stage, "seconds": seconds, "sft_seconds": sft_seconds, "memory_gb": memory,
                     "sft_memory_gb": sft_memory, "time_ratio": seconds / sft_seconds, "memory_ratio": memory / sft_memory})
        print("{stage:<30} {seconds:>8.1f} {sft_seconds:>8.1f} {time_ratio:>7.2f} {memory_gb:>10.2f} {sft_memory_gb:>8.2f} "
              "{memory_ratio:>7.2f}".format(**rows[-1]), flush=True)
    return rows


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    print(f"{args.preset}, {args.rows} rows, {args.batch_size} x {args.max_seq_len} tokens a step, {args.rounds} rounds")
    print(f"{'stage':<30} {'seconds':>8} {'SFT':>8} {'ratio':>7} {'memory GB':>10} {'SFT':>8} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    if args.json:
        write_json(args.json, {"preset": args.preset, "rows": args.rows, "stages": rows})


if __name__ == "__main__":
    command(main)
