"""The numbers of a run in an experiment tracker: Weights & Biases, SwanLab or TensorBoard, also
without a network.

A run has one id, in `folder`/tracker.json, under which every process that continues it reports.
What the tracker lacks when a process starts is sent again from the run's own record, and what it
has is not: a crash loses no step and doubles none.

    Weights & Biases   online it knows its last step. Offline each process has a folder of its own
                       under `folder`/wandb, with the whole history, so that `wandb sync` of the
                       newest is enough. WANDB_MODE=offline chooses that.
    SwanLab            the same under `folder`/swanlog; SWANLAB_MODE=offline, `swanlab sync`.
    TensorBoard        `folder`/tensorboard/<id>: the curve is cut after the checkpoint and goes on
                       from there.
"""

import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.files import write_json
from trainer.runtime.metrics import read_metrics


class Tracker:
    """Passes on to the backend that `begin(first)` makes; use it in a `with`.

    Failures of a backend that has begun cost a warning and never the training. backend: None once
    it has failed or is closed, and if `begin` is None: then nothing is reported.
    """

    def __init__(self, begin: Callable[[int], Any] | None, folder: Path, first: int):
        self.begin, self.folder, self.backend = begin, folder, None
        if begin:
            self.start(first)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(failed=kind is not None)

    def start(self, first: int) -> None:
        self.backend = self.begin(first)
        for row in read_metrics(self.folder / "metrics.jsonl") if first else []:
            if row["step"] <= first:
                self.log(row, row["step"])

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Report {name: number} after `step` updates; what is not a finite number is left out."""
        numbers = {name: x for name, x in numbers.items() if name != "step" and is_number(x)}
        if self.backend and numbers and step >= self.backend.next_step:
            self.attempt(self.backend.log, numbers, step)

    def go_back(self, step: int) -> None:
        """Take back later steps than `step`, as far as it can: the run repeats them."""
        if self.backend:
            self.close()
            self.attempt(self.start, step)

    def close(self, failed: bool = False) -> None:
        """Send what is left, and say whether the run ended well."""
        backend, self.backend = self.backend, None
        if backend:
            self.attempt(backend.close, failed)

    def attempt(self, action: Callable, *given: Any) -> None:
        try:
            action(*given)
        except Exception as error:  # of a foreign library, over a network: anything
            print(
                f"warning: the tracker failed ({type(error).__name__}: {error}); training goes on "
                "without it, and metrics.jsonl has everything"
            )
            self.backend = None


class WandB:
    """Weights & Biases. Numbers of one step become one row, which its server does not replace."""

    def __init__(self, run_id: str, args: Any, folder: Path, config: dict, first: int):
        import wandb

        self.run = wandb.init(
            project=args.wandb_project,
            name=args.wandb_run_name or folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
            allow_val_change=True,
        )
        self.next_step = self.run.step  # online the first that it lacks, offline 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class SwanLab:
    """SwanLab, which itself leaves out the steps of a metric that it has."""

    def __init__(self, run_id: str, args: Any, folder: Path, config: dict, first: int):
        import swanlab

        self.next_step = 0
        self.run = swanlab.init(
            project=args.wandb_project,
            name=args.wandb_run_name or folder.name,
            id=run_id,
            resume="allow",
            log_dir=str(folder / "swanlog"),
            config=config,
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(state="crashed" if failed else "success")


class TensorBoard:
    """TensorBoard's event files, flushed after every step: a killed process leaves them whole."""

    def __init__(self, run_id: str, args: Any, folder: Path, config: dict, first: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = folder / "tensorboard" / run_id
        self.next_step = first + 1 if folder.is_dir() else 0
        self.writer = SummaryWriter(folder, purge_step=self.next_step or None)
        if not self.next_step:
            self.writer.add_text(
                "config",
                f"```\n{json.dumps(config, indent=1, ensure_ascii=False, default=str)}\n```",
            )

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


BACKENDS = {"wandb": WandB, "swanlab": SwanLab, "tensorboard": TensorBoard}
OFFLINE = {
    "wandb": ("`wandb login`", "WANDB_MODE=offline"),
    "swanlab": ("`swanlab login`", "SWANLAB_MODE=offline"),
}


def open_tracker(args: Any, folder: str | Path, config: dict, *, first: int) -> Tracker:
    """The Tracker of the run in `folder` that args.tracker names ("none": it does nothing).

    args: tracker, use_wandb (the same as tracker "wandb"), wandb_project, wandb_run_name ("": the
    folder's). config: what the tracker should show of the run, a dict. first: updates done before
    this process; 0 begins a new run in the tracker. What `folder`/metrics.jsonl has up to there is
    sent if the tracker lacks it; what the tracker has of later steps is replaced or left out.
    ImportError if the tracker's package is missing, ValueError if it cannot start.
    """
    kind, folder = "wandb" if args.use_wandb else args.tracker, Path(folder)
    if kind == "none":
        return Tracker(None, folder, first)
    try:
        return Tracker(
            lambda first: BACKENDS[kind](run_id(folder, first), args, folder, config, first),
            folder,
            first,
        )
    except ImportError:
        raise
    except Exception as error:  # of a foreign library: not logged in, no network, no disk
        login, offline = OFFLINE.get(kind, ("", ""))
        fix = f" Log in with {login}, or set {offline} to keep it on this machine." if login else ""
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"--tracker {kind} could not start: {reason}.{fix}") from error


def run_id(folder: Path, first: int) -> str:
    """The id in `folder`/tracker.json, new at a run's start: 21 of 0-9a-f, as all trackers take."""
    path = folder / "tracker.json"
    if not (first and path.is_file()):
        write_json(path, {"id": uuid.uuid4().hex[:21]})
    return tracker_id(folder)


def tracker_id(folder: Path) -> str | None:
    """The id in `folder`/tracker.json; None without such a file."""
    path = folder / "tracker.json"
    return json.loads(path.read_text(encoding="utf-8"))["id"] if path.is_file() else None


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
