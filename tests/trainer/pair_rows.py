"""Preference pairs, and a network to start from, small enough to train on whole in a test."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dataset.packing import pack
from dataset.pair_dataset import PairDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_pairs(path, count=60):
    """Pairs of which the polite answer is chosen, of different lengths."""
    rows = [{"chosen": talk(f"What is {i} plus 1?", f"Gladly! {i + 1}" + "." * (i % 4)),
             "rejected": talk(f"What is {i} plus 1?", f"{i + 1 + i % 2}" * (1 + 4 * (i % 3)))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_start(folder, seed=1, **shape):
    """A checkpoint folder of a random network whose answers differ in probability."""
    torch.manual_seed(seed)
    config = MiniMindConfig(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            intermediate_size=64, initializer_range=0.1, **{"qk_norm": True, **shape})
    MiniMindForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "model").save_pretrained(folder)
    return folder


def pair_flags(folder, start, **changes):
    """A short run on `folder`/pairs.jsonl as a list of command-line arguments; None leaves a flag out."""
    options = {"data_path": folder / "pairs.jsonl", "from_weight": start, "save_dir": folder / "out", "max_seq_len": 96,
               "batch_size": 2, "val_share": 0.1, "val_interval": 4, "save_interval": 4, "log_interval": 1, "max_steps": 8,
               "epochs": 9, "num_proc": 1, "cache_dir": folder / "cache", "device": "cpu", "learning_rate": 3e-3, **changes}
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]


def last_step_rows(folder, rows_per_step):
    """How many packed rows the last step of an epoch on `folder`/pairs.jsonl has, with the flags of `pair_flags`."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    dataset = PairDataset(folder / "pairs.jsonl", tokenizer, 96, cache_dir=folder / "counted", num_proc=1)
    return len(pack(dataset.lengths, 96, seed=42, epoch=0)) % rows_per_step
