"""Advantages against TRL's GRPO trainer, and where it has none against plain loops in float64."""

import math
import statistics
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trainer.losses.advantages import explained_variance, gae, group_advantages, has_spread, whiten

DOUBLE = {"dtype": torch.float64}


class Accelerator:
    """What TRL's trainer asks of accelerate, in one process."""

    device, process_index, gather = torch.device("cpu"), 0, staticmethod(lambda x: x)


def trl_advantages(rewards, scale):
    """The advantages of TRL's GRPOTrainer for completions of two tokens each: [P, G]."""
    from trl import GRPOTrainer

    count = rewards.numel()
    completions = [[1], [2]] * count
    trainer = SimpleNamespace(
        accelerator=Accelerator,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        tools=None,
        environments=None,
        environment_factories=None,
        _generate=lambda prompts: (
            [[1]] * count,
            completions[:count],
            None,
            ["a"] * count,
            None,
            {},
            None,
            None,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _is_vlm=False,
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        num_generations=rewards.shape[1],
        reward_weights=torch.ones(1, **DOUBLE),
        _calculate_rewards=lambda *_: rewards.reshape(-1, 1),
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_func_names=["r"],
        reward_funcs=[None],
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": {"r": []}, "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    output = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * count)
    return output["advantages"].view_as(rewards)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_against_trl(scale, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.gather_object", lambda x: x)
    rewards = torch.randn(5, 4, **DOUBLE)
    rewards[1] = 0.3  # all the same
    rewards[2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = group_advantages(rewards, scale)
    torch.testing.assert_close(found, trl_advantages(rewards, scale))
    assert found[0].abs().min() > 0.01 and found[1].abs().max() < 1e-9


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_by_hand(scale):
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [0.0, 0.0, 1.0]]
    overall = statistics.stdev([x for group in rewards for x in group])
    found = group_advantages(torch.tensor(rewards, **DOUBLE), scale)
    for group, row in zip(rewards, found.tolist()):
        divisor = {"group": statistics.stdev(group) + 1e-4, "batch": overall + 1e-4, "none": 1.0}[
            scale
        ]
        assert row == pytest.approx(
            [(x - statistics.mean(group)) / divisor for x in group], abs=1e-9
        )


def test_no_groups_have_no_advantages():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in ("group", "batch", "none"):
            assert group_advantages(torch.empty(0, 8), scale).shape == (0, 8)
        assert has_spread(torch.empty(0, 8)).shape == (0,)


def test_has_spread():
    rewards = torch.tensor(
        [
            [1.0, 1.0, 1.0],
            [0.1 + 0.2, 0.3, 0.3],
            [0.0, 0.0, 1.0],
            [-1.0, 0.0, -1.0],
            [0.5, 0.5, 0.5001],
        ],
        **DOUBLE,
    )
    assert rewards[1].unique().numel() == 2  # the same sum, in another order
    assert has_spread(rewards).tolist() == [False, False, True, True, True]


LENGTHS = [4, 1, 6, 1, 0, 3]


def padded(dtype):
    """Rewards [B, T] and values [B, T + 1] of completions of the LENGTHS, 0 behind their ends."""
    T = max(LENGTHS)
    is_token = torch.arange(T + 1) < torch.tensor(LENGTHS)[:, None]
    rewards, values = torch.randn(len(LENGTHS), T), torch.randn(len(LENGTHS), T + 1)
    return (rewards * is_token[:, :T]).to(dtype), (values * is_token).to(dtype)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_by_hand(gamma, gae_lambda):
    """The double sum over the tokens that follow, for each completion; 0 behind its end."""
    rewards, values = padded(torch.float64)
    before = rewards.clone(), values.clone()
    advantages = gae(rewards, values, gamma, gae_lambda)
    assert advantages.shape == rewards.shape
    for length, r, v, found in zip(LENGTHS, rewards.tolist(), values.tolist(), advantages.tolist()):
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(length - t))
            assert found[t] == pytest.approx(expected, rel=1e-12)
        assert not any(found[length:])
    assert torch.equal(before[0], rewards) and torch.equal(before[1], values)


def test_padding_and_neighbours_change_no_bit_of_gae():
    rewards, values = padded(torch.float32)
    together = gae(rewards, values, 0.99, 0.95)
    for i, length in enumerate(LENGTHS):
        alone = gae(rewards[i : i + 1, :length], values[i : i + 1, : length + 1], 0.99, 0.95)
        assert torch.equal(together[i, :length], alone[0])


def test_gae_with_lambda_1_has_the_rewards_to_come_as_returns():
    """Without a discount, whatever the values are, and also for a completion that was cut: nothing
    is expected beyond its end.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [-0.5, 0.25, 0.0]])
    values = 9 * torch.randn(2, 4) * torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    returns = gae(rewards, values, 1.0, 1.0) + values[:, :-1]
    expected = torch.tensor([[1.0, 1.0, 1.0], [-0.25, 0.25, 0.0]])
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=0)


def test_gae_of_no_tokens():
    assert gae(torch.empty(0, 0), torch.empty(0, 1), 1.0, 0.95).shape == (0, 0)
    assert gae(torch.empty(2, 0), torch.zeros(2, 1), 1.0, 0.95).shape == (2, 0)


def test_whiten():
    x = 3 * torch.randn(50) + 7
    found = whiten(x)
    assert found.dtype == torch.float32
    mean, deviation = statistics.mean(x.tolist()), statistics.stdev(x.tolist())
    assert found.tolist() == pytest.approx(
        [(one - mean) / deviation for one in x.tolist()], abs=1e-5
    )


def test_whiten_without_spread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (
            torch.empty(0),
            torch.tensor([5.0]),
            torch.full((7,), 1000.1),
            torch.full((1000,), -0.1),
        ):
            assert whiten(x).shape == x.shape and whiten(x).abs().sum() < 1e-3


def test_explained_variance_by_hand():
    returns, values = [1.0, 2.0, 4.0, 0.0], [1.5, 1.0, 3.0, 0.5]
    rest = [r - v for r, v in zip(returns, values)]
    found = explained_variance(torch.tensor(values), torch.tensor(returns))
    assert found == pytest.approx(1 - statistics.variance(rest) / statistics.variance(returns))
    returns = torch.tensor(returns)
    assert explained_variance(returns + 3, returns) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)


@pytest.mark.parametrize("returns", [[], [0.4], [0.4, 0.4, 0.4]])
def test_explained_variance_where_there_is_none(returns):
    found = explained_variance(torch.rand(len(returns)), torch.tensor(returns))
    assert found == 0.0 and math.isfinite(found)
