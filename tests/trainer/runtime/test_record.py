"""The record of a run: speeds, ratios, lines that are taken back."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.toy_runs import toy_run
from trainer.runtime import record as record_module
from trainer.runtime.metrics import read_metrics
from trainer.runtime.record import RunRecord
from trainer.runtime.tracker import open_tracker

FLOPS = 1500.0  # of a step


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(first, targets): a RunRecord and its clock, which moves only when told, on a device of
    1000 operations per second.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(record_module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(record_module, "peak_flops", lambda device, dtype: 1000.0)

    def make(first=0, targets=0, num_steps=10, **flags):
        run = toy_run(tmp_path, **flags)
        config = {**asdict(run.args), "num_steps": num_steps, "shape": "small"}
        tracker = open_tracker(run.args, run.folder, config, first=first)
        return RunRecord(run, first, targets, config, tracker), clock

    return make


def test_speed_and_ratios_are_of_the_steps_since_the_last_line(make, tmp_path):
    record, clock = make()
    with record:
        for step in (1, 2):
            clock.now += 5.0
            record.advance(step, 30, 2 * FLOPS, 1.0)
        record.log(2, {"loss": 2.0, "grad_norm": float("inf")}, {"expert_load/0": 0.5})
        clock.now += 100.0  # validation
        record.log(2, {"val_bpb/a": 1.0}, {"expert_load/0": 0.5})
        clock.now += 4.0
        record.advance(3, 30, FLOPS, 0.0)
        record.log(3, {"loss": 1.0, "grad_norm": 1.0}, {})
    first, validation, last = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["tokens_per_second"], first["data_wait_ratio"]) == (6.0, 0.2)
    assert first["mfu"] == 4 * FLOPS / 10 / 1000 and first["grad_norm"] is None
    assert first["expert_load/0"] == 0.5 and "expert_load/0" not in validation
    assert "mfu" not in validation and validation["seconds"] == 110.0
    assert last["mfu"] == FLOPS / 4 / 1000 and last["data_wait_ratio"] == 0.0
    assert (last["tokens_per_second"], last["targets"], last["seconds"]) == (7.5, 90, 114.0)
    assert 0.05 < last["peak_memory_gb"] < 30


def test_a_resumed_run_continues_the_lines_and_the_clock(make, tmp_path):
    write_lines(tmp_path / "metrics.jsonl")
    record, clock = make(first=2, targets=2)
    with record:
        clock.now += 1.0
        record.log(3, {"loss": 1.0}, {})
        record.log(4, {"loss": 1.0}, {})
        record.go_back(3, 2)
        record.log(4, {"loss": 0.5}, {})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["seconds"] == 21.0 and rows[3]["loss"] == 0.5


def test_a_new_run_drops_the_lines_of_the_one_before(make, tmp_path):
    write_lines(tmp_path / "metrics.jsonl")
    make()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_going_back_takes_the_targets_back(make, tmp_path):
    record, _ = make()
    with record:
        for step in (1, 2, 3):
            record.advance(step, 10, FLOPS, 0.0)
        record.go_back(1, 10)
        assert record.targets == 10 and record.window["targets"] == 0
        record.log(1, {"val_bpb/a": 1.0}, {})
    assert "tokens_per_second" not in read_metrics(tmp_path / "metrics.jsonl")[-1]


def test_the_arguments_are_written_with_what_the_run_decided(make, tmp_path):
    make(learning_rate=0.25)
    written = json.loads((tmp_path / "arguments.json").read_text())
    assert (written["learning_rate"], written["num_steps"], written["shape"]) == (0.25, 10, "small")


def test_without_a_terminal_a_line_is_printed_now_and_then(make, capsys):
    record, clock = make(first=2, targets=100, num_steps=6)
    with record:
        for step, now in ((3, 20.0), (4, 30.0), (5, 40.0), (6, 50.0)):
            clock.now = now
            record.advance(step, 50, FLOPS, 0.0)
            record.show(step, 2.5, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 3/6", "step 5/6", "step 6/6"]
    # 50 tokens in 20 seconds; one step took 20 seconds, three are left
    rest = "loss 2.500, lr 1.0e-03, 2 target tokens/s, 1.0 min left"
    assert lines[0] == f"step 3/6, {rest}"


def test_only_rank_0_writes_and_prints(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    record, clock = make()
    with record:
        clock.now += 1.0
        record.advance(1, 10, FLOPS, 0.0)
        record.show(1, 1.0, 1.0)
        record.log(1, {"loss": 1.0}, {})
        record.print0("text")
        record.go_back(0, 0)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def write_lines(path):
    rows = ({"step": n, "targets": n, "seconds": 10.0 * n} for n in (1, 2, 3))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_process_that_is_killed_while_it_takes_lines_back_loses_none(make, tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_lines(path)
    write_bytes = Path.write_bytes

    def killed(path, content):
        write_bytes(path, content[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        make(first=2, targets=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    make(first=2, targets=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".metrics")]
