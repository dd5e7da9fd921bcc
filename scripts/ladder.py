"""What each stage after supervised fine-tuning adds, measured on the toy world: a table and a picture.

    python scripts/ladder.py                                    # all rungs, 3 seeds: a table, out/ladder/ladder.png
    python scripts/ladder.py --rungs lora dpo --seeds 1 2 3 4 5 --from_weight out/quickstart/full_sft_tiny
    python scripts/ladder.py --rungs ppo grpo dr_grpo dapo cispo gspo spo agent    # reinforcement learning; also its curves
    python scripts/ladder.py --max_steps 4 --seeds 1 --limit 8   # only to see that everything works

A rung trains a stage once per seed, with the commands that it prints, and compares before and after on questions that were held
out of all training. The interval is that of the mean over the seeds (Student's t, 95%); a seed decides the new weights, the
order of the rows and what is sampled. What is done is kept in --save_dir: the command goes on where it was stopped.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.toy_world import make_world, write_world
from scripts import ladder_rungs
from scripts.ladder_rungs import Bench
from scripts.rl_rungs import RL_AIMS, RL_RUNGS, draw_curves
from trainer.arguments import arg, check_positive, command, parse_args
from trainer.metrics import write_json

# the 97.5% quantile of Student's t with n - 1 degrees of freedom, for n seeds
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
AIMS, RUNGS = ladder_rungs.AIMS | RL_AIMS, ladder_rungs.RUNGS | RL_RUNGS


@dataclass
class LadderArgs:
    rungs: list[str] = arg(list(ladder_rungs.RUNGS), f"which of {', '.join(RUNGS)}", nargs="+")
    seeds: list[int] = arg([1, 2, 3], "a run of each rung for each of these", nargs="+")
    from_weight: str = arg("", "SFT checkpoint that all rungs start from (default: one is trained first)")
    save_dir: str = arg(str(ROOT / "out" / "ladder"), "folder for the runs, the results and the pictures")
    limit: int = arg(200, "held-out questions of each skill, at most")
    max_steps: int | None = arg(None, "end each training after so many steps: to see only that everything works")
    device: str = arg("auto", "cpu or cuda; auto: the GPU if there is one")
    dtype: str = arg("auto", "arithmetic of measuring; auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    overwrite: bool = arg(False, "train and measure the rungs in --save_dir again; a model that they start from stays")
    json: str = arg("", "write the table to this file too")

    def check(self):
        """ValueError for rungs that do not exist and seeds that come twice."""
        check_positive(self, "limit", "max_steps")
        unknown = [name for name in self.rungs if name not in RUNGS]
        if unknown:
            raise ValueError(f"--rungs {unknown[0]}: there are {', '.join(RUNGS)}")
        if len(set(self.seeds)) < len(self.seeds) or len(self.seeds) > max(STUDENT_T):
            raise ValueError(f"--seeds: give up to {max(STUDENT_T)} different numbers")
        self.rungs = list(dict.fromkeys(self.rungs))
        if self.max_steps and "save_dir" not in self.given:
            self.save_dir += f"_{self.max_steps}_steps"


def measured(bench, rung, seed):
    """{what: (before, after)} of a rung with a seed: from its file, or by training and measuring now."""
    path = Path(bench.args.save_dir) / "results" / f"{rung}-{seed}.json"
    asked = {"from_weight": str(bench.base), "limit": bench.args.limit, "max_steps": bench.args.max_steps}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != asked:
            raise ValueError(f"{path} was measured with {kept['asked']}, not {asked}: choose another --save_dir, or --overwrite")
        return kept["results"]
    print(f"\n== {rung}, seed {seed}: {RUNGS[rung].__doc__.splitlines()[0]}", flush=True)
    results = RUNGS[rung](bench, seed)
    write_json(path, {"asked": asked, "results": results})
    return results


def interval(values):
    """(mean, half of its 95% interval) over the seeds; nan for one alone."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), STUDENT_T[len(values)] * stdev(values) / math.sqrt(len(values))


def table_rows(rung, per_seed):
    """One row for each thing that a rung measures: means, the gain with its interval, and whether the aim is reached."""
    rows = []
    for what in per_seed[0]:
        before, after = ([results[what][side] for results in per_seed] for side in (0, 1))
        gain, half = interval([b - a for a, b in zip(before, after)])
        row = {"rung": rung, "what": what, "before": mean(before), "after": mean(after), "gain": gain, "half": half,
               "after_half": interval(after)[1], "aim": "", "reached": None}
        if (rung, what) in AIMS:
            side, least = AIMS[rung, what]
            sure = half if (side, least) == ("gain", 0) and half == half else 0.0  # nan: one seed
            row |= {"aim": f"{side} > {100 * least:g}", "reached": row[side] - sure > least}
        rows.append(row)
    return rows


def format_rows(rows):
    """The table as aligned text, shares in percent."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'rung':<13} {'what':<{width}} {'before':>7} {'after':>16} {'gain':>17}  aim"]
    for row in rows:
        after = f"{100 * row['after']:.1f} ± {100 * row['after_half']:.1f}"
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['half']:.1f}"
        aim = f"{row['aim']}: {'reached' if row['reached'] else 'missed'}" if row["aim"] else ""
        before = f"{100 * row['before']:.1f}"
        lines.append(f"{row['rung']:<13} {row['what']:<{width}} {before:>7} {after:>16} {gain:>17}  {aim}".rstrip())
    return "\n".join(lines)


def draw(rows, path, num_seeds):
    """The table as bars: before pale, after dark with its interval, the aim as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.5 * len(rows)), dpi=140, layout="constrained")
    for y, row in enumerate(rows):
        axis.barh(y - 0.18, 100 * row["before"], 0.32, color="#bcd3e6", label="before" if y == 0 else None)
        axis.barh(y + 0.18, 100 * row["after"], 0.32, color="#0072B2", xerr=100 * row["after_half"],
                  error_kw={"capsize": 2, "linewidth": 1}, label="after, with its 95% interval" if y == 0 else None)
        if row["aim"]:
            side, least = AIMS[row["rung"], row["what"]]
            aim = 100 * (least + (row["before"] if side == "gain" else 0))
            axis.plot([aim, aim], [y - 0.4, y + 0.4], color="#D55E00", linewidth=2, label="aim" if y == 0 else None)
    axis.set_yticks(range(len(rows)), [f"{row['rung']}: {row['what']}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel(f"percent, mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main(argv=None):
    args = parse_args(LadderArgs, argv)
    if args.overwrite:
        shutil.rmtree(Path(args.save_dir) / "results", ignore_errors=True)
    write_world("mini", ROOT / "dataset" / "toy_mini")
    bench = Bench(args, make_world("mini"))
    rows = []
    for rung in args.rungs:
        rows += table_rows(rung, [measured(bench, rung, seed) for seed in args.seeds])
    print(f"\n{format_rows(rows)}\n\nShares in percent; mean and 95% interval over {len(args.seeds)} seeds; from {bench.base}"
          .replace(f"{ROOT}/", ""))
    picture = Path(args.save_dir) / "ladder.png"
    draw(rows, picture, len(args.seeds))
    if compared := [name for name in args.rungs if name in RL_RUNGS and name != "agent"]:  # whose questions are others
        draw_curves(args.save_dir, compared, args.seeds, picture.with_name("rl_curves.png"))
    print(f"drawn in {picture.parent}".replace(f"{ROOT}/", ""))
    if args.json:
        write_json(args.json, {"from_weight": str(bench.base), "seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    command(main)
