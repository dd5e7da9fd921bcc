"""The gain of each stage after supervised fine-tuning, measured on the toy world: a table and a
picture.

    python scripts/evaluate_stages.py               # the supervised stages, 3 seeds
    python scripts/evaluate_stages.py --stages lora dpo --seeds 1 2 3 4 5 \\
        --from_weight out/quickstart/full_sft_tiny
    python scripts/evaluate_stages.py --stages ppo grpo dr_grpo dapo cispo gspo spo agent
    python scripts/evaluate_stages.py --max_steps 4 --seeds 1 --limit 8   # a minute: a trial run

Each stage is trained once per seed, with the commands that are printed, and its model is compared
before and after on questions that were held out of all training. The interval is that of the mean
over the seeds (Student's t, 95%); a seed decides the new weights, the order of the rows and the
sampling. Results are kept in --save_dir: the same command resumes where it was stopped.
Reinforcement learning draws its curves too. `scripts/ladder.py` is this script's old name.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.toy.world import make_world
from dataset.toy_world import write_world
from model.files import write_json
from scripts.checkpoint import ComputeArgs
from trainer.runtime.arguments import arg, check_positive, command, parse_args

if TYPE_CHECKING:
    from scripts.stages.bench import Bench, Results

OLD_FOLDER = ROOT / "out" / "ladder"  # results of the script's old name are resumed
# the 97.5% quantile of Student's t with n - 1 degrees of freedom, for n seeds
STUDENT_T = dict(
    enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2)
)
SUPERVISED = ("lora", "dpo", "reward", "distillation", "reason", "tools")
REINFORCEMENT = ("ppo", "grpo", "dr_grpo", "dapo", "cispo", "gspo", "spo", "agent")
STAGES = (*SUPERVISED, *REINFORCEMENT)
# (stage, measurement): the side of the table ("after" or "gain") that must be above a value; a gain
# above 0 with its whole interval
AIMS = {
    ("lora", "new domain"): ("after", 0.95),
    ("lora", "old skills"): ("gain", -0.02),
    ("dpo", "held-out pairs"): ("gain", 0.0),
    ("dpo", "sampled answers"): ("gain", 0.0),
    ("reward", "held-out pairs"): ("after", 0.90),
    ("distillation", "held-out bits saved"): ("gain", 0.0),
    ("distillation", "all skills"): ("gain", 0.0),
    ("reason", "multi-step problems"): ("gain", 0.10),
    ("tools", "with tools, against none"): ("after", 0.90),
    **{
        (name, measurement): ("gain", 0.10)
        for name in REINFORCEMENT
        for measurement in ("right answers", "one call", "two calls")
    },
}


@dataclass
class StageArgs(ComputeArgs):
    stages: list[str] = arg(
        list(SUPERVISED), f"which of {', '.join(STAGES)}", nargs="+", aliases=("rungs",)
    )
    seeds: list[int] = arg([1, 2, 3], "a run of each stage for each of these", nargs="+")
    from_weight: str = arg("", "SFT checkpoint that all stages start from (default: it is trained)")
    save_dir: str = arg(str(ROOT / "out" / "stages"), "folder of runs, results and pictures")
    limit: int = arg(200, "held-out questions of each skill, at most")
    max_steps: int | None = arg(None, "a trial run: end each training after so many steps")
    overwrite: bool = arg(
        False, "train and measure the stages in --save_dir again, but not the model they start from"
    )
    json: str = arg("", "write the table to this file too")

    def check(self) -> None:
        check_positive(self, "limit", "max_steps")
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"--stages {unknown[0]}: there are {', '.join(STAGES)}")
        if len(set(self.seeds)) < len(self.seeds) or len(self.seeds) > max(STUDENT_T):
            raise ValueError(f"--seeds: give up to {max(STUDENT_T)} different numbers")
        self.stages = list(dict.fromkeys(self.stages))
        if "save_dir" not in self.given:
            if OLD_FOLDER.is_dir() and not Path(self.save_dir).is_dir():
                self.save_dir = str(OLD_FOLDER)
            if self.max_steps:
                self.save_dir += f"_{self.max_steps}_steps"


def stage_function(name: str) -> Callable[[Bench, int], Results]:
    """The stage (bench, seed) -> {measurement: (before, after)} of that name."""
    if name in SUPERVISED:
        from scripts.stages.supervised import STAGES as functions
    else:
        from scripts.stages.reinforcement import STAGES as functions
    return functions[name]


def measure(bench: Bench, stage: str, seed: int) -> Results:
    """The results of a stage with a seed: from its file, or by training and measuring now."""
    args = bench.args
    path = Path(args.save_dir) / "results" / f"{stage}-{seed}.json"
    asked = {"from_weight": str(bench.base), "limit": args.limit, "max_steps": args.max_steps}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != asked:
            raise ValueError(
                f"{path} was measured with {kept['asked']}, not {asked}: choose another "
                "--save_dir, or --overwrite"
            )
        return kept["results"]
    run = stage_function(stage)
    print(f"\n== {stage}, seed {seed}: {run.__doc__.splitlines()[0]}", flush=True)
    results = run(bench, seed)
    write_json(path, {"asked": asked, "results": results})
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval) over the seeds; nan for a single seed."""
    n = len(values)
    return mean(values), STUDENT_T[n] * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def table_rows(stage: str, per_seed: Sequence[Results]) -> list[dict]:
    """A row per measurement of a stage: means, the gain with its interval, and the aim."""
    rows = []
    for name in per_seed[0]:
        before, after = ([results[name][side] for results in per_seed] for side in (0, 1))
        gain, half = interval([b - a for a, b in zip(before, after)])
        row = {"stage": stage, "what": name, "before": mean(before), "after": mean(after)}
        row |= {"gain": gain, "half": half, "after_half": interval(after)[1]}
        row |= {"aim": "", "reached": None}
        if (stage, name) in AIMS:
            side, least = AIMS[stage, name]
            sure = half if (side, least) == ("gain", 0) and half == half else 0.0  # nan: one seed
            row |= {"aim": f"{side} > {100 * least:g}", "reached": row[side] - sure > least}
        rows.append(row)
    return rows


