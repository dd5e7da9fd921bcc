"""Divergences against float64 and TRL; chunks against one piece, in result and in memory."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trl.experimental.gkd import GKDTrainer

from trainer.losses.distillation import distillation_sums, generalised_jsd

V = 50


def logits(*shape, seed=0, scale=3.0):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    )


def by_hand(teacher, student, beta, temperature):
    """JSD(beta) of each row from probabilities, in float64, with F.kl_div: KL(target ||
    exp(input)).
    """
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if beta == 0:
        return F.kl_div(q.log(), p, reduction="none").sum(-1)
    if beta == 1:
        return F.kl_div(p.log(), q, reduction="none").sum(-1)
    m = beta * p + (1 - beta) * q
    return (
        beta * F.kl_div(m.log(), p, reduction="none")
        + (1 - beta) * F.kl_div(m.log(), q, reduction="none")
    ).sum(-1)


def identity(x):
    return x


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_divergences_are_those_of_kl_div_and_of_trl(beta, temperature):
    """And so are their gradients. TRL has no factor T^2."""
    teacher, student = logits(7, V), logits(7, V, seed=1).requires_grad_()
    labels = torch.tensor([3, -100, 4, 5, -100, 6, 7])
    divergence, nll = distillation_sums(
        student.float(), teacher.float(), labels, identity, identity, beta, temperature
    )
    expected = temperature**2 * by_hand(teacher, student, beta, temperature).sum()
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-5)
    trl = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    assert divergence.item() == pytest.approx(temperature**2 * trl.item(), rel=1e-5)
    assert nll.item() == pytest.approx(
        F.cross_entropy(student, labels, reduction="sum").item(), rel=1e-5
    )
    (ours,) = torch.autograd.grad(divergence, student)
    for reference in (expected, temperature**2 * trl):
        torch.testing.assert_close(
            ours, torch.autograd.grad(reference, student)[0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "masked", [[True] * 8, [True, False, True, True, False, False, True, True]]
)
def test_the_mixed_loss_is_that_of_trl_on_a_batch(masked):
    """Per target token of the batch, as TRL's `num_items_in_batch` has it."""
    teacher, student, kept = (
        logits(2, 4, V),
        logits(2, 4, V, seed=1),
        torch.tensor(masked).view(2, 4),
    )
    labels = torch.where(kept, 5, -100)
    trl = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=0.5, num_items_in_batch=kept.sum()
    )
    divergence, _ = distillation_sums(
        student[kept], teacher[kept], labels[kept], identity, identity, 0.5, chunk_size=3
    )
    assert (divergence / kept.sum()).item() == pytest.approx(trl.item(), rel=1e-5)


def test_the_ends_of_jsd_are_the_limits_that_its_docstring_says():
    log_p, log_q = (
        logits(5, V, scale=1).log_softmax(-1),
        logits(5, V, seed=1, scale=1).log_softmax(-1),
    )
    tiny = 1e-6
    for end, near in (
        (generalised_jsd(log_p, log_q, 0), generalised_jsd(log_p, log_q, tiny) / tiny),
        (generalised_jsd(log_p, log_q, 1), generalised_jsd(log_p, log_q, 1 - tiny) / tiny),
    ):
        torch.testing.assert_close(end, near, rtol=1e-3, atol=1e-4)
    assert (generalised_jsd(log_p, log_q, 0) - generalised_jsd(log_p, log_q, 1)).abs().min() > 0.01
    swapped = generalised_jsd(log_q, log_p, 0.3)
    torch.testing.assert_close(generalised_jsd(log_p, log_q, 0.7), swapped)  # by its definition
    for beta in (0, 0.5, 1):
        torch.testing.assert_close(
            generalised_jsd(log_p, log_p, beta), torch.zeros(5, dtype=torch.float64)
        )
    assert generalised_jsd(log_p, log_q, 0.5).max() <= math.log(2)


