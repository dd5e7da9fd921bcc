"""The set-up of reinforcement learning: networks, prompts, and completions from a server, from the
command line on.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from model.model_lora import AdapterOnly
from tests.helpers.fake_rollout_server import FakeServer
from tests.helpers.networks import write_network
from tests.helpers.runs import assert_same
from trainer import train_grpo
from trainer.rl import setup
from trainer.rl.arguments import PolicyArgs
from trainer.rl.rollout import Rollout
from trainer.runtime.arguments import parse_args
from trainer.runtime.loop import Loop
from trainer.runtime.metrics import read_metrics
from trainer.runtime.run import Run

ROWS = "".join(
    json.dumps({"conversations": [{"role": "user", "content": text}]}) + "\n"
    for text in ("one", "what?", "and this", "go on")
)
REWARD = "def even(text, row):\n    return len(text) % 2\n"


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes): three steps on a user's reward."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "mine.py").write_text(REWARD)
    start = write_network(tmp_path / "start", 0, hidden_size=32, num_hidden_layers=2)
    options = {
        "data_path": tmp_path / "rows.jsonl",
        "from_weight": start,
        "save_dir": tmp_path / "out",
        "max_seq_len": 64,
        "max_completion_length": 8,
        "num_prompts": 2,
        "num_generations": 4,
        "max_steps": 3,
        "val_ratio": 0.25,
        "device": "cpu",
        "rewards": f"{tmp_path / 'mine.py'}:even=1",
        "learning_rate": 1e-2,
        "val_interval": 2,
    }
    return lambda *switches, **changes: [
        *(str(x) for name, value in {**options, **changes}.items() for x in (f"--{name}", value)),
        *switches,
    ]


@pytest.fixture
def opened(flags):
    """opened(**changes) -> the Run of these flags."""
    return lambda **changes: Run(parse_args(PolicyArgs, flags(save_weight="x", **changes)))


def test_a_reference_is_kept_where_it_is_needed(opened, tmp_path):
    run = opened()
    model, saved, _, reference = setup.load_policy(run)
    assert saved is model and reference is None and run.folder == tmp_path / "out" / "x_32x2"
    assert all(x.requires_grad for x in model.parameters())
    model, _, _, reference = setup.load_policy(opened(beta=0.1))
    assert not any(x.requires_grad for x in reference.parameters()) and not reference.training
    assert_same(reference.state_dict(), model.state_dict())
    assert reference.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_an_adapter_is_all_that_is_trained_and_saved(opened, tmp_path):
    model, saved, _, reference = setup.load_policy(opened(lora_rank=4, beta=0.1))
    assert isinstance(saved, AdapterOnly) and saved.base == tmp_path / "start"
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == set(saved.state_dict())
    assert not any("lora" in name for name, _ in reference.named_parameters())


def test_prompts_are_split_and_their_fingerprint_knows_the_weights(opened, capsys):
    run = opened()
    model, _, tokenizer, _ = setup.load_policy(run)
    prompts, held_out, fingerprint = setup.open_prompts(run, model, tokenizer)
    assert (len(prompts), len(held_out["held_out"])) == (3, 1)
    assert "rows: 4 read, 4 used" in capsys.readouterr().out
    assert setup.open_prompts(run, model, tokenizer)[2] == fingerprint
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert setup.open_prompts(run, model, tokenizer)[2] != fingerprint
    steps = setup.prompt_steps(run, prompts)
    assert len(steps) == 3 and all(len(step) == 2 for step in steps)


def test_the_toy_world_is_the_default(opened):
    run = opened(max_seq_len=512, rewards="answer=1")
    run.args.data_path, run.args.given = [], set()
    model, _, tokenizer, _ = setup.load_policy(run)
    prompts, held_out, _ = setup.open_prompts(run, model, tokenizer, "agent")
    assert list(held_out) == ["agent_heldout"] and len(prompts) > 100
    assert all(row["conversations"][0]["tools"] for row in prompts.rows)


def test_a_process_samples_for_itself_without_a_server(opened):
    run = opened()
    model, saved, tokenizer, _ = setup.load_policy(run)
    assert type(setup.open_rollout(run, model, saved, tokenizer)) is Rollout


def weights(tmp_path, name):
    return load_file(tmp_path / "out" / f"{name}_32x2" / "model.safetensors")


def test_a_server_samples_what_this_process_would(flags, tmp_path):
    train_grpo.main(flags(save_weight="local"))
    with FakeServer(tmp_path / "start") as server:
        remote = {"rollout_url": server.url, "rollout_dir": tmp_path / "weights"}
        train_grpo.main(flags(save_weight="remote", **remote))
        assert server.paths.count("/v1/completions") >= 3 * 8
    local, remote = (weights(tmp_path, name) for name in ("local", "remote"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    for name in local:
        torch.testing.assert_close(local[name], remote[name], rtol=1e-3, atol=1e-5)
    assert any((local[name] - start[name]).abs().max() > 1e-3 for name in local)
    ours, theirs = (
        read_metrics(tmp_path / "out" / f"{name}_32x2" / "metrics.jsonl")
        for name in ("local", "remote")
    )
    assert [row.get("reward/total") for row in ours] == [row.get("reward/total") for row in theirs]


def test_a_run_may_resume_in_other_micro_batches(flags, tmp_path, monkeypatch):
    """Stopped after a step of one row a micro-batch, and resumed in larger ones: the same update,
    within float error.
    """
    train_grpo.main(flags(save_weight="whole", batch_size=4))
    advance = Loop.advance

    def stop_after_the_first(loop, micro_batches, num_targets, **metrics):
        loop.run.signals.received = signal.SIGTERM
        advance(loop, micro_batches, num_targets, **metrics)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Loop, "advance", stop_after_the_first)
        train_grpo.main(flags(save_weight="parts", batch_size=1))
    train_grpo.main(flags("--from_resume", save_weight="parts", batch_size=4))
    whole, parts = (weights(tmp_path, name) for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)
