"""What the stages of reinforcement learning share: answers that a server writes, from the command line on."""

import json
import signal

import pytest
import torch
from fake_rollout_server import FakeServer
from safetensors.torch import load_file
from test_train_distillation import write_network

from model.model_lora import LoRASettings, adapter_names, add_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import train_grpo, train_ppo
from trainer.loop import Loop
from trainer.metrics import read_metrics

ROWS = "".join(json.dumps({"conversations": [{"role": "user", "content": text}]}) + "\n"
               for text in ("one", "what?", "and this", "go on"))
REWARD = "def even(text, row):\n    return len(text) % 2\n"


@pytest.fixture
def flags(tmp_path):
    """flags(*more): GRPO for three steps on a user's reward."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "mine.py").write_text(REWARD)
    start = write_network(tmp_path / "start", 0, hidden_size=32, num_hidden_layers=2)
    options = {"data_path": tmp_path / "rows.jsonl", "from_weight": start, "save_dir": tmp_path / "out", "max_seq_len": 64,
               "max_new_tokens": 8, "num_prompts": 2, "num_generations": 4, "max_steps": 3, "val_share": 0.25, "device": "cpu",
               "rewards": f"{tmp_path / 'mine.py'}:even=1", "learning_rate": 1e-2, "val_interval": 2}
    return lambda *more: [*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *map(str, more)]


def test_a_server_writes_what_this_process_would(flags, tmp_path):
    train_grpo.main(flags("--save_weight", "local"))
    with FakeServer(tmp_path / "start") as server:
        train_grpo.main(flags("--save_weight", "remote", "--rollout_url", server.url, "--rollout_dir", tmp_path / "weights"))
        assert server.paths.count("/v1/completions") >= 3 * 8
    local, remote = (load_file(tmp_path / "out" / f"{name}_32x2" / "model.safetensors") for name in ("local", "remote"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    for name in local:
        torch.testing.assert_close(local[name], remote[name], rtol=1e-3, atol=1e-5)
    assert any((local[name] - start[name]).abs().max() > 1e-3 for name in local)
    ours, theirs = (read_metrics(tmp_path / "out" / f"{name}_32x2" / "metrics.jsonl") for name in ("local", "remote"))
    assert [row.get("reward/total") for row in ours] == [row.get("reward/total") for row in theirs]


@pytest.mark.parametrize("more, message", [
    (["--rollout_url", "http://127.0.0.1:1"], "--rollout_url needs --rollout_dir"),
    (["--max_staleness", "2"], "--max_staleness without --rollout_url"),
    (["--rollout_dir", "x"], "--rollout_dir without --rollout_url"),
    (["--num_proc", "2"], "--num_proc: prompts are few"),
])
def test_flags_without_effect_are_refused(more, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_grpo.main(flags(*more))
    assert message in capsys.readouterr().err


def test_a_run_may_go_on_in_other_micro_batches(flags, tmp_path, monkeypatch):
    """Stopped after a step of one row a micro-batch, and gone on with in larger ones: the same update, within float error."""
    train_grpo.main(flags("--save_weight", "whole", "--batch_size", 4))
    advance = Loop.advance

    def stop_after_the_first(loop, *args, **figures):
        loop.run.signals.received = signal.SIGTERM
        advance(loop, *args, **figures)

    monkeypatch.setattr(Loop, "advance", stop_after_the_first)
    with pytest.raises(SystemExit):
        train_grpo.main(flags("--save_weight", "parts", "--batch_size", 1))
    monkeypatch.setattr(Loop, "advance", advance)
    train_grpo.main(flags("--save_weight", "parts", "--batch_size", 4, "--from_resume"))
    whole, parts = (load_file(tmp_path / "out" / f"{name}_32x2" / "model.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)


def test_the_critic_beside_an_adapter_is_a_plain_network():
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                            intermediate_size=64)
    policy = MiniMindForCausalLM(config)
    add_adapter(policy, LoRASettings(4, 8.0))
    critic = train_ppo.Critic(policy)
    assert adapter_names(critic) == [] and adapter_names(policy) == ["default"]
    assert all(x.requires_grad for x in critic.parameters())
    plain = MiniMindForCausalLM(config).model
    assert dict(critic.model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
