"""The memory of a step by hand, the room for it, and flags that make a step fit."""

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.networks import SMALL
from tests.helpers.toy_runs import toy_args
from trainer.runtime import memory
from trainer.runtime.memory import (
    StepMemory,
    StepSettings,
    container_limits,
    free_memory,
    matrices_of_layers,
    memory_bytes,
)
from trainer.runtime.optimizers import Muon, build_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 4}, {"num_experts": 4, "shared_expert_intermediate_size": 16}]
)
def test_matrices_of_layers_are_those_that_muon_trains(changes):
    config = MiniMindConfig(**SMALL, **changes)
    parts = build_optimizer(MiniMindForCausalLM(config), toy_args(optimizer="muon")).parts
    (muon,) = (part for part in parts if isinstance(part, Muon))
    weights = [x.numel() for group in muon.param_groups for x in group["params"]]
    assert matrices_of_layers(config) == sum(weights)


def test_memory_of_the_weights():
    """Parameters, gradients and states alone, where no position is computed."""
    config, params = MiniMindConfig(**SMALL), 1000

    def of(params=params, **settings):
        return memory_bytes(config, params, 0, StepSettings(**settings))

    assert of() == 16 * params and of(dtype=torch.bfloat16) == 18 * params
    assert of(offload_optimizer=True) == 8 * params
    sharded = [of(zero_stage=stage, world_size=4) for stage in range(4)]
    assert sharded == [16000, 4000 + 4000 + 2000, 4000 + 1000 + 2000, 4000]
    muon = 16 * 10**6 - 4 * matrices_of_layers(config)
    assert of(10**6, optimizer="muon") == muon
    assert of(trained=10) == 4 * params + 12 * 10
    assert of(trained=10, optimizer="muon") == 4 * params + 8 * 10
    assert of(trained=10, zero_stage=3, world_size=4) == (4 * params + 12 * 10) / 4


def test_memory_of_the_positions():
    config = MiniMindConfig(**SMALL)
    logits = 16 * config.vocab_size

    def of(config, **settings):
        return memory_bytes(config, 0, 1, StepSettings(**settings)) - logits

    one = of(MiniMindConfig(**{**SMALL, "num_hidden_layers": 1}))
    assert of(config) == 2 * one and of(config, dtype=torch.bfloat16) < of(config)
    assert of(config, gradient_checkpointing=True) == one + 2 * 4 * config.hidden_size
    assert of(MiniMindConfig(**SMALL, num_experts=4)) > of(config)


class Sized:
    """A network without weights that knows its configuration and its size."""

    config = MiniMindConfig.from_preset("tiny")

    def num_parameters(self):
        return 10**6


@pytest.fixture
def step_memory(monkeypatch):
    """step_memory(bytes that are free, **flags): the StepMemory of a step of Sized."""

    def make(free, accumulates=True, settings=None, **flags):
        sizes = dict(batch_size=8, accumulation_steps=3, max_seq_len=512)
        args = toy_args(**{**sizes, **flags})
        args.ACCUMULATES = accumulates
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        return StepMemory(Sized(), args, CPU, settings or StepSettings())

    return make


def test_a_step_that_fits_says_its_need_and_the_room(step_memory):
    found = step_memory(4e9)
    assert found.needed < found.room == 4e9 + 4e6  # with the loaded weights
    assert str(found) == f"a step needs about {found.needed / 1e9:.1f} of the 4.0 GB free"
    unknown = step_memory(None)
    assert unknown.room is None
    assert str(unknown) == f"a step needs about {found.needed / 1e9:.1f} GB of memory"


SMALLEST = dict(batch_size=1, accumulation_steps=24, gradient_checkpointing=True)


@pytest.mark.parametrize(
    "free, fix, flags",
    [
        (
            0.6e9,
            "only 0.6 GB are free: --batch_size 4 --accumulation_steps 6 gives the same update in "
            "0.4 GB",
            dict(batch_size=4, accumulation_steps=6),
        ),
        (
            0.11e9,
            "--batch_size 1 --accumulation_steps 24 --gradient_checkpointing gives the same update",
            SMALLEST,
        ),
        (
            0.06e9,
            "--accumulation_steps 24 --gradient_checkpointing --max_seq_len 256 does",
            SMALLEST | {"max_seq_len": 256},
        ),
    ],
)
def test_each_fix_makes_the_step_fit(free, fix, flags, step_memory):
    """Less at a time, then recomputation, then shorter batch rows."""
    assert fix in str(step_memory(free))
    fixed = step_memory(free, **flags)
    assert fixed.needed < 0.9 * fixed.room and " of the " in str(fixed)


def test_where_nothing_fits_the_weights_are_too_large(step_memory):
    fix = "distribute them over GPUs with --deepspeed, or choose a smaller --preset"
    assert fix in str(step_memory(1e6))


def test_a_stage_without_accumulation_hears_of_no_flag_that_it_refuses(step_memory):
    def of(free):
        return str(step_memory(free, accumulates=False, accumulation_steps=1))

    assert "only 0.6 GB are free: --batch_size 5 gives the same update in 0.5 GB" in of(0.6e9)
    assert "; --batch_size 1 --gradient_checkpointing --max_seq_len 256 does" in of(0.06e9)
    assert of(1e6).endswith("are too large: choose a smaller --preset")


def test_after_a_failure_the_fix_needs_less_than_the_step_that_failed(step_memory):
    """Whatever the estimate said; a saved run is resumed, or left for a new one."""
    fix = "--batch_size 6 --accumulation_steps 4"
    assert step_memory(4e9).fix(is_saved=False).startswith(f"{fix} gives the same update")
    assert step_memory(None).fix(is_saved=True).startswith(f"{fix} --from_resume gives")
    least = step_memory(4e9, **SMALLEST)
    assert "--max_seq_len 256 does, in" in least.fix(is_saved=False)
    anew = ", in a new run under another --save_weight"
    assert least.fix(is_saved=True).endswith(anew) and "from_resume" not in least.fix(True)


def test_sharded_parameters_leave_more_room(step_memory):
    sharded = StepSettings(zero_stage=3, world_size=4)
    assert step_memory(1e9, settings=sharded).room == 1e9 + 1e6


def test_free_memory_is_less_than_the_machine_has():
    assert 2**20 < free_memory(CPU) < 2**50


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    """Version 2 and 1 of control groups; the limit may lie on a group above, and cached files are
    no obstacle.
    """
    groups = {
        "": ("job/step", "memory.max", "memory.current", "inactive_file"),
        "memory": ("box", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for controllers, (path, limit, used, cached) in groups.items():
        group = tmp_path / "fs" / controllers / path.split("/")[0]
        group.mkdir(parents=True)
        for name, text in (
            (limit, "1000"),
            (used, "700"),
            ("memory.stat", f"anon 5\n{cached} 100\n"),
        ):
            (group / name).write_text(text)
        (tmp_path / "own").write_text(f"7:cpu:/x\n0:{controllers}:/{path}\n")
        monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
        assert list(container_limits(tmp_path / "fs")) == [400]
        (group / limit).write_text("max")
        assert list(container_limits(tmp_path / "fs")) == []
