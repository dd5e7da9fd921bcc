"""Curves of several runs in one picture, from their metrics.jsonl.

    python scripts/plot_runs.py out/pretrain_tiny            # training loss against tokens
    python scripts/plot_runs.py out/pretrain_a out/pretrain_b \\
        --y loss val_bpb/held_out --x time --out curves.png
    python scripts/plot_runs.py out/pretrain_a out/pretrain_b \\
        --y tokens_per_second --x steps --smooth 0.9 --json curves.json

A metric has a panel; a run has one colour, dash and marker in all of them, so that runs stay apart
in print and for colour-blind readers. --smooth averages exponentially, 0.9 over about ten points,
and leaves the raw curve behind it, pale; validation (val_...), which is an average already and has
few points, is drawn as it is. Time is the training time of all processes that worked on a run,
without the pauses between them. The metrics of older versions are known by their new names.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.files import write_json
from trainer.runtime.arguments import arg, command, parse_args
from trainer.runtime.metrics import read_metrics

AXES = {
    "tokens": "target tokens (millions)",
    "time": "training time (minutes)",
    "steps": "optimizer steps",
}
# names of metrics in older runs
RENAMED = {
    "data_wait_share": "data_wait_ratio",
    "rollout_share": "rollout_ratio",
    "kl/update": "approx_kl",
    "kl/reference": "kl",
    "kl/last_update": "approx_kl/last_update",
    "clip_share": "clip_fraction",
    "degenerate_share": "frac_reward_zero_std",
    "complete_share": "completions/finished_ratio",
    "length/mean": "completions/mean_length",
    "length/max": "completions/max_length",
    "critic/explained_variance": "explained_variance",
    "critic/loss": "value_loss",
    "critic/value": "value/mean",
}
# colours that the colour-blind can distinguish (Okabe & Ito 2008), without yellow; the first ones
# differ in grey too
COLORS = ["#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS = "osD^vP*X"
UNITS = {
    "loss": "nats per token",
    "val_loss": "nats per token",
    "val_bpb": "bits per byte",
    "mfu": "fraction of the peak",
    "tokens_per_second": "target tokens/s",
    "data_wait_ratio": "fraction of the time",
}


@dataclass
class PlotArgs:
    runs: list[str] = arg([], "folders of runs; may also stand first, without the flag", nargs="+")
    x: str = arg("tokens", "the horizontal axis", choices=list(AXES))
    y: list[str] = arg(["loss"], "metrics to draw, a panel each", nargs="+")
    out: str = arg("curves.png", "where to write the picture")
    smooth: float = arg(0.0, "exponential average: weight of the points before, 0 to below 1")
    log_y: bool = arg(False, "logarithmic scale of the values")
    json: str = arg("", "write the curves to this file too")

    def check(self) -> None:
        self.y = [RENAMED.get(name, name) for name in self.y]
        if not self.runs:
            raise ValueError("name the folder of at least one run, such as out/pretrain_tiny")
        if not 0 <= self.smooth < 1:
            raise ValueError(f"--smooth {self.smooth}: give 0 (none) or more, below 1")


def read_run(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl under today's names, with "minutes" of training added."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no metrics.jsonl. Runs are in "
            "--save_dir, by default out/"
        )
    rows = [{RENAMED.get(name, name): x for name, x in row.items()} for row in read_metrics(path)]
    if not rows:
        raise ValueError(
            f"{path} has no whole line yet: the run writes one every --log_interval steps"
        )
    before = last = 0.0
    for row in rows:
        seconds = row.get("seconds", last)
        before += last if seconds < last else 0.0  # a new process, whose clock began at 0
        last = seconds
        row["minutes"] = (before + seconds) / 60
    return rows


def curve(
    rows: list[dict[str, Any]], metric: str, axis: str, folder: str | Path
) -> tuple[list[float], list[float]]:
    """(xs, ys) of a metric where it was logged; ValueError that names the metrics there are."""
    points = [row for row in rows if isinstance(row.get(metric), (int, float))]
    if not points:
        names = {name for row in rows for name, x in row.items() if isinstance(x, (int, float))}
        others = sorted(names - {"step", "targets", "seconds", "minutes"})
        raise ValueError(f"{folder} has no {metric}; it has {', '.join(others)}")
    xs = {
        "tokens": [row.get("targets", 0) / 1e6 for row in points],
        "time": [row["minutes"] for row in points],
        "steps": [row["step"] for row in points],
    }
    return xs[axis], [row[metric] for row in points]


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential average of the values up to each; the first ones are not drawn towards 0."""
    if not weight:
        return values
    average, found = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight**count))
    return found


