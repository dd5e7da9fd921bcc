"""The load test: a short one against a server that runs, and what it does with faults."""

import asyncio

import pytest

from scripts import bench
from scripts.benchmarks.serving import Args, Round
from tests.helpers.bench import read_table, run_bench


def test_rounds_are_measured(server, tmp_path, capsys):
    words = f"serving --url {server.url} --model chat --seconds 0.5 --max_tokens 8 --questions 3"
    found = run_bench(tmp_path, f"{words} --clients 1 4")
    first, second = found["rows"]
    assert (first["clients"], second["clients"], first["ratio"]) == (1, 4, 1)
    assert second["ratio"] == second["tokens_per_s"] / first["tokens_per_s"]
    for row in found["rows"]:
        assert row["finished"] > 0 and row["tokens_per_s"] > 0
        for name in ("left", "different", "failed", "running", "waiting"):
            assert row[name] == 0
        assert row["first_p50_ms"] <= row["first_p95_ms"]
    assert found["exit_status"] == 0 and found["before"]["running"] == 0
    assert len(read_table(capsys.readouterr().out)) == 2
    (row,) = run_bench(tmp_path, f"{words} --clients 4 --hang_up")["rows"]
    assert row["left"] > 0 and row["finished"] > 0 and row["running"] == 0 and row["different"] == 0


def test_errors_are_counted(server):
    played = Round(server.url, Args(model="nothing", seconds=0.1), [])
    metrics = asyncio.run(played.play(2))
    assert played.failed and "404" in played.failed[0] and metrics["failed"] == len(played.failed)
    assert metrics["tokens_per_s"] == 0 and metrics["first_p50_ms"] is None


@pytest.mark.parametrize(
    "written, message",
    [
        ("--clients 0", "--clients 0"),
        ("--url http://x --weight y", "runs already"),
        ("--model x", "--url"),
    ],
)
def test_flags_that_cannot_work(written, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(["serving", *written.split()])
    assert message in capsys.readouterr().err
