"""The losses of PPO and its family against TRL's GRPO trainer, and where it has none against
float64 by hand.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from trainer.losses.advantages import group_advantages, whiten
from trainer.losses.policy import (
    cispo_loss,
    clipped_loss,
    kl_estimate,
    sequence_log_ratio,
    token_log_probs,
    token_weights,
    value_loss,
)

LENGTHS = [5, 1, 0, 7, 3, 2]  # of completions; TRL pads them, here they are concatenated
V, TEMPERATURE, LONGEST = 11, 0.7, 9
DOUBLE = {"dtype": torch.float64}


class Accelerator:
    """What TRL's trainer asks of accelerate, in one process."""

    num_processes, gather, reduce = (
        1,
        staticmethod(lambda x: x),
        staticmethod(lambda x, reduction: x),
    )


class Metrics(dict):
    def __missing__(self, key):
        return self.setdefault(key, Metrics() if key == "train" else [])


@pytest.fixture
def completions():
    """Logits [B, T, V], sampled ids [B, T], old and reference log-probabilities, advantages [B],
    and which tokens are there.
    """
    B, T = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    logits, ids = 2 * torch.randn(B, T, V, **DOUBLE), torch.randint(0, V, (B, T))
    ids[0], ids[3, 2:] = 0, 0  # the id that TRL pads with is a token like others
    log_probs = (logits / TEMPERATURE).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, reference = (log_probs + 0.3 * torch.randn(B, T, **DOUBLE) for _ in range(2))
    return SimpleNamespace(
        logits=logits.requires_grad_(),
        ids=ids,
        mask=mask,
        old=old,
        reference=reference,
        advantages=torch.tensor([1.3, -0.8, 0.4, -1.1, 0.9, 0.0], **DOUBLE),
    )


def trl_loss(completions, loss_type, level, low, high, beta):
    """(the loss of TRL's GRPOTrainer, its metrics)."""
    from trl import GRPOTrainer
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def outputs(*_, **__):
        return *selective_log_softmax_and_entropy(
            completions.logits, completions.ids, temperature=TEMPERATURE
        ), None

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=outputs,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        loss_type=loss_type,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        accelerator=Accelerator,
        _metrics=Metrics(),
    )
    mask = completions.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": completions.ids,
        "completion_mask": mask,
        "advantages": completions.advantages,
        "old_per_token_logps": completions.old,
        "ref_per_token_logps": completions.reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


FAMILY = [  # ours: loss_normalization, low, high; TRL's name, level, upper bound
    pytest.param("sequence", 0.2, 0.2, "grpo", "token", 0.2, id="grpo"),
    pytest.param("constant", 0.2, 0.2, "dr_grpo", "token", 0.2, id="dr_grpo"),
    pytest.param("token", 0.2, 0.28, "dapo", "token", 0.28, id="dapo"),
    pytest.param(
        "token", None, 0.3, "cispo", "token", 1.3, id="cispo"
    ),  # TRL's bound is the ratio itself
    pytest.param("sequence", 0.02, 0.03, "grpo", "sequence", 0.03, id="gspo"),
]


