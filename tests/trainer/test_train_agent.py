"""Reinforcement learning of agents: the first update by hand, ranks, resumption, learning, and
mistakes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import runs
from tests.helpers.checkpoints import load_tokenizer
from tests.helpers.prompt_rows import (
    folder_of,
    log_probs_of,
    logits_of,
    policy_flags,
    record_samples,
    training_state,
    write_policy,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tool_episodes import TOOLS, Script, ask, call, results, write_tools
from trainer import train_agent, train_full_sft
from trainer.runtime.arguments import parse_args
from trainer.train_agent import AgentArgs


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_questions(folder, count=16, tools=("look",)):
    rows = [
        {
            "conversations": ask(f"{i}?", tools),
            "gt": ["blue"],
            "calls": [{"name": "look", "arguments": {}}],
        }
        for i in range(count)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def flags(tmp_path):
    """flags(start, **changes) of a short run on questions that a look answers."""
    write_questions(tmp_path)
    return lambda start, **changes: policy_flags(
        tmp_path,
        start,
        **{
            "tools": write_tools(tmp_path),
            "rewards": None,
            "max_seq_len": 400,
            "max_completion_length": 32,
            "val_ratio": 0,
            "num_prompts": 6,
            "num_generations": None if changes.get("loss_type") == "spo" else 4,
            **changes,
        },
    )


def metrics(save_dir):
    """The lines of metrics.jsonl without what depends on the clock."""
    return runs.metrics(folder_of(save_dir))


def scripted(monkeypatch, tokenizer, reply):
    """Let a run's completions be those of a Script; returns the list of its rollouts' Samples."""
    monkeypatch.setattr(train_agent, "open_rollout", lambda *_: Script(tokenizer, reply))
    return record_samples(monkeypatch, train_agent)


def sees(prompt, seed):
    """Two looks or one, then one of two colours."""
    if prompt.count("<tool_response>\n{") < 1 + seed % 2:
        return "blue?" if seed % 5 == 0 else call("look", place="far")
    return "It is green" if seed % 3 == 0 else "blue"


def advantages_by_hand(loss_type, rewards):
    """(advantages of all episodes, which of them are trained on)."""
    if loss_type == "spo":
        surplus = rewards - 0.5
        advantages = surplus.sub(surplus.mean()) / (surplus.var() + 1e-8).sqrt()
        return advantages, torch.ones_like(rewards, dtype=torch.bool)
    groups = rewards.view(6, 4)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten(), groups.std(1).repeat_interleave(4) > 0


def tokens_by_hand(network, sample, advantage, loss_type):
    """(minus the loss, whether it is clipped, entropy) of each token that the policy wrote,
    in transformers' own network.
    """
    logits = logits_of(network, sample, 0.9)
    log_probs = log_probs_of(logits, sample)
    ratio, is_sampled = (
        (log_probs - torch.tensor(sample.log_probs)).exp(),
        torch.tensor(sample.is_sampled),
    )
    assert not is_sampled.all() or len(sample.messages) == 3
    if loss_type == "cispo":
        term, is_clipped = ratio.detach().clamp(max=5) * advantage * log_probs, ratio > 5
    else:
        high = 1.28 if loss_type == "spo" else 1.2
        term = torch.minimum(ratio * advantage, ratio.clamp(0.8, high) * advantage)
        is_clipped = ratio > high if advantage > 0 else ratio < 0.8
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach()
    return term[is_sampled], is_clipped[is_sampled], entropy[is_sampled]


@pytest.mark.parametrize(
    "loss_type, colour", [("grpo", "blue"), ("grpo", "pink"), ("cispo", "blue"), ("spo", "pink")]
)
def test_the_first_update_has_the_models_tokens_alone(
    loss_type, colour, flags, tmp_path, tokenizer, monkeypatch
):
    """Loss, gradient, clipped fraction and entropy, episode by episode; a tool's other words change
    them only as context.
    """
    rollouts = scripted(monkeypatch, tokenizer, sees)
    start = write_policy(tmp_path / "start", 10)
    assert len(tokenizer("blue").input_ids) == len(tokenizer("pink").input_ids)
    train_agent.main(
        flags(
            start,
            loss_type=loss_type,
            max_steps=1,
            temperature=0.9,
            tools=write_tools(tmp_path, colour),
            num_prompts=12 if loss_type == "spo" else 6,
        )
    )
    (step,), (every,) = metrics(tmp_path / "out"), rollouts
    # the call that is needed is another one
    rewards = torch.tensor([0.7 * ("blue" in one.text) for one in every])
    assert rewards.tolist() == pytest.approx([one.rewards["total"] for one in every])
    assert {len(one.messages) for one in every} == {3, 5, 7} and rewards.std() > 0
    advantages, kept = advantages_by_hand(loss_type, rewards)
    network = AutoModelForCausalLM.from_pretrained(start)
    tokens = [
        tokens_by_hand(network, sample, advantage, loss_type)
        for sample, advantage, is_kept in zip(every, advantages, kept)
        if is_kept
    ]
    terms, clipped, entropies = (torch.cat(parts) for parts in zip(*tokens))
    loss = -terms.mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in network.parameters()])
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-4) and abs(step["loss"]) > 1e-3
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert step["clip_fraction"] == pytest.approx(clipped.float().mean().item())
    assert 0 < step["clip_fraction"] < 1
    assert step["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-4)
    assert step["targets"] == len(terms)
    if loss_type == "spo":
        values = [0.5] * 16
        for one, reward in zip(every, rewards.tolist()):
            values[one.item] = (0.48 + reward) / 1.96
        assert len(every) == 12 and step["value/mean"] == pytest.approx(sum(values) / 16)
        assert "frac_reward_zero_std" not in step
    else:
        assert step["frac_reward_zero_std"] == pytest.approx(1 - kept.float().mean().item())
    turns = [sum(message["role"] == "assistant" for message in one.messages) for one in every]
    assert step["turns/mean"] == pytest.approx(sum(turns) / len(turns))
    assert step["calls/mean"] == pytest.approx(sum(len(results(one)) for one in every) / len(every))
    lengths = [sum(one.is_sampled) for one in every]
    assert step["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert step["completions/finished_ratio"] == 1


def test_a_step_without_spread_trains_nothing(flags, tmp_path, tokenizer, monkeypatch):
    scripted(
        monkeypatch,
        tokenizer,
        lambda prompt, seed: "blue" if "<tool_response>" in prompt else call("look"),
    )
    start = write_policy(tmp_path / "start", 10)
    train_agent.main(flags(start, max_steps=2))
    for row in metrics(tmp_path / "out"):
        assert (row["loss"], row["frac_reward_zero_std"], row["targets"], row["reward/total"]) == (
            0,
            1,
            0,
            1,
        )
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (folder_of(tmp_path / "out"), start)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def looker(tmp_path_factory):
    """A trained policy: once in three times it looks, and then says what it saw; else it guesses
    wrongly.
    """
    folder = tmp_path_factory.mktemp("looker")
    look = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}
    ends = [
        [{"role": "assistant", "content": "red"}],
        [{"role": "assistant", "content": "red"}],
        [
            look,
            {"role": "tool", "content": '{"result": "blue"}'},
            {"role": "assistant", "content": "blue"},
        ],
    ]
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"conversations": ask(f"{i}?") + end}) + "\n"
            for i in range(24)
            for end in ends
        )
    )
    options = {
        "data_path": folder / "rows.jsonl",
        "from_weight": "none",
        "save_dir": folder / "out",
        "max_seq_len": 256,
        "batch_size": 4,
        "val_ratio": 0,
        "max_steps": 90,
        "epochs": 99,
        "learning_rate": 1e-2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_proc": 1,
        "cache_dir": folder / "cache",
        "device": "cpu",
    }
    train_full_sft.main(
        [part for name, value in options.items() for part in (f"--{name}", str(value))]
    )
    return folder_of(folder / "out")


def test_a_policy_learns_to_use_a_tool(looker, flags, tmp_path):
    train_agent.main(
        flags(
            looker,
            max_steps=9,
            num_prompts=8,
            num_generations=8,
            learning_rate=2e-3,
            temperature=0.7,
            val_ratio=0.2,
            val_interval=9,
        )
    )
    rows = metrics(tmp_path / "out")
    steps = [row for row in rows if "loss" in row]
    found = [row["val_reward/answer/held_out"] for row in rows if "loss" not in row]
    assert found == [0, 1]  # of greedy episodes
    for name in ("reward/answer", "reward/tools", "calls/mean", "turns/mean"):
        assert steps[0][name] + 0.3 < steps[-1][name], name


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "spo"])
def test_an_interrupted_run_resumes_bit_for_bit(loss_type, looker, flags, tmp_path):
    options = dict(
        loss_type=loss_type,
        max_steps=4,
        save_interval=2,
        update_epochs=2,
        num_minibatches=2,
        beta=0.05,
        val_ratio=0.2,
        temperature=0.9,
    )
    train_agent.main(flags(looker, **options, save_dir=tmp_path / "whole"))
    runs.interrupt(train_agent, flags(looker, **options), 3)
    train_agent.main([*flags(looker, **options), "--from_resume"])
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    states = [training_state(folder_of(tmp_path / name), 4) for name in ("out", "whole")]
    if loss_type == "spo":
        (alpha, beta), (other, _) = (
            (one["extra"]["tracker"]["alpha"], one["extra"]["tracker"]["beta"]) for one in states
        )
        assert torch.equal(alpha, other) and len(set((alpha + beta).tolist())) > 2
        ours, theirs = (one["extra"]["last"] for one in states)
        assert not ours["is_sampled"].all() and all(
            torch.equal(ours[name], theirs[name]) for name in theirs
        )
    else:
        assert "extra" not in states[0]
    ours, theirs = (
        load_file(folder_of(tmp_path / name) / "model.safetensors") for name in ("out", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "spo"])
def test_two_ranks_learn_what_one_learns(loss_type, looker, flags, tmp_path):
    options = dict(
        loss_type=loss_type,
        max_steps=2,
        num_prompts=11 if loss_type == "spo" else 5,
        batch_size=1,
        val_ratio=0.2,
    )
    train_agent.main(flags(looker, **options, save_dir=tmp_path / "alone"))
    run_ranks(2, "agent", flags(looker, **options, save_dir=tmp_path / "two"))
    for row, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-5)
    assert sum(row.get("calls/mean", 0) for row in metrics(tmp_path / "alone")) > 0
    ours, theirs = (
        load_file(folder_of(tmp_path / name) / "model.safetensors") for name in ("two", "alone")
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


# ---- mistakes


def test_rows_and_tools_must_fit(flags, tmp_path):
    start = write_policy(tmp_path / "start", 10)
    write_questions(tmp_path, tools=["look", "fail"])
    (tmp_path / "one.py").write_text(TOOLS[: TOOLS.index("@tool\ndef fail")])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(
        ValueError,
        match=r"rows offer fail, and .*one.py has look: give a file that has all .* with --tools",
    ):
        train_agent.main(flags(start, tools=tmp_path / "one.py"))
    with pytest.raises(
        ValueError, match=r"rows offer fail, look, and the toy world has calculator, "
    ):
        train_agent.main(flags(start, tools=None))
    rows = [{"conversations": [{"role": "user", "content": f"{i}"}], "gt": ["1"]} for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError,
        match=r'no row offers a tool: put "tools" on its system message, or take train_grpo.py',
    ):
        train_agent.main(flags(start))
    with pytest.raises(ValueError, match="has no tools"):
        train_agent.main(flags(start, tools=tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tool_timeout": 0}, "--tool_timeout 0.0: give more than 0"),
        ({"max_turns": 0}, "--max_turns 0: give more than 0"),
        (
            {"num_generations": 1},
            "--num_generations 1 with --loss_type grpo: spo has one episode of each prompt, the",
        ),
        (
            {"loss_type": "cispo", "num_generations": 1},
            "--num_generations 1 with --loss_type cispo",
        ),
        ({"loss_type": "spo", "num_generations": 2}, "--num_generations 2 with --loss_type spo"),
        ({"num_generations": 0}, "--num_generations 0: give more than 0"),
        ({"loss_type": "ppo"}, "invalid choice: 'ppo'"),
    ],
)
def test_flags_out_of_range_are_refused(wrong, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_agent.main(flags("nowhere", **wrong))
    assert message in capsys.readouterr().err


def test_the_defaults_of_a_loss_type():
    """As many episodes as it compares; and rewards that spo can count."""
    for loss_type, count in (("grpo", 8), ("cispo", 8), ("spo", 1)):
        args = parse_args(AgentArgs, ["--loss_type", loss_type])
        assert args.num_generations == count
        assert sum(float(part.split("=")[1]) for part in args.rewards) == 1


def test_the_older_name_of_the_time_limit_is_known():
    assert parse_args(AgentArgs, ["--tool_seconds", "7"]).tool_timeout == 7
