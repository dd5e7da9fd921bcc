import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.model_minimind import PRESETS, MiniMindForCausalLM
from scripts import doctor
from scripts.benchmarks import steps
from scripts.checkpoint import ComputeArgs
from scripts.diagnosis import estimates, machine
from trainer.runtime import costs
from trainer.runtime.arguments import parse_args
from trainer.runtime.costs import Rates
from trainer.runtime.process import Compute

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Rows(list):
    lengths = np.full(60, 100)


@pytest.fixture
def small_world(monkeypatch):
    """No toy world, no tokens on disk: random sequences, short measurements."""

    def dataset(paths, tokenizer, max_seq_len):
        return Rows(
            {"input_ids": np.arange(100) + i, "labels": np.arange(100) + i} for i in range(60)
        )

    for module in (estimates, steps):
        monkeypatch.setattr(module, "write_world", lambda level, folder: None)
    monkeypatch.setattr(steps, "DATASETS", {"pretrain": dataset, "sft": dataset})
    monkeypatch.setattr(costs, "matrix_rate", lambda device, dtype, seconds: 1e11)
    monkeypatch.setattr(costs, "copy_rate", lambda device, seconds: 1e10)
    monkeypatch.setattr(estimates, "LENGTH", 128)
    monkeypatch.setattr(estimates, "ROWS", 2)


def test_command(small_world, tmp_path, capsys):
    out = tmp_path / "new" / "doctor.json"
    doctor.main(["--seconds", "0.1", "--tokens", "1000000", "--device", "cpu", "--json", str(out)])
    figures = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["preset"]: row for row in figures["presets"]}
    assert set(rows) == set(PRESETS)
    assert round(rows["minimind2"]["parameters"] / 1e6) == 104
    assert (
        rows["tiny"]["pretrain_hours"]
        < rows["minimind2-small"]["pretrain_hours"]
        < rows["minimind2"]["pretrain_hours"]
    )
    assert rows["tiny"]["pretrain_hours"] == pytest.approx(
        1e6 / rows["tiny"]["pretrain_tokens_per_s"] / 3600
    )
    assert "math" in figures["attention"] and figures["attention"]["math"] == ["causal", "masked"]
    printed = capsys.readouterr().out
    for word in (
        "Python",
        "torch",
        "free memory",
        "free disk",
        "pretrain 1M tokens",
        "SFT 50M tokens",
        "minimind-3-moe",
    ):
        assert word in printed


def test_missing_and_other_versions_are_named(monkeypatch):
    def version(name):
        if name == "tqdm":
            raise machine.metadata.PackageNotFoundError(name)
        return {"torch": "2.13.0+cpu", "numpy": "1.0"}.get(name, "0.0")

    monkeypatch.setattr(machine.metadata, "version", version)
    problems = []
    found = machine.packages(problems)
    assert found["torch"] == "2.13.0+cpu" and not any(
        problem.startswith("torch ") for problem in problems
    )
    assert any(
        problem.startswith("tqdm is missing: python -m pip install tqdm==") for problem in problems
    )
    assert any(problem.startswith("numpy 1.0 is not the pinned") for problem in problems)
    assert (
        sum(problem.startswith("transformers ") for problem in problems) == 1
    )  # the other Python's pin is not ours


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    problems = []
    assert machine.compiler(CPU, problems) == "incomplete"
    assert any(
        "no C++ compiler is found" in problem and "apt install g++" in problem
        for problem in problems
    )


