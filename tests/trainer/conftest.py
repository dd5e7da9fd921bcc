"""A toy run small enough to train whole in a test."""

import json

import pytest

from tests.helpers.pair_rows import talk
from tests.helpers.runs import as_flags

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "device": "cpu"}


@pytest.fixture
def rows(tmp_path):
    """Paths of a pretraining and an SFT file of 60 short rows each."""
    texts = [{"text": f"{i} and {i + 1} make {2 * i + 1}. " * (1 + i % 4)} for i in range(60)]
    chats = [
        {"conversations": talk(f"What is {i} plus 1?", f"{i + 1}" * (1 + i % 5))} for i in range(60)
    ]
    paths = {"pretrain": tmp_path / "text.jsonl", "sft": tmp_path / "chat.jsonl"}
    for path, lines in zip(paths.values(), (texts, chats)):
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return paths


@pytest.fixture
def flags(rows, tmp_path):
    """flags(stage, **changes): a short run of the stage as a list of command-line arguments; None
    leaves a flag out.
    """

    def make(stage="pretrain", **changes):
        options = {
            "data_path": rows[stage],
            "save_dir": tmp_path / "out",
            "max_seq_len": 64,
            "batch_size": 2,
            "val_ratio": 0.1,
            "val_interval": 4,
            "save_interval": 4,
            "log_interval": 1,
            "max_steps": 8,
            "num_proc": 1,
            "cache_dir": tmp_path / "cache",
            **({"from_weight": "none"} if stage == "sft" else {}),
            **changes,
        }
        is_new = options.get("from_weight", "none") == "none"
        return as_flags({**(SHAPE if is_new else {"device": "cpu"}), **options})

    return make
