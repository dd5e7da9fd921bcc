"""Whole runs whose losses are not finite: they learn nothing from them, go back once, or stop."""

import pytest
import torch

from tests.helpers.runs import poison_losses
from trainer import train_pretrain
from trainer.runtime.metrics import read_metrics

NAME = "pretrain_32x2"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / NAME


def steps(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_bad_step_is_not_applied_and_its_rows_are_written(flags, folder, monkeypatch, capsys):
    poison_losses(monkeypatch, lambda step, count: step == 5)
    train_pretrain.main(flags(max_steps=8))
    rows = steps(folder)
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[5]["grad_norm"] is None
    assert all(row["grad_norm"] for row in rows[:5] + rows[6:])
    assert "make" in (folder / "bad_steps" / "step-6-rank-0.jsonl").read_text()
    # the number that metrics.jsonl has too
    assert "step 6: loss 8." in capsys.readouterr().out
    state = torch.load(folder / "checkpoints" / "step-8" / "training_state.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == 7  # updates that were applied


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_after_some_bad_steps_in_a_row_the_run_goes_back_once_with_a_lower_rate(
    dtype, flags, folder, monkeypatch, capsys
):
    poison_losses(monkeypatch, lambda step, count: step in (5, 6, 7) and count < 3)
    options = dict(max_steps=12, epochs=3, max_bad_steps=3, dtype=dtype)
    options |= dict(schedule="wsd", decay_ratio=0, warmup_ratio=0)
    if dtype == "float16":  # no room below: no overflow that the scaler can mend
        monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1.0)
    train_pretrain.main(flags(**options))
    assert "back to step 4, with half the learning rate" in capsys.readouterr().out
    assert [row["step"] for row in steps(folder)] == list(range(1, 13))
    assert [row["learning_rate"] for row in steps(folder)] == [2e-3] * 4 + [1e-3] * 8


@pytest.mark.slow
def test_a_run_that_stays_bad_stops_and_keeps_the_good_checkpoint(flags, folder, monkeypatch):
    poison_losses(monkeypatch, lambda step, count: step >= 5)
    message = r"2 steps in a row .*half the learning rate too.*bad_steps.*--learning_rate"
    with pytest.raises(FloatingPointError, match=message) as error:
        train_pretrain.main(flags(max_steps=12, epochs=3, max_bad_steps=2))
    assert "float32" not in str(error.value)  # which it is
    bad = ("6-again", "6", "7-again", "7")
    assert names(folder / "bad_steps") == [f"step-{x}-rank-0.jsonl" for x in bad]
    assert names(folder / "checkpoints") == ["step-4"]


def test_a_run_that_begins_bad_has_no_checkpoint_to_go_back_to(flags, folder, monkeypatch):
    poison_losses(monkeypatch, lambda step, count: True)
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        train_pretrain.main(flags(max_steps=12, epochs=3, max_bad_steps=2))
    assert len(names(folder / "bad_steps")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "save_interval, kept, message",
    [
        (4, ["step-4"], "not saved. Step 4 is saved in {}: resume with the same command"),
        (100, [], "not saved. There is no checkpoint yet; their rows are in"),
    ],
)
def test_a_stop_within_bad_steps_keeps_the_good_checkpoint(
    save_interval, kept, message, flags, folder, monkeypatch, capsys
):
    """Also the only one that is kept; the run is told to stop after its seventh step, of which two
    were bad.
    """
    now = poison_losses(monkeypatch, lambda step, count: step >= 5)
    monkeypatch.setattr(train_pretrain.Run, "stop_asked", lambda run: now.step == 6)
    with pytest.raises(SystemExit) as end:
        train_pretrain.main(flags(max_steps=12, epochs=3, save_interval=save_interval, keep=1))
    out = capsys.readouterr().out
    assert end.value.code == 143 and message.format(folder) in out
    assert "stopped after step 7, the last 2 of them not finite" in out
    assert [path.name for path in folder.glob("checkpoints/*")] == kept


@pytest.mark.slow
def test_a_run_that_ends_within_bad_steps_keeps_the_good_checkpoint(
    flags, folder, monkeypatch, capsys
):
    poison_losses(monkeypatch, lambda step, count: step >= 7)
    train_pretrain.main(flags(max_steps=9, epochs=3, keep=1))
    out = capsys.readouterr().out
    assert "warning: the last 2 steps had" in out and "before them, step 4;" in out
    assert names(folder / "checkpoints") == ["step-4"]
    saved = folder / "checkpoints" / "step-4" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == saved.read_bytes()
    message = r"the last 2 steps had .* nothing was saved before them.*bad_steps"
    with pytest.raises(FloatingPointError, match=message):
        train_pretrain.main([*flags(max_steps=9, epochs=3, save_interval=100), "--overwrite"])
