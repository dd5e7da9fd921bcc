"""The command with its sub-commands, the table, and the arithmetic of ratios."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench
from scripts.benchmarks import timing
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import DeviceArgs
from tests.helpers.bench import read_table

ROOT = Path(__file__).resolve().parents[2]


def test_there_is_a_module_for_every_name_and_a_line_about_it():
    files = {path.stem for path in (ROOT / "scripts" / "benchmarks").glob("*.py")}
    assert set(bench.NAMES) <= files
    assert all(f"\n{name} " in bench.__doc__ for name in bench.NAMES)


def test_flags_are_read_without_heavy_imports():
    """--help must answer at once: what a benchmark measures is imported when it measures."""
    code = (
        "import sys; import trainer.runtime.arguments; before = set(sys.modules)\n"
        "from importlib import import_module; from scripts.bench import NAMES\n"
        "for name in NAMES: import_module(f'scripts.benchmarks.{name}')\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "numpy", "httpx", "tokenizers"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("name", bench.NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([name, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"python scripts/bench.py {name}" in printed
    assert "--json" in printed


@pytest.mark.parametrize("words", [[], ["trainings"], ["--steps", "3"]])
def test_an_unknown_name_lists_the_known_ones(words, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and "usage: " in printed


def test_the_old_scripts_are_the_sub_commands():
    for name in bench.NAMES:
        path = ROOT / "scripts" / f"bench_{name}.py"
        assert "run_as(__file__)" in path.read_text(encoding="utf-8")
    path = ROOT / "scripts" / "bench_training.py"
    words = [sys.executable, str(path), "--steps", "0"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 2 and "--steps 0: give more than 0" in done.stderr


def test_worker_processes_that_import_an_old_script_do_not_run_it(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "main", calls.append)
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--steps", "1"])
    for name in ("MainProcess", "SpawnProcess-1"):
        monkeypatch.setattr(multiprocessing.current_process(), "name", name)
        bench.run_as("scripts/bench_training.py")
    assert calls == [["training", "--steps", "1"]]


def test_a_table(capsys, tmp_path):
    results = Results("name speed ratio_range count missing")
    results.note("before", threads=2)
    for name, speed in (("a", 1234.5), ("a long name", 2.5)):
        row = {"name": name, "speed": speed, "ratio_range": [0.5, 2.0], "count": 4096}
        results.add(row | {"missing": None, "hidden": 1})
    results.note("after")
    printed = capsys.readouterr().out
    assert printed.startswith("before\n| name ") and printed.endswith("|\n\nafter\n")
    assert len({len(line) for line in printed.splitlines() if line.startswith("|")}) == 1
    rest = {"ratio range": "0.500 to 2.00", "count": "4,096", "missing": "-"}
    first, second = read_table(printed)
    assert first == {"name": "a", "speed": "1,234", **rest}
    assert second == {"name": "a long name", "speed": "2.50", **rest}
    results.write(str(tmp_path / "a.json"), "decoding", BenchArgs())
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert written["benchmark"] == "decoding" and written["threads"] == 2
    assert written["arguments"] == {"json": ""} and written["rows"] == results.rows


def test_sides_take_turns():
    seen = []
    sides = {name: lambda number, name=name: seen.append(name) or number for name in "ab"}
    assert timing.take_turns(sides, 3) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert seen == ["a", "b"] * 3


def test_ratios():
    """Of the medians, or of the sums; the range is that of the rounds, each with its own pair."""
    theirs, ours = [2.0, 9.0, 4.0], [1.0, 3.0, 4.0]
    assert timing.compare(theirs, ours) == {"ratio": 4 / 3, "ratio_range": [1.0, 3.0]}
    assert timing.compare(theirs, ours, average=sum)["ratio"] == 15 / 8
    speeds = timing.speeds("tokens", 12, {"ours": ours, "reference": theirs})
    assert speeds["tokens_per_s"] == 4 and speeds["reference_tokens_per_s"] == 3
    assert speeds["ratio"] == speeds["tokens_per_s"] / speeds["reference_tokens_per_s"]
    with pytest.raises(ValueError):
        timing.compare([1.0], [1.0, 2.0])


def test_a_call_is_timed(capsys):
    seconds, result = timing.timed(lambda: "done", torch.device("cpu"))
    assert seconds > 0 and result == "done"
    results = Results("")
    device, dtype = timing.open_device(DeviceArgs(device="cpu"), results)
    assert (device.type, dtype) == ("cpu", torch.float32)
    assert results.facts["dtype"] == "float32" and results.facts["threads"] > 0
    assert capsys.readouterr().out.startswith("cpu in float32, ")
