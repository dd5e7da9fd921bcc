"""Around the steps: the order of logging, validating and saving; going back; the ways to end.

The network, the checkpoint and the updates are stand-ins: a fault here is one of the loop.
"""

import json
import math
import re
import signal

import pytest
import torch

from tests.helpers.toy_runs import ToyBatches, ToyTokenizer, toy_network, toy_optimizer, toy_run
from trainer.runtime import loop as loop_module
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.loop import Loop
from trainer.runtime.metrics import read_metrics
from trainer.runtime.record import RunRecord
from trainer.runtime.run import Update

GOOD, BAD = Update(2.0, 0.5, True), Update(2.0, math.inf, False)


class FakeCheckpoint:
    """Saves and restores nothing but the numbers."""

    arithmetic = "float32 on cpu"

    def __init__(self, events, found):
        self.events, self.found = events, found
        self.saved_step, self.failure = None, None

    def restore(self):
        if self.found:
            self.saved_step = self.found[0]
        return self.found or (0, 0, None)

    def save(self, step, targets, guard_state):
        self.events.append(("save", step))
        self.saved_step, self.found = step, (step, targets, dict(guard_state))

    def join(self) -> None:
        """Nothing is ever being written."""

    def wait(self):
        self.events.append(("wait",))

    def raise_failure(self):
        if self.failure:
            raise self.failure


class Training:
    """A run of `num_steps` steps: `loop`, and `events`, what happened in it in which order.

    found: (updates, targets, the guard's state) of the checkpoint to resume from.
    """

    def __init__(self, folder, monkeypatch, num_steps, found=None, **options):
        self.events, self.folder = [], folder / "toy"
        evaluates = options.pop("evaluates", True)
        evaluate_first = options.pop("evaluate_first", False)
        monkeypatch.setattr(
            loop_module, "Checkpoint", lambda run, state: FakeCheckpoint(self.events, found)
        )
        monkeypatch.setattr(loop_module, "plot_curve", lambda _: self.events.append(("plot",)))
        log = RunRecord.log
        monkeypatch.setattr(
            RunRecord,
            "log",
            lambda record, step, metrics, load: (
                self.events.append(("log", step, *metrics)) or log(record, step, metrics, load)
            ),
        )
        self.run = toy_run(self.folder, learning_rate=1.0, **options)
        self.model = toy_network()
        self.optimizer = toy_optimizer(self.model)
        state = TrainState(self.model, ToyTokenizer(), self.optimizer, "the data")
        evaluate = self.evaluate if evaluates else None
        self.loop = Loop(self.run, state, ToyBatches(num_steps), evaluate, evaluate_first)

    def evaluate(self, index):
        self.events.append(("validate", index))
        return {"val_bpb/toy": 1.5}, f"sample {index}"

    def steps(self, update=lambda step, factor: GOOD, then=lambda step: None):
        """Take all steps, each with the Update that `update(step, learning_rate_factor)` gives."""
        seen = []
        with self.run:
            for step, micro_batches in self.loop:
                seen.append(step)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.loop.learning_rate_factor
                then(step)
                now = update(step, self.loop.learning_rate_factor)
                self.loop.log(now, micro_batches, 8, loss=now.loss, entropy=0.1)
        return seen

    def rows(self):
        return read_metrics(self.folder / "metrics.jsonl")


@pytest.fixture
def training(tmp_path, monkeypatch):
    """training(num_steps, found, **flags) -> Training."""
    made = []

    def make(num_steps, found=None, **options):
        made.append(Training(tmp_path, monkeypatch, num_steps, found, **options))
        return made[-1]

    yield make
    for one in made:
        one.run.contexts.close()  # the handlers of signals, if it took no step


LINE = ("loss", "learning_rate", "grad_norm", "entropy")


# --- the order ---


def test_a_step_logs_then_validates_then_saves_when_due(training):
    run = training(7, log_interval=2, val_interval=3, save_interval=3)
    assert run.steps() == list(range(7))
    assert run.events == [
        ("log", 2, *LINE),
        ("validate", 1),
        ("log", 3, "val_bpb/toy"),
        ("save", 3),
        ("log", 4, *LINE),
        ("log", 6, *LINE),
        ("validate", 2),
        ("log", 6, "val_bpb/toy"),
        ("save", 6),
        ("log", 7, *LINE),  # the last step, whatever the intervals say
        ("validate", 2),
        ("log", 7, "val_bpb/toy"),
        ("save", 7),
        ("wait",),
        ("plot",),
    ]
    assert [row["targets"] for row in run.rows()] == [16, 24, 32, 48, 48, 56, 56]


def test_nothing_is_validated_where_nothing_is_held_out(training):
    run = training(2, log_interval=1, evaluates=False)
    run.steps()
    assert [event[0] for event in run.events] == ["log", "log", "save", "wait", "plot"]


def test_a_validation_may_have_nothing_to_say(training, monkeypatch):
    run = training(1)
    monkeypatch.setattr(run.loop, "evaluate", lambda index: ({}, ""))
    run.steps()
    assert [event[0] for event in run.events] == ["log", "save", "wait", "plot"]