def test_an_environment_without_packages():
    """The script itself, where nothing of requirements.txt can be imported."""
    code = (
        "import sys, runpy; sys.modules['torch'] = None; "
        "sys.argv = ['doctor.py']; "
        f"runpy.run_path({str(ROOT / 'scripts' / 'doctor.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "pip install -r requirements.txt" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_shape_of_a_preset():
    config, params = estimates.shape("tiny")
    assert params == MiniMindForCausalLM(config).num_parameters()


def test_estimate_by_hand():
    """Every constant enters once: with all other rates at infinity, the time is that part alone."""
    config, params = estimates.shape("tiny")
    step = dict(positions=1000, targets=500, pairs=9000)
    never = float("inf")
    flops = costs.training_flops(config, 1000, 500, 9000)
    assert Rates(1e9, never, never).seconds(config, params, CPU, **step) == pytest.approx(
        flops / 1e9
    )
    assert Rates(never, 1e9, never).seconds(config, params, CPU, **step) == pytest.approx(
        params * 40 / 1e9
    )
    assert Rates(never, never, never, 0.5).seconds(config, params, CPU, **step) == pytest.approx(
        2.0
    )
    moved = costs.elementwise_bytes(config, 1000, 500)
    assert Rates(never, never, 1e9).seconds(config, params, CPU, **step) == pytest.approx(
        moved / 1e9
    )
    both = Rates(1e9, never, never, 0.001)
    assert both.seconds(config, params, SimpleNamespace(type="cuda"), **step) == pytest.approx(
        flops / 1e9
    )


def test_calibration_gives_back_the_measured_steps(monkeypatch):
    """The estimate of tiny, at the sizes that were measured, is the measurement."""
    config, params = estimates.shape("tiny")
    sizes = {8: (4096, 4000, 90000), 1: (512, 500, 9000)}
    steps = {rows: (seconds, sizes[rows], 9) for rows, seconds in {8: 1.5, 1: 0.3}.items()}
    monkeypatch.setattr(
        estimates, "measure_steps", lambda settings, dataset, seconds: steps[settings.batch_size]
    )
    rates = estimates.calibrate(None, CPU, {"matrix": 1e11, "copy": 1e10}, 1.0)
    assert rates.seconds(config, params, CPU, *sizes[8]) == pytest.approx(1.5)
    assert rates.seconds(config, params, CPU, *sizes[1]) == pytest.approx(0.3)


def test_quick_start_is_timed_by_its_own_plan(small_world, monkeypatch):
    """Seconds of a step times the steps of all epochs, at the plan's preset, optimizer and batch
    size.
    """
    plan = {
        "level": "mini",
        "preset": "tiny",
        "pretrain": ["--optimizer", "muon", "--batch_size", "3"],
        "sft": ["--learning_rate", "2e-3", "--batch_size", "2", "--epochs", "2"],
    }
    monkeypatch.setattr(estimates.quickstart, "CPU", plan)
    seen, measure = [], estimates.measure_steps

    def spy(settings, dataset, seconds):
        seen.append(settings)
        return 0.5, *measure(settings, dataset, seconds)[1:]

    monkeypatch.setattr(estimates, "measure_steps", spy)
    assert estimates.quick_start(0.01) == {
        "pretrain": 4 * 0.5,
        "sft": 2 * 6 * 0.5,
    }  # 60 rows of 100 are 12 packed ones
    assert [(s.preset, s.optimizer, s.batch_size, s.epochs) for s in seen] == [
        ("tiny", "muon", 3, 1),
        ("tiny", "adamw", 2, 2),
    ]


def test_the_plan_of_the_quick_start_can_be_read():
    """Flags that the stages do not know, or values out of range, would end the program."""
    for stage, kind in (("pretrain", estimates.PretrainArgs), ("sft", estimates.SFTArgs)):
        assert parse_args(kind, estimates.quickstart.CPU[stage]).batch_size > 0


def test_what_does_not_fit():
    rates, run = Rates(1e11, 1e10, 1e10), Compute(ComputeArgs("cpu"))
    rows = [
        estimates.estimate("minimind2", rates, {"pretrain": 1}, run, free)
        for free in (2**30, 2**40, None)
    ]
    assert [row["fits"] for row in rows] == [False, True, None]


def test_durations():
    assert [estimates.duration(hours) for hours in (0.05, 0.5, 3, 100)] == [
        "3.0 min",
        "30 min",
        "3.0 h",
        "4 days",
    ]


def test_errors(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--seconds", "0"])
    assert "--seconds 0.0: give more than 0" in capsys.readouterr().err
