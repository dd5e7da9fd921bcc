"""The guard against losses and gradients that are not finite, and the rows of bad steps."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from dataset.packing import collate
from tests.helpers.toy_runs import ToyTokenizer, toy_run
from trainer.runtime import guard as guard_module
from trainer.runtime.guard import NonFiniteGuard, fix_for_bad_steps, write_bad_rows
from trainer.runtime.run import Update

BAD = Update(math.nan, math.inf, False)


def test_only_bad_steps_in_a_row_count():
    guard = NonFiniteGuard(3)
    for is_finite, in_a_row in ((False, 1), (False, 2), (True, 0), (False, 1), (False, 2)):
        guard.count(is_finite)
        assert guard.in_a_row == in_a_row and not guard.is_exhausted
    guard.count(False)
    assert guard.is_exhausted


def test_going_back_halves_the_rate_once_and_counts_anew():
    guard = NonFiniteGuard(1)
    assert (guard.learning_rate_factor, guard.went_back) == (1.0, False)
    guard.count(False)
    for _ in range(2):
        guard.go_back()
        assert (guard.learning_rate_factor, guard.went_back, guard.in_a_row) == (0.5, True, 0)


def test_the_state_survives_a_resumption_under_the_name_that_older_runs_wrote():
    guard = NonFiniteGuard(5)
    guard.go_back()
    guard.count(False)
    state = json.loads(json.dumps(guard.state_dict()))
    assert state == {"in_a_row": 1, "went_back": True, "learning_rate_share": 0.5}
    other = NonFiniteGuard(2)
    other.load_state_dict(state)
    assert other.state_dict() == state and other.learning_rate_factor == 0.5
    assert other.max_bad_steps == 2  # a flag of the new process


@pytest.mark.parametrize(
    "dtype, fix",
    [
        ("float32", "Look at them, or lower --learning_rate"),
        ("bfloat16", "Look at them, lower --learning_rate, or use --dtype float32"),
    ],
)
def test_the_fix_names_flags_that_help(dtype, fix, tmp_path):
    assert fix_for_bad_steps(toy_run(tmp_path / "toy", dtype=dtype)) == fix


# --- the rows of a bad step ---


def sequence(*ids, targets=True):
    ids = torch.tensor(ids).numpy()
    return {"input_ids": ids, "labels": ids if targets else ids * 0 - 100}


MICRO_BATCHES = [
    collate([[sequence(5, 6, 7), sequence(8, 9)], [sequence(1, 2, targets=False)]], 8, 2, 0),
    collate([[sequence(3, 4)]], 8, 1, 0),
]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_every_trained_document_is_a_line(tmp_path):
    """Padding and documents without targets are none."""
    run = toy_run(tmp_path / "toy")
    path = write_bad_rows(run, ToyTokenizer(), MICRO_BATCHES, "step-4", BAD)
    assert path == tmp_path / "toy" / "bad_steps" / "step-4-rank-0.jsonl"
    numbers = {"loss": "nan", "grad_norm": "inf"}
    assert read(path) == [
        {"micro_batch": 0, **numbers, "text": "5 6 7"},
        {"micro_batch": 0, **numbers, "text": "8 9"},
        {"micro_batch": 1, **numbers, "text": "3 4"},
    ]


def test_each_rank_writes_its_own_file(tmp_path):
    run = toy_run(tmp_path / "toy")
    for run.ranks.rank in (0, 1):
        run.ranks.world_size = 2
        path = write_bad_rows(run, ToyTokenizer(), MICRO_BATCHES, "step-4", BAD)
    names = sorted(path.name for path in path.parent.iterdir())
    assert names == ["step-4-rank-0.jsonl", "step-4-rank-1.jsonl"]
    assert path.name == "step-4-rank-*.jsonl"


def test_a_rank_keeps_its_newest_files(tmp_path, monkeypatch):
    """By their time: the names of a run that went back have an order of their own."""
    monkeypatch.setattr(guard_module, "KEPT", 2)
    run = toy_run(tmp_path / "toy")
    folder = tmp_path / "toy" / "bad_steps"
    folder.mkdir(parents=True)
    (folder / "step-1-rank-1.jsonl").touch()  # of another rank
    for age, name in enumerate(("step-9", "step-10", "step-9-again")):
        path = write_bad_rows(run, ToyTokenizer(), MICRO_BATCHES, name, BAD)
        os.utime(path, (age, age))
    write_bad_rows(run, ToyTokenizer(), MICRO_BATCHES, "step-10-again", BAD)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"step-{x}-rank-{y}.jsonl" for x, y in (("9-again", 0), ("10-again", 0), (1, 1))
    }


def test_a_full_disk_is_named_with_the_fix(tmp_path, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    message = r"could not write .*step-4-rank-0.jsonl \(No space left .*--from_resume"
    with pytest.raises(OSError, match=message):
        write_bad_rows(toy_run(tmp_path / "toy"), ToyTokenizer(), MICRO_BATCHES, "step-4", BAD)