def test_a_validation_before_the_first_step_on_demand(training, capsys):
    run = training(1, evaluate_first=True)
    run.steps()
    assert run.events[:2] == [("validate", 0), ("log", 0, "val_bpb/toy")]
    assert "sample 0" in capsys.readouterr().out
    resumed = training(2, found=(1, 8, None), evaluate_first=True)
    resumed.steps()
    assert resumed.events[0] == ("log", 2, *LINE)


def test_the_plan_is_printed(training, capsys):
    run = training(3)
    plan = f"{run.folder}: 0.0M parameters, 3 steps on cpu in float32, toy batches; a step needs"
    assert plan in capsys.readouterr().out
    run.model.lm_head.requires_grad_(False)
    run.loop.print_plan()
    assert re.search(r" [\d,]+ of [\d,]+ parameters are trained, 3 st", capsys.readouterr().out)


def test_the_arguments_file_says_what_was_decided(training):
    run = training(3)
    written = json.loads((run.folder / "arguments.json").read_text())
    assert (written["data_fingerprint"], written["num_steps"]) == ("the data", 3)
    assert written["arithmetic"] == "float32 on cpu" and written["shape"]["hidden_size"] == 16


def test_the_last_metrics_are_written_where_json_says(training, tmp_path, capsys):
    run = training(2, json=str(tmp_path / "last.json"))
    run.steps()
    written = json.loads((tmp_path / "last.json").read_text())
    assert written["folder"] == str(run.folder) and written["val_bpb/toy"] == 1.5
    assert (written["step"], written["loss"]) == (2, 2.0)
    assert f"done: the weights, loss.png and metrics.jsonl are in {run.folder}" in (
        capsys.readouterr().out
    )


def test_another_rank_than_the_first_draws_and_says_nothing(training, capsys):
    run = training(1, evaluates=False)
    run.run.ranks.is_main_process = False
    run.steps()
    assert run.events[-1] == ("wait",) and "done" not in capsys.readouterr().out


def test_a_save_that_failed_meanwhile_ends_the_run_at_the_next_step(training):
    run = training(5, save_interval=1)

    def fail_in_2(step):
        if step == 2:
            run.loop.checkpoint.failure = OSError("could not save step 2")

    with pytest.raises(OSError, match="could not save step 2"):
        run.steps(then=fail_in_2)
    assert ("save", 3) not in run.events


# --- resuming ---


def test_a_resumed_run_continues_with_the_steps_the_targets_and_the_rate(training):
    guard = {"in_a_row": 0, "went_back": True, "learning_rate_share": 0.5}
    run = training(6, found=(4, 32, guard), log_interval=1)
    factors = []
    assert run.steps(lambda step, factor: factors.append(factor) or GOOD) == [4, 5]
    assert [row["targets"] for row in run.rows() if "loss" in row] == [40, 48]
    assert factors == [0.5, 0.5] and run.run.saved_step == 6


def test_a_finished_run_takes_no_step(training):
    run = training(3, found=(3, 24, None))
    assert run.steps() == [] and run.events == [("wait",), ("plot",)]


def test_each_step_draws_the_same_numbers_in_a_resumed_run(training):
    draws = {}
    training(4).steps(then=lambda step: draws.__setitem__(step, torch.rand(1).item()))
    again = {}
    training(4, found=(2, 16, None)).steps(
        then=lambda step: again.__setitem__(step, torch.rand(1).item())
    )
    assert again == {step: draws[step] for step in (2, 3)} and len(set(draws.values())) == 4


# --- steps that are not finite ---


def test_after_some_bad_steps_the_run_goes_back_once_with_half_the_rate(training, capsys):
    run = training(8, log_interval=1, save_interval=3, max_bad_steps=2)
    seen = run.steps(lambda step, factor: BAD if step in (4, 5) and factor == 1 else GOOD)
    assert seen == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    rows = [row for row in run.rows() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["targets"] for row in rows] == list(range(8, 72, 8))
    assert [row["learning_rate"] for row in rows] == [1.0] * 3 + [0.5] * 5
    out = capsys.readouterr().out
    assert "step 5: loss 2.0, gradient norm inf: not applied; its rows are in" in out
    assert "2 steps in a row were not finite: back to step 3, with half the learning rate" in out
    names = sorted(path.name for path in (run.folder / "bad_steps").iterdir())
    assert names == ["step-5-rank-0.jsonl", "step-6-rank-0.jsonl"]


def test_bad_steps_after_going_back_end_the_run(training):
    run = training(8, save_interval=3, max_bad_steps=2)
    with pytest.raises(FloatingPointError) as error:
        run.steps(lambda step, factor: BAD if step >= 3 else GOOD)
    message = "2 steps in a row had a loss or gradient that is not finite, with half the learning"
    assert message in str(error.value) and "the checkpoints are from before" in str(error.value)
    names = sorted(path.name for path in (run.folder / "bad_steps").iterdir())
    assert names == [f"step-{x}-rank-0.jsonl" for x in ("4-again", "4", "5-again", "5")]
    assert [event for event in run.events if event[0] == "save"] == [("save", 3)]


