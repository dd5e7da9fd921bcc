"""Preference pairs, and a network to start from, small enough to train on whole in a test."""

import json
from pathlib import Path

from dataset.packing import pack
from dataset.pair_dataset import PairDataset
from tests.helpers.checkpoints import load_tokenizer, random_network, write_checkpoint
from tests.helpers.runs import as_flags


def talk(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_pairs(path: Path, count: int = 60) -> Path:
    """Pairs of which the polite answer is chosen, of different lengths."""
    rows = [
        {
            "chosen": talk(f"What is {i} plus 1?", f"Gladly! {i + 1}" + "." * (i % 4)),
            "rejected": talk(f"What is {i} plus 1?", f"{i + 1 + i % 2}" * (1 + 4 * (i % 3))),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_start(folder: Path, seed: int = 1, **shape: float) -> Path:
    """A checkpoint folder of a random network whose completions differ in probability."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    shape = dict(num_hidden_layers=2, initializer_range=0.1, qk_norm=True) | heads | shape
    return write_checkpoint(folder, random_network(seed, **shape))


def pair_flags(folder: Path, start: Path, **changes: object) -> list[str]:
    """A short run on `folder`/pairs.jsonl as a list of command-line arguments; None leaves a flag
    out.
    """
    options = {
        "data_path": folder / "pairs.jsonl",
        "from_weight": start,
        "save_dir": folder / "out",
        "max_seq_len": 96,
        "batch_size": 2,
        "val_ratio": 0.1,
        "val_interval": 4,
        "save_interval": 4,
        "log_interval": 1,
        "max_steps": 8,
        "epochs": 9,
        "num_proc": 1,
        "cache_dir": folder / "cache",
        "device": "cpu",
        "learning_rate": 3e-3,
        **changes,
    }
    return as_flags(options)


def last_step_rows(folder: Path, rows_per_step: int) -> int:
    """How many packed rows the last step of an epoch on `folder`/pairs.jsonl has, with the flags of
    `pair_flags`.
    """
    dataset = PairDataset(
        folder / "pairs.jsonl", load_tokenizer(), 96, cache_dir=folder / "counted", num_proc=1
    )
    return len(pack(dataset.lengths, 96, seed=42, epoch=0)) % rows_per_step
