"""What every test shares: the project on the path, one thread, a fixed seed, and no reach outside
the machine.
"""

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

SLOW_FILES = {  # whole runs, several processes, servers: left out by -m "not slow"
    *("test_faults.py", "test_bad_steps.py", "test_no_room.py", "test_ranks.py"),
    *("test_deepspeed_engine.py", "test_recorded_numbers.py", "test_train_agent.py"),
    *(
        "test_train_dpo.py",
        "test_train_distillation.py",
        "test_train_grpo.py",
        "test_train_lora.py",
    ),
    *("test_train_ppo.py", "test_train_reason.py", "test_train_reward.py", "test_train_spo.py"),
    *("test_bench_stages.py", "test_bench_serving.py", "test_doctor.py", "test_chat_api.py"),
    *("test_evaluate_stages.py", "test_reinforcement_stages.py", "test_convert_model_merge.py"),
    *("test_serve_openai_api_lifecycle.py", "test_serve_openai_api_other_clients.py"),
    *("test_web_demo.py", "test_web_demo_browser.py", "test_remote_rollout.py"),
    *("test_prepare_data.py", "test_token_cache.py", "test_make_teacher_rows.py"),
    *("test_tutorial_commands.py",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow files."""
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    """Write the toy world once, before several workers would at the same time."""
    if not hasattr(config, "workerinput"):
        write_world("mini", ROOT / "dataset" / "toy_mini")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