def labels(folders: Sequence[str | Path]) -> list[str]:
    """A short name for each run: its folder's, or more of the path where that is not enough."""
    paths = [Path(folder).resolve() for folder in folders]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    return [str(path.relative_to(commonpath(paths))) for path in paths]


def draw(curves: list[dict[str, Any]], names: list[str], args: PlotArgs) -> None:
    """Draw `curves` [{run, metric, x, y, drawn}], a panel per metric, the runs' names above."""
    from matplotlib.figure import Figure

    columns = 1 if max(map(len, names)) > 40 else min(len(names), 3)
    legend_height = 0.25 * -(-len(names) // columns)
    height = 0.5 + legend_height + (4.2 if len(args.y) == 1 else 3 * len(args.y))
    figure = Figure(figsize=(8, height), dpi=140, layout="constrained")
    panels = figure.subplots(len(args.y), 1, sharex=True, squeeze=False)[:, 0]
    for panel, metric in zip(panels, args.y):
        for line in (line for line in curves if line["metric"] == metric):
            i, count = names.index(line["run"]), len(line["x"])
            style = dict(color=COLORS[i % len(COLORS)], zorder=3 + i)
            if line["drawn"] != line["y"]:
                panel.plot(line["x"], line["y"], **style, linewidth=0.8, alpha=0.25)
            style |= dict(linewidth=1.6, linestyle=DASHES[i % len(DASHES)], label=line["run"])
            style |= dict(marker=MARKERS[i % len(MARKERS)], markersize=5.5)
            style |= dict(markeredgecolor="white", markeredgewidth=0.6)
            every = max(1, count // 10) if count > 1 else None
            panel.plot(line["x"], line["drawn"], **style, markevery=every)
        unit = UNITS.get(metric.split("/")[0])
        panel.set_ylabel(f"{metric}\n({unit})" if unit else metric)
        if args.log_y:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")  # 10, not 10^1
            panel.yaxis.set_minor_formatter("{x:g}")
        panel.grid(color="0.9", linewidth=0.6, which="both" if args.log_y else "major")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(AXES[args.x])
    entries = panels[0].get_legend_handles_labels()
    place = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    figure.legend(*entries, **place, handlelength=4)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(PlotArgs, argv if not argv or argv[0].startswith("-") else ["--runs", *argv])
    folders, metrics = list(dict.fromkeys(args.runs)), list(dict.fromkeys(args.y))  # each once
    args.y, names, curves = metrics, labels(folders), []
    for folder, name in zip(folders, names):
        rows = read_run(folder)
        for metric in metrics:
            xs, ys = curve(rows, metric, args.x, folder)
            if args.log_y and min(ys) <= 0:
                raise ValueError(
                    f"--log_y: {metric} of {folder} is not always above 0; leave the flag out"
                )
            drawn = ys if metric.startswith("val_") else smoothed(ys, args.smooth)
            curves.append({"run": name, "metric": metric, "x": xs, "y": ys, "drawn": drawn})
    draw(curves, names, args)
    table = [("run", "metric", "points", "first", "lowest", "highest", "last")]
    for line in curves:
        ys = line["y"]
        numbers = (f"{x:.5g}" for x in (ys[0], min(ys), max(ys), ys[-1]))
        table.append((line["run"], line["metric"], len(ys), *numbers))
    width = max(len(run) for run, *_ in table)
    for run, metric, points, *numbers in table:
        print(f"{run:<{width}} {metric:<22} {points:>6}", *(f"{x:>10}" for x in numbers))
    print(f"drawn in {args.out}")
    if args.json:
        write_json(args.json, {"x": AXES[args.x], "smooth": args.smooth, "curves": curves})


if __name__ == "__main__":
    command(main)
