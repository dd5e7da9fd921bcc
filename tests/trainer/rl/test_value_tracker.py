"""The value tracker of SPO against its equations in plain Python, its draws against their
probabilities, and a bandit.
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.model_minimind import MiniMindForCausalLM
from tests.helpers.networks import write_network
from trainer.losses.advantages import whiten
from trainer.losses.policy import clipped_loss
from trainer.rl.experience import sample_log_probs
from trainer.rl.rollout import Sample
from trainer.rl.value_tracker import LastSamples, SingleStream, ValueTracker
from trainer.runtime.ranks import Ranks

DOUBLE = {"dtype": torch.float64}


def test_nothing_is_known_at_first():
    tracker = ValueTracker(3)
    assert tracker.values().tolist() == [0.5] * 3 and tracker.values().dtype == torch.float64
    assert tracker.sampling_weights().tolist() == pytest.approx([0.55] * 3)


def test_start_by_hand():
    tracker = ValueTracker(4)
    tracker.start([3, 1], torch.tensor([[1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]]))
    assert tracker.values().tolist() == pytest.approx([0.5, 0.5 / 5, 0.5, 3 / 5])
    assert (tracker.alpha + tracker.beta).tolist() == pytest.approx([1, 8, 1, 8])  # 1 / (1 - 0.875)


def test_updates_by_hand():
    """Binary and fractional rewards, and divergences that forget most, something and least; and the
    moving average it is.
    """
    tracker = ValueTracker(3)
    expected = {i: (0.5, 0.5) for i in range(3)}
    rounds = [
        ([2, 0], [1.0, 0.0], [0.0, 0.0]),
        ([0, 1], [0.25, 1.0], [0.01, 5.0]),
        ([2, 0], [0.0, 1.0], [0.006, -0.02]),
    ]
    factors = [[0.96, 0.96], [2 ** (-0.01 / 0.06), 0.875], [2 ** (-0.006 / 0.06), 0.96]]
    assert all(0.875 <= x <= 0.96 for pair in factors for x in pair)
    for (items, rewards, kl), rhos in zip(rounds, factors):
        before = tracker.values().tolist()
        tracker.update(items, torch.tensor(rewards), torch.tensor(kl, **DOUBLE))
        for item, r, rho in zip(items, rewards, rhos):
            alpha, beta = expected[item]
            expected[item] = rho * alpha + r, rho * beta + 1 - r
            rate = 1 / (rho * (alpha + beta) + 1)
            assert tracker.values()[item].item() == pytest.approx(
                before[item] + rate * (r - before[item])
            )
    assert tracker.alpha.tolist() == pytest.approx([expected[i][0] for i in range(3)])
    assert tracker.beta.tolist() == pytest.approx([expected[i][1] for i in range(3)])


def test_one_prompt_twice_in_an_update_counts_twice():
    one, two = ValueTracker(2), ValueTracker(2)
    one.update([1, 1], [1.0, 0.0], [0.03, 0.0])
    two.update([1], [1.0], [0.03])
    two.update([1], [0.0], [0.0])
    assert torch.equal(one.alpha, two.alpha) and torch.equal(one.beta, two.beta)


@pytest.mark.parametrize("kl, memory", [(0.0, 25), (9.0, 8)])
def test_how_much_is_remembered(kl, memory):
    tracker = ValueTracker(1)
    for _ in range(400):
        tracker.update([0], [1.0], [kl])
    assert (tracker.alpha + tracker.beta).item() == pytest.approx(memory, rel=1e-3)
    assert tracker.values().item() > 0.9999 and tracker.sampling_weights().item() == pytest.approx(
        0.05, abs=0.01
    )


def test_a_tracker_follows_a_policy_that_changes():
    """The further it moved, the sooner: after 8 failures of what always succeeded."""
    values = []
    for kl, rho in ((0.5, 0.875), (0.0, 0.96)):
        tracker = ValueTracker(1)
        tracker.start([0], torch.ones(1, 8))
        for _ in range(8):
            tracker.update([0], [0.0], [kl])
        values.append(tracker.values().item())
        assert values[-1] == pytest.approx(
            8 * 8.5 / 9 * rho**8 / (8 * rho**8 + (1 - rho**8) / (1 - rho))
        )
    assert values[0] < 0.33 < 0.4 < values[1]


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan])
def test_rewards_that_are_no_fractions_of_a_success(wrong):
    tracker = ValueTracker(2)
    with pytest.raises(ValueError, match=r"from 0 to 1.*train_grpo"):
        tracker.update([0, 1], [0.5, wrong], [0.0, 0.0])
    with pytest.raises(ValueError, match="--rewards"):
        tracker.start([0], torch.tensor([[wrong, 0.5]]))
    assert tracker.values().tolist() == [0.5, 0.5]


def test_weights_that_sum_to_one_pay_one():
    """0.05 + 0.55 + 0.3 + 0.1 is a little above as floats, and counts as a success, no more."""
    total = 0.05 + 0.55 + 0.3 + 0.1
    assert total > 1
    one, two = ValueTracker(1), ValueTracker(1)
    one.update([0], [total], [0.0])
    two.update([0], [1.0], [0.0])
    assert torch.equal(one.alpha, two.alpha) and torch.equal(one.beta, two.beta)
    one.update([0], [-1e-9], [0.0])
    assert one.beta > two.beta


def uneven():
    tracker = ValueTracker(4)
    tracker.start(
        [0, 1, 2, 3], torch.tensor([[1.0] * 30, [1.0, 0.0] * 15, [0.0] * 30, [1.0, 0.0, 0.0] * 10])
    )
    return tracker


def test_sampling_weights_by_hand():
    tracker = uneven()
    expected = [math.sqrt(v * (1 - v)) + 0.05 for v in (30.5 / 31, 0.5, 0.5 / 31, 10.5 / 31)]
    assert tracker.sampling_weights().tolist() == pytest.approx(expected)


def test_draws_have_the_probabilities_of_their_weights():
    """Pairs, one after another: w_i / sum, then w_j / (sum - w_i)."""
    tracker, tries = uneven(), 6000
    weights = tracker.sampling_weights().tolist()
    drawn = [tuple(tracker.draw(2, seed)) for seed in range(tries)]
    for i, j in itertools.permutations(range(4), 2):
        p = weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i])
        assert abs(drawn.count((i, j)) / tries - p) < 4 * math.sqrt(p * (1 - p) / tries)
    assert all(len(set(pair)) == 2 for pair in drawn)


def test_draws_depend_on_the_seed_alone():
    tracker = ValueTracker(50)
    first = tracker.draw(8, 2**62 + 3)
    torch.rand(3)
    assert tracker.draw(8, 2**62 + 3) == first != tracker.draw(8, 4)
    assert sorted(tracker.draw(50, 1)) == list(range(50)) and all(type(i) is int for i in first)
    with pytest.raises(
        ValueError, match="--num_prompts 51: a step has different prompts, and there are 50"
    ):
        SingleStream([[1]] * 50, 51)
    SingleStream([[1]] * 50, 50)


def test_a_saved_tracker_resumes_bit_for_bit(tmp_path):
    def go(tracker, steps):
        for step in steps:
            items = tracker.draw(3, step)
            tracker.update(
                items,
                torch.rand(3, generator=torch.Generator().manual_seed(step)),
                torch.full((3,), 0.01 * step),
            )

    whole, part = ValueTracker(9), ValueTracker(9)
    go(whole, range(20))
    go(part, range(11))
    torch.save(part.state_dict(), tmp_path / "state.pt")
    kept = part.state_dict()
    go(part, range(11, 20))
    again = ValueTracker(9)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.alpha, kept["alpha"]) and not torch.equal(part.alpha, kept["alpha"])
    go(again, range(11, 20))
    for one in (part, again):
        assert torch.equal(one.alpha, whole.alpha) and torch.equal(one.beta, whole.beta)
    again.load_state_dict(kept)
    go(again, range(2))
    assert not torch.equal(again.alpha, kept["alpha"])  # it has a copy of its own


def test_a_bandit_learns_with_one_completion_of_a_prompt():
    """Six prompts of five arms, the best of which pays 1 with probability 0.95, the others 0.05 to
    0.5.
    """
    pays = torch.tensor([0.05, 0.2, 0.5, 0.1, 0.3]).repeat(6, 1)
    best = torch.tensor([0, 1, 2, 3, 4, 0])
    pays[torch.arange(6), best] = 0.95
    generator = torch.Generator().manual_seed(3)
    logits, acted = torch.zeros(6, 5, requires_grad=True), torch.zeros(6, 5)
    optimizer, tracker = torch.optim.Adam([logits], lr=0.03), ValueTracker(6)
    for step in range(600):
        items = tracker.draw(4, step)
        old = logits.detach().log_softmax(1)[items]
        kl = (old.exp() * (old - acted[items].log_softmax(1))).sum(1)
        arms = torch.multinomial(old.exp(), 1, generator=generator)
        rewards = (torch.rand(4, generator=generator) < pays[items].gather(1, arms)[:, 0]).double()
        advantages = whiten(rewards - tracker.values()[items]).float()
        tracker.update(items, rewards, kl)
        acted[items] = logits.detach()[items]
        log_probs = logits.log_softmax(1)[items].gather(1, arms)[:, 0]
        loss = clipped_loss(log_probs - old.gather(1, arms)[:, 0], advantages, 0.2, 0.28)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(1)[torch.arange(6), best].min() > 0.95
    assert (tracker.values() - 0.95).abs().max() < 0.2


# ---- the last samples, by which values are forgotten


PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [7, 7]]


def episode(item, seed, reward=0.0):
    """An episode of a prompt in which the environment wrote the third and the fourth token."""
    torch.manual_seed(seed)
    tokens = torch.randint(3, 6400, (6 + item,)).tolist()
    is_sampled = [i not in (2, 3) for i in range(len(tokens))]
    log_probs = [-float(torch.rand(1)) * 9 if sampled else 0.0 for sampled in is_sampled]
    return Sample(
        {"a": 1},
        PROMPTS[item],
        tokens,
        is_sampled,
        log_probs,
        "text",
        [{"role": "user"}],
        True,
        item,
        {"total": reward},
    )


@pytest.fixture
def policy(tmp_path):
    """(score of samples under a network, the folder of that network)."""
    folder = write_network(tmp_path / "net", 0, hidden_size=32, num_hidden_layers=2)
    model = MiniMindForCausalLM.from_pretrained(folder)
    run = SimpleNamespace(
        args=SimpleNamespace(max_seq_len=32, batch_size=2, temperature=0.7),
        device=torch.device("cpu"),
        ranks=Ranks(),
        autocast=torch.no_grad,
        to_device=lambda batch: batch,
    )
    return partial(sample_log_probs, run, model, 0), folder


def test_divergences_are_those_of_plain_forwards(policy):
    """Mean |log p then - log p now| over the policy's tokens of the last sample; 0 before there
    is one.
    """
    score, folder = policy
    last, network = LastSamples(PROMPTS), AutoModelForCausalLM.from_pretrained(folder)
    assert last.divergences([2, 0], lambda samples: pytest.fail("nothing to score")).tolist() == [
        0,
        0,
    ]
    last.remember([episode(0, 1), episode(3, 2), episode(1, 3)])
    last.remember([episode(1, 4)])
    expected = {2: 0.0}
    for item, seed in ((0, 1), (3, 2), (1, 4)):
        one = episode(item, seed)
        logits = (
            network(torch.tensor([one.prompt + one.tokens])).logits[0, len(one.prompt) - 1 : -1]
            / 0.7
        )
        now = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0].tolist()
        moved = [
            abs(then - x) for then, x, sampled in zip(one.log_probs, now, one.is_sampled) if sampled
        ]
        expected[item] = sum(moved) / len(moved)
    found = last.divergences([3, 1, 2, 0], score)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([expected[item] for item in (3, 1, 2, 0)], rel=1e-4)
    assert min(expected[item] for item in (0, 1, 3)) > 1


def test_saved_samples_come_back(policy, tmp_path):
    """Also none, and into a stream that has others; nothing but tensors is saved."""
    score, _ = policy
    empty, last = LastSamples(PROMPTS), LastSamples(PROMPTS)
    last.remember([episode(item, item) for item in (3, 0, 2)])
    for name, one in (("empty", empty), ("three", last)):
        torch.save(one.state_dict(), tmp_path / name)
    again = LastSamples(PROMPTS)
    again.remember([episode(1, 9)])
    again.load_state_dict(torch.load(tmp_path / "three", weights_only=True))
    assert torch.equal(
        again.divergences([0, 1, 2, 3], score), last.divergences([0, 1, 2, 3], score)
    )
    assert (
        sorted(again.samples) == [0, 2, 3]
        and again.samples[2].row == {}
        and again.samples[2].prompt == PROMPTS[2]
    )
    for item, one in again.samples.items():
        other = episode(item, item)
        assert (one.tokens, one.is_sampled, one.log_probs) == (
            other.tokens,
            other.is_sampled,
            other.log_probs,
        )
    again.load_state_dict(torch.load(tmp_path / "empty", weights_only=True))
    assert again.samples == {}


def test_a_stream_by_hand(policy):
    """Two rounds; the second forgets by how far the policy has moved since the first round."""
    score, _ = policy
    stream = SingleStream(PROMPTS, 3)
    stream.begin([0, 1, 2, 3], [1.0, 0.0, 1.0, 0.0])  # values 3/4 and 1/4 of 8 rewards
    samples = [episode(2, 1, 1.0), episode(1, 2, 1.0), episode(0, 3, 0.0)]
    assert stream.values(samples).tolist() == pytest.approx([0.75, 0.25, 0.75])
    stream.update(samples, score)
    values = [0.96 * 6 / 8.68, 2.92 / 8.68, 6.76 / 8.68, 0.25]
    assert stream.tracker.values().tolist() == pytest.approx(values)
    again = SingleStream(PROMPTS, 3)
    again.load_state_dict(stream.state_dict())
    for one in (stream, again):  # a sample that has moved by far more than the half-life
        one.update([episode(2, 5, 0.0), episode(3, 6, 0.0)], score)
        values[2:] = [0.875 * 6.76 / (0.875 * 8.68 + 1), 0.96 * 2 / 8.68]
        assert one.tracker.values().tolist() == pytest.approx(values)
        values[2:] = [6.76 / 8.68, 0.25]
        assert one.last.samples[2].tokens == episode(2, 5).tokens
