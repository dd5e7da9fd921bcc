"""The load test: a short one against a server that runs, and what it does with faults."""

import json

import pytest

from scripts import bench_serving


def test_rounds_are_measured(server, tmp_path, capsys):
    flags = ["--url", server.url, "--model", "chat", "--seconds", "0.5", "--max_tokens", "8", "--questions", "3"]
    bench_serving.main([*flags, "--clients", "1", "4", "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["clients"] for row in rows] == [1, 4] and rows[0]["ratio"] == 1
    for row in rows:
        assert row["finished"] > 0 and row["left"] == row["different"] == row["failed"] == row["running"] == row["waiting"] == 0
        assert row["tokens_per_s"] > 0 and row["first_p50_ms"] <= row["first_p95_ms"]
    bench_serving.main([*flags, "--clients", "4", "--hang_up", "--json", str(tmp_path / "b.json")])
    row = json.loads((tmp_path / "b.json").read_text())["rows"][0]
    assert row["left"] > 0 and row["finished"] > 0 and row["running"] == 0 and row["different"] == 0
    capsys.readouterr()


def test_errors_are_counted(server):
    import asyncio

    args = bench_serving.parse_args(bench_serving.BenchArgs, ["--url", server.url, "--model", "nothing", "--seconds", "0.1"])
    seen, _ = asyncio.run(bench_serving.play(server.url, args, 2, []))
    assert seen.failed and "404" in seen.failed[0] and seen.tokens == 0


@pytest.mark.parametrize("written, message", [
    (["--clients", "0"], "--clients 0"), (["--url", "http://x", "--weight", "y"], "runs already"), (["--model", "x"], "--url")])
def test_flags_that_cannot_work(written, message, capsys):
    with pytest.raises(SystemExit):
        bench_serving.parse_args(bench_serving.BenchArgs, written)
    assert message in capsys.readouterr().err