def test_bad_steps_before_any_checkpoint_end_the_run(training):
    run = training(8, max_bad_steps=3)
    with pytest.raises(
        FloatingPointError, match=r"3 steps .* there is no checkpoint to go back to"
    ):
        run.steps(lambda step, factor: BAD)
    assert run.events == []


def test_a_bad_step_is_logged_and_counted_but_the_checkpoint_before_it_stays(training):
    run = training(5, log_interval=1, save_interval=1, max_bad_steps=3)
    assert run.steps(lambda step, factor: BAD if step in (1, 2) else GOOD) == [0, 1, 2, 3, 4]
    assert [event[1] for event in run.events if event[0] == "save"] == [1, 4, 5]
    assert [row["grad_norm"] for row in run.rows() if "loss" in row] == [0.5, None, None, 0.5, 0.5]


def test_a_run_that_ends_in_bad_steps_warns_of_older_weights(training, capsys):
    run = training(5, save_interval=2)
    run.steps(lambda step, factor: BAD if step == 4 else GOOD)
    out = capsys.readouterr().out
    assert "warning: the last 1 steps had a loss or gradient that is not finite" in out
    assert "before them, step 4" in out
    run = training(5, save_interval=9)
    with pytest.raises(FloatingPointError, match=r"last 2 steps .* nothing was saved before them"):
        run.steps(lambda step, factor: BAD if step >= 3 else GOOD)


# --- several updates in a step ---


def test_a_step_of_several_updates_is_one_line_with_the_last_norm(training):
    run = training(2, log_interval=1)
    with run.run:
        for _, micro_batches in run.loop:
            for norm in (0.1, 0.2):
                assert run.loop.check(Update(1.0, norm, True), micro_batches)
            run.loop.advance(micro_batches, 16, loss=1.0, approx_kl=0.3)
    rows = [row for row in run.rows() if "loss" in row]
    assert [(row["step"], row["grad_norm"], row["targets"]) for row in rows] == [
        (1, 0.2, 16),
        (2, 0.2, 32),
    ]
    assert rows[0]["approx_kl"] == 0.3


def test_an_update_that_is_not_finite_within_a_step_counts_as_any_other(training):
    """The run goes back from the middle of a step, which is not counted."""
    run = training(4, log_interval=1, save_interval=1, max_bad_steps=2)
    seen = []
    with run.run:
        for step, micro_batches in run.loop:
            seen.append(step)
            is_bad = step == 2 and run.loop.learning_rate_factor == 1
            updates = [GOOD, BAD, BAD, GOOD] if is_bad else [GOOD]
            if all(run.loop.check(update, micro_batches) for update in updates):
                run.loop.advance(micro_batches, 8, loss=1.0)
    assert seen == [0, 1, 2, 2, 3]
    assert [row["step"] for row in run.rows() if "loss" in row] == [1, 2, 3, 4]
    names = sorted(path.name for path in (run.folder / "bad_steps").iterdir())
    assert names == ["step-3-update-2-rank-0.jsonl", "step-3-update-3-rank-0.jsonl"]


def test_a_step_without_an_update_has_a_norm_of_0(training):
    run = training(2, log_interval=1)
    with run.run:
        for step, micro_batches in run.loop:
            if step == 0:
                run.loop.check(GOOD, micro_batches)
            run.loop.advance(micro_batches, 8, loss=1.0)
    assert [row["grad_norm"] for row in run.rows() if "loss" in row] == [0.5, 0.0]


# --- signals ---


def stop_in(run, step, number=signal.SIGTERM):
    def stop(now):
        if now == step:
            run.run.signals.received = number

    return stop


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, status, training, capsys):
    handler = signal.getsignal(number)
    run = training(9, log_interval=100)
    with pytest.raises(SystemExit) as end:
        run.steps(then=stop_in(run, 2, number))
    assert end.value.code == status and run.events == [("save", 3), ("wait",)]
    message = f"stopped after step 3, which is saved in {run.folder}: resume with the same command"
    assert message in capsys.readouterr().out and signal.getsignal(number) is handler


def test_a_signal_in_the_last_step_changes_nothing(training, capsys):
    run = training(3)
    run.steps(then=stop_in(run, 2))
    assert run.events[-1] == ("plot",) and "stopped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "save_interval, message",
    [
        (2, "Step 2 is saved in {folder}: resume with the same command and --from_resume"),
        (100, "There is no checkpoint yet; their rows are in {folder}/bad_steps"),
    ],
)
def test_a_signal_within_bad_steps_saves_nothing(save_interval, message, training, capsys):
    run = training(9, save_interval=save_interval)
    with pytest.raises(SystemExit):
        run.steps(lambda step, factor: BAD if step >= 2 else GOOD, stop_in(run, 3))
    assert ("save", 4) not in run.events
    text = "stopped after step 4, the last 2 of them not finite: not saved. " + message
    assert text.format(folder=run.folder) in capsys.readouterr().out
