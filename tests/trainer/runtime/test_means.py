"""Sums and means by name, of several micro-batches and of two ranks."""

import threading
from types import SimpleNamespace

import pytest
import torch

from trainer.runtime.means import Means, average

ALONE = SimpleNamespace(sum_tensor=lambda x: x)


class Pair:
    """Two ranks in two threads, whose tables are added up; `calls` counts the exchanges."""

    def __init__(self):
        self.tables, self.barrier, self.calls = [], threading.Barrier(2), 0

    def sum_tensor(self, x):
        self.calls += 1
        self.tables.append(x)
        self.barrier.wait(5)
        return sum(self.tables)


def test_parts_of_a_total_add_up():
    means = Means()
    for part in (0.25, torch.tensor([0.5, 0.125])):
        means.add(loss=part)
    assert means.reduce(ALONE) == {"loss": 0.875}


def test_values_of_items_become_their_mean():
    means = Means()
    means.add(2, loss=torch.tensor([1.0, 2.0]), entropy=torch.tensor([0.5, 0.5]))
    means.add(torch.tensor(3), loss=torch.tensor([[3.0], [4.0], [5.0]]), entropy=2.0)
    means.add(kl=0.25)
    assert means.reduce(ALONE) == pytest.approx({"loss": 3.0, "entropy": 0.6, "kl": 0.25})


def test_reducing_starts_again():
    means = Means()
    means.add(1, loss=4.0)
    means.reduce(ALONE)
    assert means.reduce(ALONE) == {}
    means.add(1, other=2.0)
    assert means.reduce(ALONE) == {"other": 2.0}


def test_a_mean_over_nothing_is_left_out():
    """Such as the accuracy of a step of single completions."""
    means = Means()
    means.add(0, accuracy=torch.zeros(2))
    means.add(torch.tensor(0), accuracy=torch.zeros(0))
    means.add(2, loss=3.0)
    assert means.reduce(ALONE) == {"loss": 1.5}


def test_sums_are_float64_and_keep_no_graph():
    means, x = Means(), torch.full((3,), 0.1, requires_grad=True)
    for _ in range(1000):
        means.add(loss=x[0] * 1e-4)
    means.add(loss=x[0] * 1e4)
    total = means.sums["loss"]
    assert total.dtype == torch.float64 and not total.requires_grad
    expected = 1000 * x.detach()[0].mul(1e-4).double() + x.detach()[0].mul(1e4).double()
    assert means.reduce(ALONE)["loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_two_ranks_have_the_mean_of_all_items_by_one_exchange():
    """Of 3 items on one rank and 1 on the other; the second rank has none of a third kind."""
    pair, results = Pair(), [None, None]

    def rank(number, items, pairs):
        means = Means()
        means.add(len(items), reward=torch.tensor(items))
        means.add(len(pairs), margin=torch.tensor(pairs))
        means.add(loss=0.5 + number)
        results[number] = means.reduce(pair)

    threads = [
        threading.Thread(target=rank, args=given)
        for given in ((0, [1.0, 2.0, 3.0], [4.0]), (1, [10.0], []))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == {"reward": 4.0, "margin": 4.0, "loss": 2.0}
    assert pair.calls == 2  # one of each rank


def test_the_average_of_several_updates():
    updates = [{"loss": 1.0, "kl": 0.5}, {"loss": 2.0, "kl": 0.0}]
    assert average(updates) == {"loss": 1.5, "kl": 0.25}
    assert average([]) == {}
