"""The record of a run: metrics.jsonl, arguments.json, the tracker, and a progress bar."""

import json
import math
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from model.files import write_json, writing
from trainer.runtime.costs import peak_flops
from trainer.runtime.metrics import RESUME, keep_lines
from trainer.runtime.run import Run
from trainer.runtime.tracker import Tracker

try:
    import resource
except ImportError:  # Windows
    resource = None

QUIET_SECONDS = 15  # without a terminal: a line at most this often


class RunRecord:
    """Writes metrics.jsonl and arguments.json in the run's folder, reports, shows the progress.

    first, targets: updates done and target tokens trained on before this process. Lines of a former
    attempt about later steps are dropped: they will be written again. config: of arguments.json.
    Only rank 0 writes and prints, and has a tracker. Use it in a `with`.
    """

    def __init__(
        self, run: Run, first: int, targets: int, config: dict[str, Any], tracker: Tracker | None
    ):
        self.first, self.targets, self.num_steps = first, targets, config["num_steps"]
        self.tracker = tracker
        self.device, self.is_main_process = run.device, run.ranks.is_main_process
        self.peak = peak_flops(run.device, run.dtype)
        self.path = run.folder / "metrics.jsonl"
        self.seconds_before, self.start, self.printed = 0.0, time.perf_counter(), 0.0
        if self.is_main_process:
            run.folder.mkdir(parents=True, exist_ok=True)
            kept = keep_lines(self.path, first)
            self.seconds_before = kept[-1]["seconds"] if kept else 0.0
            write_json(run.folder / "arguments.json", config)
        self.bar = tqdm(
            total=self.num_steps,
            initial=first,
            unit="step",
            disable=not (self.is_main_process and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.targets_before = targets
        self.begin_window()

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.bar.close()
        if self.is_main_process:
            self.tracker.close(failed=kind is not None)

    def begin_window(self) -> None:
        """Forget the steps so far: the speed of a line is that of the steps since the last line."""
        self.since = time.perf_counter()
        self.window = {"targets": 0.0, "flops": 0.0, "waited": 0.0}

    def advance(self, step: int, num_targets: float, flops: float, waited: float) -> None:
        """Count a step: its target tokens over all ranks, operations, seconds waited for data."""
        self.targets += int(num_targets)
        for name, value in (("targets", num_targets), ("flops", flops), ("waited", waited)):
            self.window[name] += value

    def show(self, step: int, loss: float, learning_rate: float) -> None:
        """Show that `step` updates are done."""
        if not self.is_main_process:
            return
        now = time.perf_counter()
        rate = (self.targets - self.targets_before) / (now - self.start)
        text = f"loss {loss:.3f}, lr {learning_rate:.1e}, {rate:,.0f} target tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        is_due = now - self.printed > QUIET_SECONDS or step == self.num_steps
        if self.bar.disable and is_due:
            self.printed = now
            left = (now - self.start) / (step - self.first) * (self.num_steps - step)
            print(f"step {step}/{self.num_steps}, {text}, {left / 60:.1f} min left", flush=True)

    def log(self, step: int, metrics: dict[str, float], expert_load: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and report it: metrics, targets so far, the speed."""
        row = {"step": step, **metrics, "targets": self.targets}
        now = time.perf_counter()
        if self.window["targets"]:
            row |= self.speed(now - self.since) | expert_load
        if self.is_main_process:
            row["seconds"] = round(self.seconds_before + now - self.start, 2)
            finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
            with writing(self.path, RESUME), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")  # JSON has no nan
            self.tracker.log(finite, step)
        self.begin_window()

    def speed(self, seconds: float) -> dict[str, float]:
        """Target tokens per second, fraction of the GPU's peak (MFU), fraction of the time spent
        waiting for data, peak memory (GB).
        """
        metrics = {
            "tokens_per_second": round(self.window["targets"] / seconds, 1),
            "data_wait_ratio": round(self.window["waited"] / seconds, 4),
        }
        if self.peak:
            metrics["mfu"] = round(self.window["flops"] / seconds / self.peak, 4)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            metrics["peak_memory_gb"] = round(peak / 1e9, 3)
        elif resource:
            unit = 1 if sys.platform == "darwin" else 1024  # the system's unit
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            metrics["peak_memory_gb"] = round(peak / 1e9, 3)
        return metrics

    def go_back(self, step: int, targets: int) -> None:
        """Take back everything about later steps than `step`: the run repeats them."""
        self.targets = targets
        if self.is_main_process:
            keep_lines(self.path, step)
            self.tracker.go_back(step)
            self.bar.n = step
        self.begin_window()

    def print0(self, text: str) -> None:
        """Print above the progress bar."""
        if self.is_main_process:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()
