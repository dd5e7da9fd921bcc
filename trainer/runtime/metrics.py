"""The metrics of a run on disk, metrics.jsonl, and the curve drawn from them."""

import json
from pathlib import Path
from typing import Any

from model.files import replace_file

RESUME = ", and resume with --from_resume"
VALIDATION = {
    "val_bpb": "validation (bits per byte)",
    "val_rewards/accuracies": "held-out pairs classified rightly",
    "val_rewards/margins": "margin of the held-out rewards",  # kto without pairs
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a half-written last line; [] if there is no file."""
    if not Path(path).is_file():
        return []
    rows = []
    # bytes: a text may hold other characters that end a line for Python
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of a .jsonl about later steps than `step`, and all from a damaged one on.

    Returns the other rows. Step 0 keeps none: what was logged before the first step comes again.
    """
    rows = read_metrics(path) if step else []
    lines = path.read_bytes().split(b"\n") if rows else []
    kept = [(line, row) for line, row in zip(lines, rows) if row["step"] <= step]
    text = b"".join(line + b"\n" for line, _ in kept)
    # never in place: a kill here must not lose the others
    replace_file(path, lambda new: new.write_bytes(text), RESUME)
    return [row for _, row in kept]


def plot_curve(folder: str | Path) -> None:
    """Draw loss and validation of `folder`/metrics.jsonl against trained tokens, as loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(Path(folder) / "metrics.jsonl")
    figure, left = plt.subplots(figsize=(7, 4), dpi=110)
    train = [row for row in rows if row.get("loss") is not None]  # a non-finite loss is null
    millions, losses = [row["targets"] / 1e6 for row in train], [row["loss"] for row in train]
    left.plot(millions, losses, color="0.6", linewidth=1, label="training loss")
    left.set_xlabel("target tokens (millions)")
    logged = {name for row in rows for name in row}
    kind = next((x for x in VALIDATION if any(name.startswith(x) for name in logged)), "val_bpb")
    left.set_ylabel("training loss (nats per token)" if kind == "val_bpb" else "training loss")
    right = left.twinx()
    names = sorted(name for name in logged if name.startswith(kind))
    for color, name in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], names):
        points = [(row["targets"] / 1e6, row[name]) for row in rows if name in row]
        right.plot(*zip(*points), marker="o", markersize=3, color=color, label=name)
    right.set_ylabel(VALIDATION[kind])
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles, [handle.get_label() for handle in handles])
    left.set_title(Path(folder).name)
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png")
    plt.close(figure)
