"""Waiting threads give their core away, unless the user has said how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_the_rounds_that_a_waiting_thread_spins(given, spins):
    own = {name: x for name, x in os.environ.items() if name not in ("GOMP_SPINCOUNT", *given)}
    code = "import os, eval_llm; print(os.environ.get('GOMP_SPINCOUNT'))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**own, **given}, capture_output=True, text=True
    )
    assert out.stdout.strip() == spins
