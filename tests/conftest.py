"""What every test shares: the project on the path, one thread, a fixed seed, and no reach outside the machine."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"

import pytest
import torch

from dataset.toy_world import write_world

torch.set_num_threads(1)


def pytest_configure(config):
    """Write the toy world once, before several workers would at the same time."""
    if not hasattr(config, "workerinput"):
        write_world("mini", ROOT / "dataset" / "toy_mini")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
