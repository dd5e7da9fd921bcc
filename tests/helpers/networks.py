"""Small networks of every standard architecture, and their references in transformers."""

from pathlib import Path

import torch
from transformers import (
    GraniteMoeSharedForCausalLM,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.checkpoints import random_network, write_checkpoint

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)

SHAPES = {
    "llama": SMALL,
    "qwen3": {**SMALL, "qk_norm": True, "head_dim": 12},
    "qwen3_moe": {**SMALL, "qk_norm": True, "num_experts": 4, "num_experts_per_tok": 1},
    "qwen3_moe_top2": {
        **SMALL,
        "qk_norm": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "granitemoeshared": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
}

REFERENCES = {
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "qwen3_moe_top2": Qwen3MoeForCausalLM,
    "granitemoeshared": GraniteMoeSharedForCausalLM,
}


def build(kind: str, **overrides: object) -> MiniMindForCausalLM:
    """A network of one of the SHAPES, in which every parameter matters."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPES[kind], **overrides}))
    with torch.no_grad():  # norms away from 1, so that a forgotten one shows
        for name, x in model.named_parameters():
            x.copy_(1 + 0.3 * torch.randn_like(x) if "norm" in name else 0.2 * torch.randn_like(x))
    return model


def token_ids(B: int = 2, T: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids, [B, T]."""
    return torch.randint(1, 97, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def write_network(folder: Path, seed: int, **shape: float) -> Path:
    """A checkpoint folder of random weights, large enough for probabilities that differ."""
    shape = {"qk_norm": True, "initializer_range": 0.2, **shape}
    return write_checkpoint(folder, random_network(seed, **shape))
