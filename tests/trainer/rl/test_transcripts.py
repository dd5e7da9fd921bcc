"""Transcripts: which samples are written, and which lines stay after an interruption."""

import json
from types import SimpleNamespace

import pytest

from trainer.rl.rollout import Sample
from trainer.rl.transcripts import Transcripts


@pytest.fixture
def run(tmp_path):
    args = SimpleNamespace(num_transcripts=3, log_interval=2)
    return SimpleNamespace(folder=tmp_path, args=args, ranks=SimpleNamespace(is_main_process=True))


def samples(*rewards):
    return [
        Sample({}, [1], [5], [True], [0.0], f"{reward}\u2028", item=i, rewards={"total": reward})
        for i, reward in enumerate(rewards)
    ]


def lines(run):
    path = run.folder / "transcripts.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def test_samples_from_the_worst_to_the_best_are_written_with_each_logged_step(run):
    transcripts = Transcripts(run, 0)
    for step in (1, 2, 3, 4):
        transcripts.write(step, samples(0.5, 0.25, 1.0, 0.0, 0.75))
    found = lines(run)
    assert [row["step"] for row in found] == [2, 2, 2, 4, 4, 4]
    assert [row["rewards"]["total"] for row in found[:3]] == [0, 0.5, 1]
    assert [row["item"] for row in found[:3]] == [3, 0, 2] and found[0]["text"] == "0.0\u2028"
    transcripts.write(6, samples(0.5))
    transcripts.write(8, [])
    assert [row["step"] for row in lines(run)[6:]] == [6]


def test_lines_of_later_steps_and_half_a_line_are_dropped(run):
    transcripts = Transcripts(run, 0)
    for step in (2, 4, 6):
        transcripts.write(step, samples(0.0, 0.5, 1.0))
    with open(run.folder / "transcripts.jsonl", "a") as file:
        file.write('{"step": 7, "te')
    Transcripts(run, 4)
    assert [row["step"] for row in lines(run)] == [2] * 3 + [4] * 3
    transcripts = Transcripts(run, 4)
    transcripts.write(6, samples(0.0))
    transcripts.write(4, samples(0.0))  # the run has gone back to its second step
    assert [row["step"] for row in lines(run)] == [2] * 3 + [4]


def test_all_from_a_damaged_line_on_is_dropped(run):
    transcripts = Transcripts(run, 0)
    for step in (2, 4):
        transcripts.write(step, samples(0.0))
    path = run.folder / "transcripts.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b'{"step": 4', b'{"st\xff": 4,\n') + b'{"step": 4}\n'
    )
    Transcripts(run, 4)
    assert [row["step"] for row in lines(run)] == [2]


def test_nothing_is_written_by_other_ranks_or_if_none_is_wanted(run):
    run.args.num_transcripts = 0
    Transcripts(run, 0).write(2, samples(1.0))
    run.args.num_transcripts, run.ranks.is_main_process = 3, False
    Transcripts(run, 0).write(2, samples(1.0))
    assert not list(run.folder.iterdir())
