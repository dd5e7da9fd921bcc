"""What a run leaves behind besides its weights: metrics.jsonl, a curve, and a progress bar while it lasts."""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from trainer.checkpoint import flush
from trainer.costs import peak_flops, step_work, training_flops
from trainer.guard import cure
from trainer.metrics import plot_curve, read_metrics, write_json, writing
from trainer.tracker import open_tracker

try:
    import resource
except ImportError:  # Windows
    resource = None

GO_ON = ", and go on with --from_resume"
QUIET_SECONDS = 15  # without a terminal: a line at most this often


class RunRecord:
    """Writes `folder`/metrics.jsonl and arguments.json, reports to the tracker, shows the progress. Use it in a `with`.

    first, targets: updates done and target tokens trained on before this process. Lines of a former attempt about
    later steps are dropped: they will be written again. resolved: what else arguments.json should say, such as the
    data's fingerprint. Only rank 0 writes and speaks.
    """

    def __init__(self, folder, args, run, model, steps, first, targets, num_steps, **resolved):
        self.folder, self.num_steps, self.first, self.targets = Path(folder), num_steps, first, targets
        self.run, self.model, self.steps = run, model, steps
        self.speaks = run.ranks.is_first
        self.peak = peak_flops(run.device, run.dtype)
        self.path = self.folder / "metrics.jsonl"
        self.seconds_before, self.start, self.spoken = 0.0, time.perf_counter(), 0.0
        if self.speaks:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self.keep_lines(first)
            self.seconds_before = kept[-1]["seconds"] if kept else 0.0
            config = {**asdict(args), "num_steps": num_steps, **resolved}
            write_json(self.folder / "arguments.json", config)
            self.tracker = open_tracker(args, self.folder, config, first=first)
        self.bar = tqdm(total=num_steps, initial=first, unit="step", disable=not (self.speaks and sys.stderr.isatty()),
                        dynamic_ncols=True)
        self.targets_before = targets
        self.begin_window()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        if self.speaks:
            self.tracker.close(failed=kind is not None)

    def keep_lines(self, step):
        """Drop the lines of metrics.jsonl about later steps than `step`; returns those that stay."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if step else []
        new = self.path.with_name(f".{self.path.name}.new")  # beside it: who is killed here must not lose what is there
        with writing(self.path, GO_ON):
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            flush(new)
            os.replace(new, self.path)
        return kept

    def begin_window(self):
        """Forget the steps so far: the speed of a line is that of the steps since the line before."""
        self.since, self.window = time.perf_counter(), {"targets": 0.0, "flops": 0.0, "waited": self.steps.seconds_waited}

    def advance(self, step, num_targets, micro_batches, loss, learning_rate):
        """Show that `step` updates are done, the last of them on `num_targets` target tokens of all ranks."""
        self.targets += int(num_targets)
        self.window["targets"] += num_targets
        is_frozen = not all(x.requires_grad for x in self.model.parameters())
        self.window["flops"] += training_flops(self.model.config, *step_work(micro_batches), is_frozen)
        if not self.speaks:
            return
        now = time.perf_counter()
        rate = (self.targets - self.targets_before) / (now - self.start)
        text = f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,.0f} target tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (now - self.spoken > QUIET_SECONDS or step == self.num_steps):
            self.spoken = now
            left = (now - self.start) / (step - self.first) * (self.num_steps - step)
            print(f"step {step}/{self.num_steps}, {text}, {left / 60:.1f} min left", flush=True)

    def log(self, step, **numbers):
        """Append a line to metrics.jsonl and report it: `numbers`, the targets so far, and the speed since the last line."""
        numbers = {"step": step, **numbers, "targets": self.targets}
        now = time.perf_counter()
        if self.window["targets"]:
            numbers |= self.speed(now - self.since) | expert_load(self.model, self.run.ranks)
        if self.speaks:
            numbers["seconds"] = round(self.seconds_before + now - self.start, 2)
            finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}  # JSON has no nan
            self.append(finite)
            self.tracker.log(finite, step)
        self.begin_window()

    def append(self, numbers):
        """A line of metrics.jsonl."""
        with writing(self.path, GO_ON), open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")

    def speed(self, seconds):
        """Target tokens per second, share of the GPU's peak, share of the time spent waiting for data, peak memory (GB)."""
        device = self.run.device
        figures = {"tokens_per_second": round(self.window["targets"] / seconds, 1),
                   "data_wait_share": round((self.steps.seconds_waited - self.window["waited"]) / seconds, 4)}
        if self.peak:
            figures["mfu"] = round(self.window["flops"] / seconds / self.peak, 4)
        if device.type == "cuda":
            figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        elif resource:
            unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
            figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
        return figures

    def go_back(self, step, targets):
        """Take back what was said about later steps than `step`: the run repeats them."""
        self.targets = targets
        if self.speaks:
            self.keep_lines(step)
            self.tracker.go_back(step)
            self.bar.n = step
        self.begin_window()

    def say(self, text):
        """Print above the progress bar."""
        if self.speaks:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()


def expert_load(model, ranks):
    """{"expert_load/e": share of the tokens that expert e got, "expert_load/max": the largest in a layer}; {} if dense.

    Of the forwards of all ranks since the last call; all ranks call together.
    """
    counts = [module.tokens_per_expert for module in model.modules() if hasattr(module, "tokens_per_expert")]
    if not counts:
        return {}
    shares = ranks.sum_tensor(torch.stack(counts).double())
    shares /= shares.sum(-1, keepdim=True).clamp(min=1)  # layers, experts
    for count in counts:
        count.zero_()
    return {**{f"expert_load/{e}": round(x, 4) for e, x in enumerate(shares.mean(0).tolist())},
            "expert_load/max": round(shares.max().item(), 4)}


def finish(folder, args, run):
    """Draw the curve of a run that is done, write its last figures to --json, and say where everything is.

    FloatingPointError if it ended in a series of bad steps before anything was saved.
    """
    bad = run.guard.in_a_row
    if bad and not run.saved:
        raise FloatingPointError(f"the last {bad} steps had a loss or gradient that is not finite, and nothing was saved before "
                                 f"them. Their rows are in {folder / 'bad_steps'}. {cure(run)}")
    if not run.ranks.is_first:
        return
    if bad:
        print(f"warning: the last {bad} steps had a loss or gradient that is not finite: the weights are those of the checkpoint "
              f"before them, step {run.saved}. Their rows are in {folder / 'bad_steps'}. {cure(run)}")
    plot_curve(folder)
    if args.json:
        last = {name: value for row in read_metrics(folder / "metrics.jsonl") for name, value in row.items()}
        write_json(args.json, {"folder": str(folder), **last})
    print(f"done: the weights, loss.png and metrics.jsonl are in {folder}")
