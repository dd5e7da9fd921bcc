from types import SimpleNamespace

import pytest
import torch

from dataset.packing import collate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import costs
from trainer.arguments import TrainArgs
from trainer.costs import (
    active_weights,
    container_limits,
    copy_rate,
    free_memory,
    matrices_of_layers,
    matrix_rate,
    memory_advice,
    memory_bytes,
    peak_flops,
    step_work,
    training_flops,
)
from trainer.muon import Muon
from trainer.optim import build_optimizer

CPU = torch.device("cpu")

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
    assert training_flops(config, 100, 30, 5, is_frozen=True) == 4 * (100 * body + 30 * 40) + 12 * 5 * 4


def test_rates_are_rates():
    assert 1e6 < matrix_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.01) < 1e15
    assert 1e6 < copy_rate(torch.device("cpu"), seconds=0.01) < 1e15


@pytest.mark.parametrize("name, half, single", [
    ("NVIDIA H100 80GB HBM3", 989, 494.5), ("NVIDIA H100 PCIe", 756, 378), ("NVIDIA GeForce RTX 3090", 71, 35.5),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 88, 44), ("NVIDIA A100-SXM4-80GB", 312, 156), ("NVIDIA L40S", 362, 181),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None), ("NVIDIA A10G", None, None), ("Tesla T4", None, 8.1)])
