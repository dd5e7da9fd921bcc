"""The data that a loop takes step by step, and the load of the experts that it logs."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.toy_runs import ToyBatches, toy_network
from trainer.runtime import loop as loop_module
from trainer.runtime.loop import StepData, expert_load

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 3])
def test_step_data_begins_anywhere_and_goes_back(first, num_workers):
    batches = ToyBatches(6)
    data, seen = StepData(batches, first, num_workers, CPU), []
    for step, micro_batches in data:
        assert torch.equal(micro_batches[0]["input_ids"], batches[step][0]["input_ids"])
        seen.append(step)
        if seen.count(4) == 1 and step == 4:
            data.go_back(2)
    assert seen == [*range(first, 5), 2, 3, 4, 5]
    assert list(data) == []  # the end


def test_the_time_spent_waiting_for_data_is_taken_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(clock))
    data = StepData(ToyBatches(3), 0, 0, CPU)
    list(data)
    assert data.take_seconds_waited() == 3 and data.take_seconds_waited() == 0


def test_a_gpu_does_not_wait_for_its_data():
    on_gpu = StepData(ToyBatches(3), 0, None, torch.device("cuda")).options
    assert on_gpu["num_workers"] == 2 and on_gpu["pin_memory"]
    assert StepData(ToyBatches(3), 0, None, CPU).options == {"num_workers": 0, "pin_memory": False}


ALONE = SimpleNamespace(sum_tensor=lambda x: x)
MOE = dict(num_experts=4, num_experts_per_tok=2)


def test_expert_load_adds_up_and_starts_anew():
    model = toy_network(**MOE)
    model(torch.randint(97, (2, 50)))
    load = expert_load(model, ALONE)
    assert sum(load[f"expert_load/{e}"] for e in range(4)) == pytest.approx(1, abs=1e-3)
    assert load["expert_load/max"] >= max(load[f"expert_load/{e}"] for e in range(4))
    counts = [layer.mlp.tokens_per_expert for layer in model.model.layers]
    assert all(int(count.sum()) == 0 for count in counts)
    model.eval()(torch.randint(97, (2, 50)))
    assert all(int(count.sum()) == 0 for count in counts)
    assert expert_load(toy_network(), ALONE) == {}


def test_expert_load_is_that_of_all_ranks():
    """Another rank, whose tokens all went to the last expert: as many as ours in each layer."""
    model = toy_network(**MOE)
    model(torch.randint(97, (2, 50)))
    ours = torch.stack([layer.mlp.tokens_per_expert for layer in model.model.layers]).double()
    theirs = torch.zeros_like(ours)
    theirs[:, 3] = ours.sum(-1)
    load = expert_load(model, SimpleNamespace(sum_tensor=lambda x: x + theirs))
    expected = ((ours + theirs) / (ours + theirs).sum(-1, keepdim=True)).mean(0)
    found = [load[f"expert_load/{e}"] for e in range(4)]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