def part_of_loss(completions, rows, loss_normalization, low, high, level, beta):
    """((weights * losses).sum() of these completions alone, is_clipped, entropies)."""
    mask = completions.mask[rows]
    lengths = mask.sum(1)
    sequence = (7 + 10 * torch.tensor(rows)).repeat_interleave(lengths)
    log_probs, entropies = token_log_probs(
        completions.logits[rows][mask], completions.ids[rows][mask], TEMPERATURE
    )
    old, reference = completions.old[rows][mask], completions.reference[rows][mask]
    advantages = completions.advantages[rows].repeat_interleave(lengths)
    if low is None:
        losses, is_clipped = cispo_loss(log_probs, old, advantages, high)
    else:
        log_ratio = (
            sequence_log_ratio(log_probs, old, sequence) if level == "sequence" else log_probs - old
        )
        losses, is_clipped = clipped_loss(log_ratio, advantages, low, high)
    weights = token_weights(sequence, loss_normalization, len(LENGTHS), sum(LENGTHS), LONGEST)
    assert weights.dtype == torch.float32
    return (
        (weights * (losses + beta * kl_estimate(log_probs, reference, "k3"))).sum(),
        is_clipped,
        entropies,
    )


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("loss_normalization, low, high, name, level, upper", FAMILY)
def test_the_family_against_trl(
    loss_normalization, low, high, name, level, upper, beta, completions
):
    """Loss, gradient with respect to the logits, entropy, and the fraction that is clipped."""
    ours, is_clipped, entropies = part_of_loss(
        completions, list(range(6)), loss_normalization, low, high, level, beta
    )
    theirs, metrics = trl_loss(completions, name, level, low, upper, beta)
    gradients = [torch.autograd.grad(loss, completions.logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # weights are float32
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    assert (gradients[0][completions.mask].abs().amax(-1) > 0).sum() >= 5
    assert not gradients[0][~completions.mask].any()
    assert (
        entropies.mean().item() == pytest.approx(metrics["entropy"][0], rel=1e-6)
        and not entropies.requires_grad
    )
    assert 0 < is_clipped.sum() < is_clipped.numel()
    if name == "cispo":
        positive = (
            completions.advantages.repeat_interleave(torch.tensor(LENGTHS)) > 0
        )  # TRL counts these alone
        assert (is_clipped & positive).double().mean().item() == pytest.approx(
            metrics["cispo_clip_ratio"][0]
        )
        assert (is_clipped & ~positive).any()
    elif level == "token":
        assert is_clipped.double().mean().item() == pytest.approx(
            metrics["clip_ratio/region_mean"][0]
        )


@pytest.mark.parametrize("loss_normalization, low, high, name, level, upper", FAMILY)
def test_micro_batches_add_up(loss_normalization, low, high, name, level, upper, completions):
    whole, *parts = (
        part_of_loss(completions, rows, loss_normalization, low, high, level, 0.1)[0]
        for rows in ([0, 1, 2, 3, 4, 5], [5, 3], [2], [4, 0, 1])
    )
    torch.testing.assert_close(sum(parts), whole)
    gradients = [torch.autograd.grad(loss, completions.logits)[0] for loss in (whole, sum(parts))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_log_probs_and_entropies_by_hand(dtype, tolerance):
    """With more rows than are looked at at once; bfloat16 logits are looked at in float32."""
    logits = (3 * torch.randn(300, 5, **DOUBLE)).to(dtype).requires_grad_()
    targets = torch.randint(0, 5, (300,))
    log_probs, entropies = token_log_probs(logits, targets, 0.7)
    assert log_probs.dtype == entropies.dtype == torch.promote_types(dtype, torch.float32)
    for row, target, log_p, entropy in zip(
        logits.tolist(), targets.tolist(), log_probs.tolist(), entropies.tolist()
    ):
        p = [math.exp(x / 0.7) for x in row]
        p = [x / sum(p) for x in p]
        assert log_p == pytest.approx(math.log(p[target]), rel=tolerance, abs=tolerance)
        assert entropy == pytest.approx(
            -sum(x * math.log(x) for x in p), rel=tolerance, abs=tolerance
        )
    log_probs.sum().backward()
    one_hot = torch.nn.functional.one_hot(targets, 5)
    expected = (one_hot - (logits.detach().double() / 0.7).softmax(-1)) / 0.7
    rounding = (
        1e-2 if dtype == torch.bfloat16 else tolerance
    )  # of the gradient, which is in the logits' type
    torch.testing.assert_close(logits.grad.double(), expected, rtol=rounding, atol=1e-5)


def test_a_micro_batch_without_tokens():
    logits, nothing = torch.empty(0, 5, requires_grad=True), torch.empty(0, dtype=torch.long)
    log_probs, entropies = token_log_probs(logits, nothing, 1.0)
    old = torch.empty(0)
    losses = [
        clipped_loss(sequence_log_ratio(log_probs, old, nothing), old, 0.2, 0.2)[0],
        cispo_loss(log_probs, old, old, 4.0)[0],
        value_loss(log_probs, old, old, 0.2),
        kl_estimate(log_probs, old, "k3"),
    ]
    for loss_normalization in ("token", "sequence", "constant"):
        for loss in losses:
            total = (token_weights(nothing, loss_normalization, 3, 7, 9) * loss).sum()
            assert total.item() == 0 and torch.autograd.grad(total, logits, retain_graph=True)[
                0
            ].shape == (0, 5)
    assert entropies.shape == (0,)


def test_clipped_loss_by_hand():
    log_ratio = torch.linspace(-1, 1, 41, **DOUBLE).requires_grad_()
    for advantage in (1.7, -1.7):
        losses, is_clipped = clipped_loss(
            log_ratio, torch.full((41,), advantage, **DOUBLE), 0.2, 0.28
        )
        gradients = torch.autograd.grad(losses.sum(), log_ratio)[0]
        for x, loss, gradient, clipped in zip(
            log_ratio.tolist(), losses.tolist(), gradients.tolist(), is_clipped.tolist()
        ):
            ratio, bound = math.exp(x), 1.28 if advantage > 0 else 0.8
            beyond = ratio > bound if advantage > 0 else ratio < bound
            assert clipped == beyond
            assert loss == pytest.approx(-(bound if beyond else ratio) * advantage)
            assert gradient == pytest.approx(0.0 if beyond else -ratio * advantage)
        assert 10 < is_clipped.sum() < 20


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_at_the_bound_keeps_its_gradient(advantage):
    start = torch.tensor([1.5 if advantage > 0 else 0.75], **DOUBLE).log()
    at, beyond = (
        start.clone().requires_grad_(),
        (start + math.copysign(1e-9, advantage)).requires_grad_(),
    )
    bound = abs(start.exp().item() - 1)
    losses, is_clipped = clipped_loss(at, torch.tensor([advantage], **DOUBLE), bound, bound)
    losses.backward()
    assert not is_clipped and at.grad.item() == -start.exp().item() * advantage
    losses, is_clipped = clipped_loss(beyond, torch.tensor([advantage], **DOUBLE), bound, bound)
    losses.backward()
    assert is_clipped and beyond.grad.item() == 0


def test_tokens_without_advantage_are_not_called_clipped():
    losses, is_clipped = clipped_loss(torch.tensor([-3.0, 0.0, 3.0]), torch.zeros(3), 0.2, 0.2)
    assert not losses.any() and not is_clipped.any()


def test_cispo_by_hand():
    """Every token keeps a gradient, min(ratio, 1 + high) A; the ratio itself is a constant."""
    log_probs = torch.tensor([-0.1, -2.0, -1.0, -4.0], **DOUBLE, requires_grad=True)
    old, advantages = (
        torch.tensor([-3.0, -0.5, -1.0, -6.0], **DOUBLE),
        torch.tensor([1.0, 2.0, -0.5, -1.5], **DOUBLE),
    )
    losses, is_clipped = cispo_loss(log_probs, old, advantages, 4.0)
    losses.sum().backward()
    assert is_clipped.tolist() == [True, False, False, True]
    for i, weight in enumerate([5.0, math.exp(-1.5), 1.0, 5.0]):
        assert losses[i].item() == pytest.approx(
            -weight * advantages[i].item() * log_probs[i].item()
        )
        assert log_probs.grad[i].item() == pytest.approx(-weight * advantages[i].item())


def test_the_ratio_of_a_sequence_is_a_geometric_mean():
    """At each token; numbers of sequences may have gaps and come in any order. All tokens share the
    gradient.
    """
    lengths, names = [3, 1, 4], [40, 7, 12]
    log_probs = -torch.rand(8, **DOUBLE)
    log_probs.requires_grad_()
    old = -torch.rand(8, **DOUBLE)
    found = sequence_log_ratio(
        log_probs, old, torch.tensor(names).repeat_interleave(torch.tensor(lengths))
    )
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, 0.5, 0.5, 0.5, 0.5], **DOUBLE)
    clipped_loss(found, advantages, 9.0, 9.0)[0].sum().backward()
    start = 0
    for length in lengths:
        inside = range(start, start + length)
        ratio = math.prod(math.exp(log_probs[t].item() - old[t].item()) for t in inside) ** (
            1 / length
        )
        for t in inside:
            assert math.exp(found[t].item()) == pytest.approx(ratio)
            assert log_probs.grad[t].item() == pytest.approx(
                -ratio * advantages[t].item()
            )  # 1 / length of each token's loss
        start += length


def test_kl_estimates_by_hand():
    log_probs, reference = torch.tensor([-0.5, -2.0, -1.0]), torch.tensor([-1.5, -0.25, -1.0])
    for kind, expected in {
        "k1": [1.0, -1.75, 0.0],
        "k2": [0.5, 1.53125, 0.0],
        "k3": [math.exp(-1) - 1 + 1, math.exp(1.75) - 1 - 1.75, 0.0],
    }.items():
        torch.testing.assert_close(kl_estimate(log_probs, reference, kind), torch.tensor(expected))


def test_kl_estimates_on_average():
    """Over all tokens of a vocabulary: k1 and k3 are right, k2 nearly; the gradients are those that
    the docstring names.
    """
    logits = torch.randn(9, **DOUBLE).requires_grad_()
    reference = (logits.detach() + 0.3 * torch.randn(9, **DOUBLE)).log_softmax(0)
    log_p = logits.log_softmax(0)
    p, divergence = log_p.exp(), (log_p.exp() * (log_p - reference)).sum()
    reverse = (reference.exp() * (reference - log_p)).sum()
    means = {
        kind: (p.detach() * kl_estimate(log_p, reference, kind)).sum()
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(means["k1"], divergence)
    torch.testing.assert_close(means["k3"], divergence)
    assert means["k2"].item() == pytest.approx(divergence.item(), rel=0.3)
    gradient = {
        name: torch.autograd.grad(x, logits, retain_graph=True)[0]
        for name, x in {**means, "forward": divergence, "reverse": reverse}.items()
    }
    torch.testing.assert_close(gradient["k1"], torch.zeros(9, **DOUBLE))
    torch.testing.assert_close(gradient["k2"], gradient["forward"])
    torch.testing.assert_close(gradient["k3"], gradient["reverse"])
    assert (gradient["forward"] - gradient["reverse"]).abs().max() > 1e-3


def test_value_loss_by_hand():
    #         within        beyond, towards R  beyond, away from R  beyond, past R  at the bound
    values = [0.1, 0.9, -0.9, 0.9, 0.25]
    returns = [1.0, 1.0, 1.0, 0.1, 1.0]
    expected = [0.9**2, 0.75**2, 1.9**2, 0.8**2, 0.75**2]
    gradients = [-0.9, 0.0, -1.9, 0.8, -0.75]
    values = torch.tensor(values, **DOUBLE).requires_grad_()
    losses = value_loss(values, torch.zeros(5, **DOUBLE), torch.tensor(returns, **DOUBLE), 0.25)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor(expected, **DOUBLE) / 2)
    torch.testing.assert_close(values.grad, torch.tensor(gradients, **DOUBLE))


def test_weights_by_hand():
    sequence = torch.tensor([4, 4, 4, 2, 9, 9])
    torch.testing.assert_close(token_weights(sequence, "token", 5, 20, 8), torch.full((6,), 0.05))
    torch.testing.assert_close(
        token_weights(sequence, "constant", 5, 20, 8), torch.full((6,), 0.025)
    )
    torch.testing.assert_close(
        token_weights(sequence, "sequence", 5, 20, 8),
        torch.tensor([1 / 15, 1 / 15, 1 / 15, 1 / 5, 1 / 10, 1 / 10]),
    )


# A bandit: a completion is three draws from five arms, its reward the mean of their pays.

PAYS = torch.tensor([0.0, 0.3, 1.0, 0.6, 0.5])


def bandit_probability(loss_of, advantages_of, loss_normalization, num_updates=2):
    """The probability of the best arm after 120 steps of 6 prompts x 8 completions and
    `num_updates` updates.
    """
    generator = torch.Generator().manual_seed(5)
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    sequence = torch.arange(48).repeat_interleave(3)
    assert logits.softmax(0)[2].item() == pytest.approx(0.2)
    for _ in range(120):
        arms = torch.multinomial(
            logits.detach().softmax(0), 144, replacement=True, generator=generator
        )
        rewards = PAYS[arms].view(6, 8, 3).mean(-1)
        advantages = advantages_of(rewards).flatten().repeat_interleave(3)
        old = logits.detach().log_softmax(0)[arms]
        for _ in range(num_updates):
            log_probs, _ = token_log_probs(logits.expand(144, 5), arms, 1.0)
            losses, _ = loss_of(log_probs, old, advantages, sequence)
            loss = (token_weights(sequence, loss_normalization, 48, 144, 3) * losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.softmax(0)[2].item()


def clip(low, high):
    return lambda log_probs, old, advantages, sequence: clipped_loss(
        log_probs - old, advantages, low, high
    )


def gspo(log_probs, old, advantages, sequence):
    return clipped_loss(sequence_log_ratio(log_probs, old, sequence), advantages, 0.1, 0.15)


def cispo(log_probs, old, advantages, sequence):
    return cispo_loss(log_probs, old, advantages, 4.0)


def whitened(rewards):
    return whiten(rewards.flatten())


@pytest.mark.parametrize(
    "loss_of, advantages_of, loss_normalization",
    [
        pytest.param(clip(0.2, 0.2), group_advantages, "sequence", id="grpo"),
        pytest.param(
            clip(0.2, 0.2),
            lambda rewards: group_advantages(rewards, "none"),
            "constant",
            id="dr_grpo",
        ),
        pytest.param(clip(0.2, 0.28), group_advantages, "token", id="dapo"),
        pytest.param(
            clip(0.2, 0.2), lambda rewards: group_advantages(rewards, "batch"), "token", id="batch"
        ),
        pytest.param(cispo, group_advantages, "token", id="cispo"),
        pytest.param(gspo, group_advantages, "sequence", id="gspo"),
        pytest.param(clip(0.2, 0.2), whitened, "token", id="whitened"),
    ],
)
def test_a_bandit_learns_the_best_arm(loss_of, advantages_of, loss_normalization):
    assert bandit_probability(loss_of, advantages_of, loss_normalization) > 0.95