def test_peak_goes_by_the_whole_name(monkeypatch, name, half, single):
    """A fragment of another card's name, or a laptop's slower namesake, must not lend its peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float32, single)):
        assert peak_flops(torch.device("cuda"), dtype) == (None if peak is None else pytest.approx(peak * 1e12))


def test_no_peak_without_a_gpu_and_float16_on_old_ones(monkeypatch):
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    assert peak_flops(torch.device("cuda"), torch.float16) == 125e12


def test_work_of_packed_micro_batches():
    def sequence(n):
        return {"input_ids": torch.ones(n).long().numpy(), "labels": torch.ones(n).long().numpy()}

    micro_batches = [collate([[sequence(40), sequence(20)], [sequence(64)]], 64, 2, 0), collate([[sequence(5)]], 64, 1, 0)]
    pairs = sum(n * (n + 1) // 2 for n in (40, 20, 4, 64, 5, 59))  # the unused ends are documents too
    assert step_work(micro_batches) == (3 * 64, 39 + 19 + 63 + 4, pairs)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4}, {"num_experts": 4, "shared_expert_intermediate_size": 16}])
def test_matrices_of_layers_are_what_muon_trains(changes):
    config = MiniMindConfig(**SHAPE, **changes)
    settings = TrainArgs(optimizer="muon")
    (muon,) = (part for part in build_optimizer(MiniMindForCausalLM(config), settings).parts if isinstance(part, Muon))
    assert matrices_of_layers(config) == sum(x.numel() for group in muon.param_groups for x in group["params"])


def test_memory_of_the_weights():
    """Nothing but parameters, gradients and states where no position is computed."""
    config, params = MiniMindConfig(**SHAPE), 1000

    def of(**choice):
        return memory_bytes(config, params, 0, choice.pop("dtype", torch.float32), **choice)

    assert of() == 16 * params and of(dtype=torch.bfloat16) == 18 * params
    assert of(offload_optimizer=True) == 8 * params
    assert [of(zero_stage=stage, world_size=4) for stage in range(4)] == [16000, 4000 + 4000 + 2000, 4000 + 1000 + 2000, 4000]
    assert memory_bytes(config, 10**6, 0, torch.float32, optimizer="muon") == 16 * 10**6 - 4 * matrices_of_layers(config)
    assert of(trained=10) == 4 * params + 12 * 10 and of(trained=10, optimizer="muon") == 4 * params + 8 * 10
    assert of(trained=10, zero_stage=3, world_size=4) == (4 * params + 12 * 10) / 4


def test_memory_of_the_positions():
    config = MiniMindConfig(**SHAPE)
    logits = 16 * config.vocab_size

    def of(config, **choice):
        return memory_bytes(config, 0, 1, choice.pop("dtype", torch.float32), **choice) - logits

    one = of(MiniMindConfig(**{**SHAPE, "num_hidden_layers": 1}))
    assert of(config) == 2 * one and of(config, dtype=torch.bfloat16) < of(config)
    assert of(config, gradient_checkpointing=True) == one + 2 * 4 * config.hidden_size
    assert of(MiniMindConfig(**SHAPE, num_experts=4)) > of(config)


class Sized:
    """A network that only knows its size."""

    def num_parameters(self):
        return 10**6


def advice(monkeypatch, free, **changes):
    settings = dict(batch_size=8, accumulation_steps=3, ACCUMULATES=True, max_seq_len=512, optimizer="adamw",
                    gradient_checkpointing=False)
    args = SimpleNamespace(**settings | changes)
    monkeypatch.setattr(costs, "free_memory", lambda device: free)
    return memory_advice(MiniMindConfig.from_preset("tiny"), Sized(), args, CPU, torch.float32)


def test_advice_names_flags_that_fit(monkeypatch):
    """Each way out, taken, fits: less at a time, then recomputation, then shorter rows, then nothing helps."""
    needed, room, text = advice(monkeypatch, 4e9)
    assert needed < room == 4e9 + 4e6 and text == f"a step needs about {needed / 1e9:.1f} of the 4.0 GB free"
    assert advice(monkeypatch, None)[1:] == (None, f"a step needs about {needed / 1e9:.1f} GB of memory")

    text = advice(monkeypatch, 0.6e9)[2]
    assert "only 0.6 GB are free: --batch_size 4 --accumulation_steps 6 gives the same update in 0.4 GB" in text
    assert advice(monkeypatch, 0.6e9, batch_size=4, accumulation_steps=6)[2].startswith("a step needs about 0.4 of")

    text = advice(monkeypatch, 0.11e9)[2]
    assert "--batch_size 1 --accumulation_steps 24 --gradient_checkpointing gives the same update" in text
    changes = dict(batch_size=1, accumulation_steps=24, gradient_checkpointing=True)
    needed, room, _ = advice(monkeypatch, 0.11e9, **changes)
    assert needed < 0.9 * room

    text = advice(monkeypatch, 0.06e9)[2]
    assert "--accumulation_steps 24 --gradient_checkpointing --max_seq_len 256 does" in text
    needed, room, _ = advice(monkeypatch, 0.06e9, **changes | {"max_seq_len": 256})
    assert needed < 0.9 * room
    assert "share them among GPUs with --deepspeed, or choose a smaller --preset" in advice(monkeypatch, 1e6)[2]


def test_advice_where_nothing_accumulates_names_no_flag_that_is_refused(monkeypatch):
    text = advice(monkeypatch, 0.6e9, accumulation_steps=1, ACCUMULATES=False)[2]
    assert "only 0.6 GB are free: --batch_size 5 gives the same update in 0.5 GB" in text
    assert "; --batch_size 1 --gradient_checkpointing --max_seq_len 256 does" in advice(
        monkeypatch, 0.06e9, accumulation_steps=1, ACCUMULATES=False)[2]
    assert advice(monkeypatch, 1e6, ACCUMULATES=False)[2].endswith("are too large: choose a smaller --preset")


def test_free_memory_is_less_than_the_machine_has():
    assert 2**20 < free_memory(CPU) < 2**50


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    """Version 2 and 1 of control groups; the limit may lie on a group above, and cached files are no obstacle."""
    groups = {"": ("job/step", "memory.max", "memory.current", "inactive_file"),
              "memory": ("box", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    for controllers, (path, limit, used, cached) in groups.items():
        group = tmp_path / "fs" / controllers / path.split("/")[0]
        group.mkdir(parents=True)
        for name, text in ((limit, "1000"), (used, "700"), ("memory.stat", f"anon 5\n{cached} 100\n")):
            (group / name).write_text(text)
        (tmp_path / "own").write_text(f"7:cpu:/x\n0:{controllers}:/{path}\n")
        monkeypatch.setattr(costs, "OWN_GROUPS", tmp_path / "own")
        assert list(container_limits(tmp_path / "fs")) == [400]
        (group / limit).write_text("max")
        assert list(container_limits(tmp_path / "fs")) == []
