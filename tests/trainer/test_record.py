"""What a run says about itself: speeds, shares, expert load, lines that are taken back."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import record as record_module
from trainer.arguments import TrainArgs
from trainer.costs import training_flops
from trainer.metrics import read_metrics
from trainer.record import RunRecord, expert_load
from trainer.run import Run

SHAPE = dict(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=32)
MICRO = {"labels": torch.tensor([[-100, 5, 6, 7]]), "position_ids": torch.arange(4)[None]}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(**): a RunRecord whose clock only moves when told, on a device of 1000 operations per second."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(record_module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(record_module, "peak_flops", lambda device, dtype: 1000.0)

    def make(first=0, targets=0, num_experts=0):
        args = TrainArgs(device="cpu")
        model = MiniMindForCausalLM(MiniMindConfig(**SHAPE, num_experts=num_experts)).train()
        steps = SimpleNamespace(seconds_waited=0.0)
        return RunRecord(tmp_path, args, Run(args), model, steps, first, targets, 10), clock, steps
    return make


def test_speed_and_shares_are_of_the_steps_since_the_last_line(make, tmp_path):
    record, clock, steps = make()
    with record:
        for step in (1, 2):
            clock.now += 5.0
            steps.seconds_waited += 1.0
            record.advance(step, 30, [MICRO, MICRO], 2.0, 1e-3)
        record.log(2, loss=2.0, grad_norm=float("inf"))
        clock.now += 100.0  # validation
        record.log(2, **{"val_bpb/a": 1.0})
        clock.now += 4.0
        record.advance(3, 30, [MICRO], 2.0, 1e-3)
        record.log(3, loss=1.0, grad_norm=1.0)
    first, validation, last = read_metrics(tmp_path / "metrics.jsonl")
    flops = training_flops(record.model.config, 4, 3, 10)
    assert (first["tokens_per_second"], first["data_wait_share"]) == (6.0, 0.2)
    assert first["mfu"] == pytest.approx(4 * flops / 10 / 1000, abs=1e-4) and first["grad_norm"] is None
    assert "mfu" not in validation and validation["seconds"] == 110.0
    assert last["mfu"] == pytest.approx(flops / 4 / 1000, abs=1e-4)
    assert (last["tokens_per_second"], last["targets"], last["seconds"]) == (7.5, 90, 114.0)
    assert 0.05 < last["peak_memory_gb"] < 30


def test_a_resumed_run_goes_on_with_the_lines_and_the_clock(make, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "targets": n, "seconds": 10.0 * n}) + "\n"
                                                    for n in (1, 2, 3)))
    record, clock, _ = make(first=2, targets=2)
    with record:
        clock.now += 1.0
        record.log(3, loss=1.0)
        record.log(4, loss=1.0)
        record.go_back(3, 2)
        record.log(4, loss=0.5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["seconds"] == 21.0 and rows[3]["loss"] == 0.5


def test_expert_load_adds_up_and_starts_anew(make):
    record, *_ = make(num_experts=4)
    record.model(torch.randint(100, (2, 50)))
    load = expert_load(record.model, record.run.ranks)
    assert sum(load[f"expert_load/{e}"] for e in range(4)) == pytest.approx(1, abs=1e-3)
    assert load["expert_load/max"] >= max(load[f"expert_load/{e}"] for e in range(4))
    counts = [layer.mlp.tokens_per_expert for layer in record.model.model.layers]
    assert all(int(count.sum()) == 0 for count in counts)
    record.model.eval()(torch.randint(100, (2, 50)))
    assert all(int(count.sum()) == 0 for count in counts)
    record, *_ = make()
    assert expert_load(record.model, record.run.ranks) == {}


def test_expert_load_is_that_of_all_ranks(make):
    """Another rank, whose tokens all went to the last expert: as many as ours in each layer."""
    record, *_ = make(num_experts=4)
    record.model(torch.randint(100, (2, 50)))
    ours = torch.stack([layer.mlp.tokens_per_expert for layer in record.model.model.layers]).double()
    theirs = torch.zeros_like(ours)
    theirs[:, 3] = ours.sum(-1)
    load = expert_load(record.model, SimpleNamespace(sum_tensor=lambda x: x + theirs))
    expected = ((ours + theirs) / (ours + theirs).sum(-1, keepdim=True)).mean(0)
    assert [load[f"expert_load/{e}"] for e in range(4)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_process_that_is_killed_while_it_takes_lines_back_loses_none(make, tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "targets": n, "seconds": 10.0 * n}) + "\n" for n in (1, 2, 3)))
    write_text = Path.write_text

    def killed(path, text, **options):
        write_text(path, text[:10], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        make(first=2, targets=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    make(first=2, targets=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".metrics")]
