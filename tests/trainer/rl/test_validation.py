"""Held-out scores: of greedy completions to all prompts of all files, with an example."""

from types import SimpleNamespace

import pytest

from trainer.rl.rollout import Sample
from trainer.rl.validation import held_out_scores
from trainer.runtime.ranks import Ranks


class Rollout:
    def __init__(self):
        self.calls, self.watch = [], SimpleNamespace(lap=lambda: self.calls.append("lap"))

    def refresh(self, now=False):
        self.calls.append(("refresh", now))


class Sampler:
    """Completes each prompt with the number of its row."""

    def __init__(self):
        self.rollout, self.asked = Rollout(), []

    def __call__(self, dataset, items, seeds, temperature=None):
        self.asked.append((items, seeds, temperature))
        return [Sample(dataset.rows[i], [1], [5], [True], [0.0], f" {i} ", item=i) for i in items]


class Rewards:
    """Half the row's number, and 1."""

    def rate(self, samples):
        for one in samples:
            one.rewards = {"half": one.item / 2, "total": 1.0}
        return samples


class Rows(list):
    """A dataset of rows."""

    @property
    def rows(self):
        return self


def rows(count):
    return Rows({"conversations": [{"role": "user", "content": f"{i}? "}]} for i in range(count))


def test_means_of_greedy_completions():
    sampler, run = Sampler(), SimpleNamespace(ranks=Ranks())
    scores, text = held_out_scores(run, sampler, {"a": rows(3), "b": rows(1)}, Rewards(), 5)
    assert scores == {
        "val_reward/half/a": pytest.approx(0.5),
        "val_reward/total/a": 1,
        "val_reward/half/b": 0,
        "val_reward/total/b": 1,
    }
    assert sampler.asked == [([0, 1, 2], [0, 0, 0], 0), ([0], [0], 0)]
    assert sampler.rollout.calls == [("refresh", True), "lap"]
    assert text == (
        "a: half 0.500, total 1.000; '0?' -> '0'\nb: half 0.000, total 1.000; '0?' -> '0'"
    )


def test_the_ranks_divide_the_prompts():
    gathered = []
    ranks = SimpleNamespace(rank=1, world_size=2, gather=lambda x: gathered.append(x) or x)
    scores, _ = held_out_scores(SimpleNamespace(ranks=ranks), Sampler(), {"a": rows(3)}, Rewards())
    assert [one.item for one in gathered[0]] == [2] and scores["val_reward/half/a"] == 1


def test_without_held_out_prompts_nothing_is_handed_over():
    """To a server that would take minutes for it."""
    sampler = Sampler()
    assert held_out_scores(SimpleNamespace(ranks=Ranks()), sampler, {}, Rewards()) == ({}, "")
    assert ("refresh", True) not in sampler.rollout.calls
