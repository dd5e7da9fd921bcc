"""The command line of a training run, its interruption, and its results for comparison."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trainer.runtime.metrics import read_metrics
from trainer.runtime.run import Run


def as_flags(options: dict[str, object]) -> list[str]:
    """Options as a command line; None leaves one out."""
    given = {name: value for name, value in options.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


class PowerCut(Exception):
    """Ends a run as if its process had died."""


def interrupt(stage: ModuleType, flags: list[str], step: int = 6) -> None:
    """Run the `main` of a stage's module until `step`, counted from 0, begins."""
    rate_at = stage.learning_rate_at

    def cut(now, *rest):
        if now == step:
            raise PowerCut
        return rate_at(now, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(stage, "learning_rate_at", cut)
        stage.main(flags)


def poison_losses(
    monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int, int], bool]
) -> SimpleNamespace:
    """Make losses nan where is_bad(step from 0, number of bad ones before); `step` of the result is
    the newest step.
    """
    now, seed, backward = SimpleNamespace(step=None, count=0), Run.seed, Run.backward

    def remember(run, step):
        now.step = step
        seed(run, step)

    def poisoned(run, loss):
        bad = is_bad(now.step, now.count)
        now.count += bad
        backward(run, loss * float("nan") if bad else loss)

    monkeypatch.setattr(Run, "seed", remember)
    monkeypatch.setattr(Run, "backward", poisoned)
    return now


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without those numbers that the clock and the machine decide."""
    clock = ("seconds", "tokens_per_second", "data_wait_ratio", "rollout_ratio", "peak_memory_gb")
    return [
        {name: x for name, x in row.items() if name not in clock}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_close_runs(a: Path, b: Path, num_steps: int) -> None:
    """Weights, losses, gradient norms and validation metrics within float error.

    Of some 20 updates: AdamW's first steps enlarge the rounding of gradients near 0.
    """
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs()
        assert difference.max() < 1e-4 and difference.mean() < 2e-7, name
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (a, b)]
    assert rows[0][-1]["step"] == num_steps
    compared = {"loss", "val_loss/held_out", "val_bpb/held_out", "targets", "grad_norm"}
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for name in compared & one.keys():
            tolerance = 5e-4 if name == "grad_norm" else 2e-5
            assert one[name] == pytest.approx(other[name], rel=tolerance), name
        for name in (name for name in one if name.startswith("expert_load/")):
            # a token or two between two experts
            assert one[name] == pytest.approx(other[name], abs=0.005), name


def assert_same(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], exactly: bool = True
) -> None:
    """The same names and numbers; else within float error."""
    tolerance = dict(rtol=0, atol=0) if exactly else dict(rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(a, b, **tolerance)
