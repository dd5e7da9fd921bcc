"""What a run leaves behind besides its weights: metrics.jsonl, a curve, and a progress bar while it lasts."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

QUIET_SECONDS = 15  # without a terminal: a line at most this often


class RunRecord:
    """Writes `folder`/metrics.jsonl and arguments.json, and shows the progress. Use it in a `with`.

    first, targets: updates done and target tokens trained on before this process. Lines of a former attempt about
    later steps are dropped: they will be written again. resolved: what else arguments.json should say, such as the
    data's fingerprint.
    """

    def __init__(self, folder, args, first, targets, num_steps, **resolved):
        self.folder, self.num_steps, self.first = Path(folder), num_steps, first
        self.targets = self.targets_before = targets
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first] if first else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        write_json(self.folder / "arguments.json", {**asdict(args), "num_steps": num_steps, **resolved})
        self.start, self.spoken = time.perf_counter(), 0.0
        self.bar = tqdm(total=num_steps, initial=first, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def log(self, **numbers):
        """Append a line to metrics.jsonl; `step` is the number of updates done, `targets` the tokens learned from."""
        numbers |= {"targets": self.targets, "seconds": round(time.perf_counter() - self.start, 2)}
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")

    def advance(self, step, num_targets, loss, learning_rate):
        """Show that `step` updates are done, the last of them on `num_targets` target tokens."""
        self.targets += num_targets
        now = time.perf_counter()
        rate = (self.targets - self.targets_before) / (now - self.start)
        text = f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,.0f} target tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (now - self.spoken > QUIET_SECONDS or step == self.num_steps):
            self.spoken = now
            left = (now - self.start) / (step - self.first) * (self.num_steps - step)
            print(f"step {step}/{self.num_steps}, {text}, {left / 60:.1f} min left", flush=True)

    def say(self, text):
        """Print above the progress bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


def write_json(path, figures):
    """Write figures to a file, whose folder is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_metrics(path):
    """The rows of a metrics.jsonl, a half-written last line left out; [] if there is no file."""
    if not Path(path).is_file():
        return []
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def finish(folder, args):
    """Draw the curve of a run that is done, write its last figures to --json, and say where everything is."""
    plot_curve(folder)
    if args.json:
        last = {name: value for row in read_metrics(folder / "metrics.jsonl") for name, value in row.items()}
        write_json(args.json, {"folder": str(folder), **last})
    print(f"done: the weights, loss.png and metrics.jsonl are in {folder}")


def plot_curve(folder):
    """Draw loss and validation bits per byte of `folder`/metrics.jsonl against trained tokens, as loss.png there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(Path(folder) / "metrics.jsonl")
    figure, left = plt.subplots(figsize=(7, 4), dpi=110)
    train = [row for row in rows if "loss" in row]
    millions = [row["targets"] / 1e6 for row in train]
    left.plot(millions, [row["loss"] for row in train], color="0.6", linewidth=1, label="training loss")
    left.set_xlabel("target tokens (millions)")
    left.set_ylabel("training loss (nats per token)")
    right = left.twinx()
    names = sorted({name for row in rows for name in row if name.startswith("val_bpb")})
    for color, name in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], names):
        points = [(row["targets"] / 1e6, row[name]) for row in rows if name in row]
        right.plot(*zip(*points), marker="o", markersize=3, color=color, label=name)
    right.set_ylabel("validation (bits per byte)")
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles, [handle.get_label() for handle in handles])
    left.set_title(Path(folder).name)
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png")
    plt.close(figure)