def test_probabilities_of_zero_in_float32_give_finite_gradients():
    """Logits 200 apart: a probability underflows, its logarithm does not."""
    for beta in (0, 0.5, 1):
        student, teacher = (
            torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True),
            torch.tensor([[200.0, 0.0, 0.0]]),
        )
        divergence, nll = distillation_sums(
            student, teacher, torch.tensor([0]), identity, identity, beta
        )
        (divergence + nll).backward()
        assert (
            divergence.item() == pytest.approx(math.log(2) if beta == 0.5 else 200)
            and student.grad.isfinite().all()
        )


def test_soft_targets_weigh_the_same_at_every_high_temperature():
    """Hinton et al. 2015, section 2.1: with zero-mean logits T^2 times the gradient tends to
    (student - teacher) / V.
    """
    teacher, student = logits(4, V, scale=1), logits(4, V, seed=1, scale=1).requires_grad_()
    divergence, _ = distillation_sums(
        student, teacher, torch.zeros(4, dtype=torch.long), identity, identity, temperature=300.0
    )
    (gradient,) = torch.autograd.grad(divergence, student)
    centred = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    torch.testing.assert_close(gradient, (centred / V).detach(), rtol=0.05, atol=1e-3)


def networks(n, D=16, vocabulary=V):
    """(student's hidden states [n, D], teacher's [n, 2 D], labels, both heads), float32."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, D, requires_grad=True), torch.randn(n, 2 * D)
    heads = (
        nn.Linear(D, vocabulary, bias=False),
        nn.Linear(2 * D, vocabulary, bias=False).requires_grad_(False),
    )
    return student, teacher, torch.arange(n) % vocabulary, *heads


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("chunk_size", [1, 7, 32])
def test_chunks_change_neither_the_sums_nor_a_gradient(chunk_size, beta):
    results = []
    for size in (chunk_size, 1000):
        student, teacher, labels, head, teacher_head = networks(50)
        divergence, nll = distillation_sums(
            student, teacher, labels, head, teacher_head, beta, 2.0, size
        )
        (0.7 * divergence + 0.3 * nll).backward()
        results.append((divergence.detach(), nll.detach(), student.grad, head.weight.grad))
    for ours, whole in zip(*results):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_no_position_at_all_is_zero_and_reaches_every_parameter():
    student, teacher, labels, head, teacher_head = networks(0)
    divergence, nll = distillation_sums(student, teacher, labels, head, teacher_head)
    (divergence + nll).backward()
    assert divergence == nll == 0 and torch.equal(head.weight.grad, torch.zeros_like(head.weight))


class LiveBytes(TorchDispatchMode):
    """`most`: the largest sum, at any time, of the bytes of all tensors that were made in this
    context and are still there.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, name, size):
        self.seen.discard(name)
        self.now -= size


def most_bytes(n, chunk_size):
    student, teacher, labels, head, teacher_head = networks(n, vocabulary=4000)
    with LiveBytes() as live:
        sum(
            distillation_sums(student, teacher, labels, head, teacher_head, 0.5, 2.0, chunk_size)
        ).backward()
    return live.most


def test_memory_does_not_grow_with_the_number_of_positions():
    """Forward and backward together; what grows is hidden states, 16 wide here, and their
    gradients.
    """
    chunked = [most_bytes(n, 32) for n in (64, 256, 1024)]
    whole = [most_bytes(n, 1024) for n in (64, 256, 1024)]
    assert (
        whole[2] > 10 * whole[0] and whole[2] > 5 * 4 * 1024 * 4000
    )  # the measure sees logits: five at least of them
    assert chunked[2] < 1.2 * chunked[0] and chunked[2] < 15 * 4 * 32 * 4000


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_backward():
    kept = []
    student, teacher, labels, head, teacher_head = networks(96)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        distillation_sums(student, teacher, labels, head, teacher_head, chunk_size=32)
        assert max(kept, default=0) <= student.numel()
        F.cross_entropy(head(student), labels)
    assert max(kept) >= 96 * V  # so the measure would have seen it
