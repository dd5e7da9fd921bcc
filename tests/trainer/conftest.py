"""A toy run small enough to train whole in a test."""

import json

import pytest

SHAPE = ["--hidden_size", "32", "--num_hidden_layers", "2", "--device", "cpu"]


@pytest.fixture
def rows(tmp_path):
    """Paths of a pretraining and an SFT file of 60 short rows each."""
    text, chat = tmp_path / "text.jsonl", tmp_path / "chat.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and {i + 1} make {2 * i + 1}. " * (1 + i % 4)}) + "\n" for i in range(60)))
    chat.write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": f"What is {i} plus 1?"}, {"role": "assistant", "content": f"{i + 1}" * (1 + i % 5)}]}) + "\n"
        for i in range(60)))
    return {"pretrain": text, "sft": chat}


@pytest.fixture
def flags(rows, tmp_path):
    """flags(stage, **changes): a short run of the stage as a list of command-line arguments."""
    def make(stage="pretrain", **changes):
        options = {"data_path": rows[stage], "save_dir": tmp_path / "out", "max_seq_len": 64, "batch_size": 2, "val_share": 0.1,
                   "val_interval": 4, "save_interval": 4, "log_interval": 1, "max_steps": 8, "num_proc": 1,
                   "cache_dir": tmp_path / "cache", **changes}
        if stage == "sft":
            options.setdefault("from_weight", "none")
        shape = [] if options.get("from_weight", "none") != "none" else SHAPE
        return [*shape, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    return make

