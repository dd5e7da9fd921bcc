import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.costs import active_weights, copy_rate, matrix_rate, training_flops

SHAPE = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"num_experts": 4, "num_experts_per_tok": 4}])
def test_weights_are_those_of_the_network(changes):
    """With every expert visited, the active weights are all matrices of the network."""
    config = MiniMindConfig(**SHAPE, **changes)
    matrices = sum(x.numel() for x in MiniMindForCausalLM(config).parameters() if x.dim() >= 2)
    assert sum(active_weights(config)) == matrices


def test_flops_by_hand():
    config = MiniMindConfig(vocab_size=10, hidden_size=4, num_hidden_layers=1, intermediate_size=6, num_attention_heads=2,
                            num_key_value_heads=1)
    body = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    assert training_flops(config, 100, 30, 5) == 6 * (100 * body + 30 * 40) + 12 * 5 * 4


def test_rates_are_rates():
    assert 1e6 < matrix_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.01) < 1e15
    assert 1e6 < copy_rate(torch.device("cpu"), seconds=0.01) < 1e15
