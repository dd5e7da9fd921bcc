"""The operations of a step by hand and by the network's weights; the peaks of known GPUs."""

import pytest
import torch

from dataset.packing import collate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.networks import SMALL
from trainer.runtime.costs import (
    active_weights,
    copy_rate,
    matrix_rate,
    peak_flops,
    step_work,
    training_flops,
)


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True}, {"num_experts": 4, "num_experts_per_tok": 4}]
)
def test_weights_are_those_of_the_network(changes):
    """With every expert visited, the active weights are all matrices of the network."""
    config = MiniMindConfig(**SMALL, **changes)
    matrices = sum(x.numel() for x in MiniMindForCausalLM(config).parameters() if x.dim() >= 2)
    assert sum(active_weights(config)) == matrices


def test_flops_by_hand():
    config = MiniMindConfig(
        vocab_size=10,
        hidden_size=4,
        num_hidden_layers=1,
        intermediate_size=6,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    body = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    assert training_flops(config, 100, 30, 5) == 6 * (100 * body + 30 * 40) + 12 * 5 * 4
    assert (
        training_flops(config, 100, 30, 5, is_frozen=True)
        == 4 * (100 * body + 30 * 40) + 12 * 5 * 4
    )


def test_rates_are_rates():
    assert 1e6 < matrix_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.01) < 1e15
    assert 1e6 < copy_rate(torch.device("cpu"), seconds=0.01) < 1e15


@pytest.mark.parametrize(
    "name, half, single",
    [
        ("NVIDIA H100 80GB HBM3", 989, 494.5),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA GeForce RTX 3090", 71, 35.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88, 44),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L40S", 362, 181),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A10G", None, None),
        ("Tesla T4", None, 8.1),
    ],
)
def test_peak_goes_by_the_whole_name(monkeypatch, name, half, single):
    """A fragment of another card's name, or a laptop's slower namesake, must not lend its peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float32, single)):
        assert peak_flops(torch.device("cuda"), dtype) == (
            None if peak is None else pytest.approx(peak * 1e12)
        )


def test_no_peak_without_a_gpu_and_float16_on_old_ones(monkeypatch):
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    assert peak_flops(torch.device("cuda"), torch.float16) == 125e12


def test_work_of_packed_micro_batches():
    def sequence(n):
        return {"input_ids": torch.ones(n).long().numpy(), "labels": torch.ones(n).long().numpy()}

    micro_batches = [
        collate([[sequence(40), sequence(20)], [sequence(64)]], 64, 2, 0),
        collate([[sequence(5)]], 64, 1, 0),
    ]
    pairs = sum(
        n * (n + 1) // 2 for n in (40, 20, 4, 64, 5, 59)
    )  # the unused ends are documents too
    assert step_work(micro_batches) == (3 * 64, 39 + 19 + 63 + 4, pairs)