def format_rows(rows: list[dict]) -> str:
    """The table as aligned text, in percent."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'stage':<13} {'what':<{width}} {'before':>7} {'after':>16} {'gain':>17}  aim"]
    for row in rows:
        before = f"{100 * row['before']:.1f}"
        after = f"{100 * row['after']:.1f} ± {100 * row['after_half']:.1f}"
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['half']:.1f}"
        aim = f"{row['aim']}: {'reached' if row['reached'] else 'missed'}" if row["aim"] else ""
        name = f"{row['stage']:<13} {row['what']:<{width}}"
        lines.append(f"{name} {before:>7} {after:>16} {gain:>17}  {aim}".rstrip())
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, num_seeds: int) -> None:
    """The table as bars: before pale, after dark with its interval, the aim as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.2 + 0.5 * len(rows)), dpi=140, layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        before, after = 100 * row["before"], 100 * row["after"]
        errors = {"xerr": 100 * row["after_half"], "error_kw": {"capsize": 2, "linewidth": 1}}
        axis.barh(y - 0.18, before, 0.32, color="#bcd3e6", label="before")
        name = "after, with its 95% interval"
        axis.barh(y + 0.18, after, 0.32, color="#0072B2", **errors, label=name)
        if row["aim"]:
            side, least = AIMS[row["stage"], row["what"]]
            aim = 100 * (least + (row["before"] if side == "gain" else 0))
            axis.plot([aim, aim], [y - 0.4, y + 0.4], color="#D55E00", linewidth=2, label="aim")
    axis.set_yticks(range(len(rows)), [f"{row['stage']}: {row['what']}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel(f"percent, mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    by_label = {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(by_label.values(), by_label, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(StageArgs, argv)
    from scripts.stages.bench import Bench

    if args.overwrite:
        shutil.rmtree(Path(args.save_dir) / "results", ignore_errors=True)
    write_world("mini", ROOT / "dataset" / "toy_mini")
    bench = Bench(args, make_world("mini"))
    rows = []
    for stage in args.stages:
        rows += table_rows(stage, [measure(bench, stage, seed) for seed in args.seeds])
    note = f"In percent; mean and 95% interval over {len(args.seeds)} seeds; from {bench.base}"
    print(f"\n{format_rows(rows)}\n\n{note}".replace(f"{ROOT}/", ""))
    folder = Path(args.save_dir)
    draw(rows, folder / "stages.png", len(args.seeds))
    # the agent's questions are others
    if compared := [name for name in args.stages if name in REINFORCEMENT and name != "agent"]:
        from scripts.stages.reinforcement import draw_curves

        draw_curves(args.save_dir, compared, args.seeds, folder / "rl_curves.png")
    print(f"drawn in {folder}".replace(f"{ROOT}/", ""))
    if args.json:
        write_json(args.json, {"from_weight": str(bench.base), "seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    command(main)
