"""Checkpoint folders of networks that a test builds, with the repository's tokenizer."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "model")


def random_network(seed: int, **shape: float) -> MiniMindForCausalLM:
    """A tiny network of random weights; shape: fields of MiniMindConfig to change."""
    torch.manual_seed(seed)
    tiny = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    return MiniMindForCausalLM(MiniMindConfig(**{**tiny, **shape}))


def write_checkpoint(folder: Path, model: MiniMindForCausalLM) -> Path:
    """The folder, with the network and the tokenizer in it."""
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder
