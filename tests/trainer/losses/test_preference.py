"""The losses that learn from preferences against TRL's own code, and where it has none against
float64 by hand.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from trainer.losses.preference import (
    bradley_terry_loss,
    completion_log_probs,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pair_losses,
    robust_loss,
    simpo_loss,
)

N = 7


@pytest.fixture
def completions():
    """log p and log p_ref of N pairs [N, 2], which want a gradient, and their lengths."""
    lengths = torch.randint(1, 9, (N, 2))
    policy, reference = (-3 * lengths * torch.rand(N, 2) - 0.1 for _ in range(2))
    return policy.requires_grad_(), reference, lengths


class Gathers:
    """What TRL's trainers ask of accelerate, in one process."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda x: x)


class Metrics(dict):
    def __missing__(self, key):
        return self.setdefault(key, Metrics() if key in ("train", "eval") else [])


def trl_output(log_probs, lengths):
    """A model output with fused log-probabilities of completions [2N, T], spread evenly over their
    tokens, after one token.
    """
    T = int(lengths.max())
    inside = torch.arange(T) < lengths[:, None]
    per_token = (log_probs / lengths)[:, None] * inside
    blank = torch.zeros_like(per_token)
    output = SimpleNamespace(
        log_probs=per_token, entropy=blank, mean_logits=blank, is_top1=blank.bool(), aux_loss=None
    )
    return output, torch.cat([torch.zeros(len(lengths), 1), inside], 1).long()


def trl_dpo(loss_type, policy, reference, lengths, beta, label_smoothing=0.0):
    """The mean loss that TRL's DPOTrainer computes."""
    from trl import DPOTrainer

    stacked = torch.cat([policy[:, 0], policy[:, 1]])
    output, mask = trl_output(stacked, torch.cat([lengths[:, 0], lengths[:, 1]]))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Gathers,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=Metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)


def assert_same(ours, theirs, policy):
    """Both means, and their gradients with respect to log p."""
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo(label_smoothing, completions):
    policy, reference, lengths = completions
    margin = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    if label_smoothing == 0:
        assert_same(
            dpo_loss(margin, 0.3).mean(),
            trl_dpo("sigmoid", policy, reference, lengths, 0.3),
            policy,
        )
    ours = dpo_loss(margin, 0.3, label_smoothing)
    for one, loss in zip(margin.double().tolist(), ours.tolist()):
        right = 1 / (1 + math.exp(-0.3 * one))
        assert loss == pytest.approx(
            -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(1 - right),
            rel=1e-5,
        )


def test_the_loss_of_equal_completions_is_ln_2():
    assert (
        dpo_loss(torch.zeros(1), 0.1).item()
        == robust_loss(torch.zeros(1), 0.1, 0.2).item()
        == pytest.approx(math.log(2))
    )


def test_robust_dpo(completions):
    policy, reference, lengths = completions
    margin = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    assert_same(
        robust_loss(margin, 0.3, 0.2).mean(),
        trl_dpo("robust", policy, reference, lengths, 0.3, 0.2),
        policy,
    )
    # its point: over pairs of which a fifth is flipped, the mean is DPO's over the right ones
    mixed = 0.8 * robust_loss(margin, 0.3, 0.2) + 0.2 * robust_loss(-margin, 0.3, 0.2)
    torch.testing.assert_close(mixed, dpo_loss(margin, 0.3))


def test_ipo(completions):
    policy, reference, lengths = completions
    ratio = (policy - reference) / lengths
    assert_same(
        ipo_loss(*ratio.unbind(1), 0.3).mean(),
        trl_dpo("ipo", policy, reference, lengths, 0.3),
        policy,
    )


def test_simpo(completions):
    from trl.experimental.cpo import CPOTrainer

    policy, _, lengths = completions
    average = policy / lengths
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=Gathers,
        loss_type="simpo",
        simpo_gamma=1.2,
        beta=2.5,
        label_smoothing=0.0,
    )
    losses, chosen, _ = CPOTrainer.cpo_loss(trainer, *average.unbind(1))
    assert_same(simpo_loss(*average.unbind(1), 2.5, 1.2).mean(), losses.mean(), policy)
    torch.testing.assert_close(chosen, 2.5 * average[:, 0].detach())


def test_orpo(completions):
    from trl.experimental.orpo import ORPOTrainer

    policy, _, lengths = completions
    average = policy / lengths
    odds = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(beta=0.3, accelerator=Gathers), *average.unbind(1)
    )[0]
    assert_same(orpo_loss(*average.unbind(1), 0.3).mean(), (-average[:, 0] - odds).mean(), policy)
    for (chosen, rejected), loss in zip(
        average.double().tolist(), orpo_loss(*average.unbind(1), 0.3).tolist()
    ):
        ratio = (
            math.exp(chosen)
            / (1 - math.exp(chosen))
            / (math.exp(rejected) / (1 - math.exp(rejected)))
        )
        assert loss == pytest.approx(-chosen - 0.3 * math.log(1 / (1 + 1 / ratio)), rel=1e-5)
    certain = torch.zeros(1, requires_grad=True)
    orpo_loss(certain, torch.tensor([-1.0]), 0.3).backward()
    assert certain.grad.isfinite()


@pytest.mark.parametrize("shift", [1.5, -9.0])
def test_kto(shift, completions):
    """Against TRL's trainer, whose KL is the mean ratio of its mismatched completions: below 0 it
    counts as 0.
    """
    from trl import KTOTrainer

    policy, reference, lengths = completions
    policy, reference, lengths = policy[:, 0], reference[:, 0], lengths[:, 0]
    is_desirable = torch.tensor([True, False, False, True, True, False, True])
    mismatched, mismatched_reference = torch.rand(N) + shift, torch.rand(N)
    output, mask = trl_output(policy, lengths)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Gathers,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _metrics=Metrics(),
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": is_desirable,
        "ref_logps": reference,
        "ref_KL_logps": mismatched_reference,
    }
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    kl = max(0.0, (mismatched - mismatched_reference).mean().item())
    ours = kto_loss(policy - reference, is_desirable, kl, 0.3, 1.3, 0.7).mean()
    assert_same(ours, theirs, policy)


@pytest.mark.parametrize("coefficient", [0.0, 0.05])
def test_the_reward_models_loss(coefficient, completions):
    from trl import RewardTrainer

    rewards = completions[0]  # N 2
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Gathers,
        aux_loss_enabled=False,
        _metrics=Metrics(),
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        _total_train_tokens=0,
        _tp_size=1,
    )
    output = SimpleNamespace(logits=torch.cat(rewards.unbind(1))[:, None])
    mask = torch.ones(2 * N, 3, dtype=torch.long)
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: output, {"input_ids": mask, "attention_mask": mask}
    )
    assert_same(bradley_terry_loss(*rewards.unbind(1), coefficient).mean(), theirs, completions[0])


def settings(loss_type, **changes):
    flags = dict(beta=0.3, gamma=1.2, label_smoothing=0.2, sft_weight=0.0)
    flags |= dict(desirable_weight=1.3, undesirable_weight=0.7)
    return SimpleNamespace(loss_type=loss_type, **flags | changes)


def test_the_loss_of_a_stages_flags(completions):
    policy, reference, lengths = completions
    ratio, average = policy - reference, policy / lengths
    margin = ratio[:, 0] - ratio[:, 1]
    expected = {
        "sigmoid": dpo_loss(margin, 0.3, 0.2),
        "robust": robust_loss(margin, 0.3, 0.2),
        "ipo": ipo_loss(*(ratio / lengths).unbind(1), 0.3),
        "kto": kto_loss(ratio[:, 0], torch.tensor(True), 0.5, 0.3, 1.3, 0.7)
        + kto_loss(ratio[:, 1], torch.tensor(False), 0.5, 0.3, 1.3, 0.7),
    }
    for loss_type, theirs in expected.items():
        ours, rewards = pair_losses(settings(loss_type), policy, reference, lengths, 0.5)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(rewards, 0.3 * ratio.detach())
    without = {
        "simpo": simpo_loss(*average.unbind(1), 0.3, 1.2),
        "orpo": orpo_loss(*average.unbind(1), 0.3),
    }
    for loss_type, theirs in without.items():
        ours, rewards = pair_losses(settings(loss_type), policy, None, lengths, 0.0)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(rewards, 0.3 * average.detach())
        assert not rewards.requires_grad


def test_the_chosen_completion_may_be_learned_too(completions):
    policy, reference, lengths = completions
    plain, _ = pair_losses(settings("sigmoid"), policy, reference, lengths, 0.0)
    more, _ = pair_losses(settings("sigmoid", sft_weight=0.5), policy, reference, lengths, 0.0)
    torch.testing.assert_close(more, plain - 0.5 * policy[:, 0] / lengths[:, 0])


def test_a_missing_completion_has_no_loss():
    """KTO on single completions, of which the other side has length 0 and log p 0."""
    policy, reference = torch.tensor([[-2.0, 0.0], [0.0, -3.0]]), torch.tensor([[-1.0, 0], [0, -5]])
    lengths = torch.tensor([[3, 0], [0, 2]])
    losses, rewards = pair_losses(settings("kto"), policy, reference, lengths, 0.25)
    single = [
        kto_loss(torch.tensor([-1.0]), torch.tensor([True]), 0.25, 0.3, 1.3, 0.7),
        kto_loss(torch.tensor([2.0]), torch.tensor([False]), 0.25, 0.3, 1.3, 0.7),
    ]
    torch.testing.assert_close(losses, torch.cat(single))
    assert rewards[0, 1] == rewards[1, 0] == 0


def test_log_probs_of_completions_are_sums_over_their_tokens():
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    batch = {
        "source": [0, 1, 0, 2, 4],
        "side": [0, 0, 1, 1, 3],
        "targets": [3, 9, 4, 0, 10],
        "lengths": [[2, 2], [0, 1]],
    }
    batch = {name: torch.tensor(x) for name, x in batch.items()}
    found = completion_log_probs(logits, batch)
    p = logits.softmax(-1)
    expected = torch.stack(
        [
            p[0, 3].log() + p[1, 9].log(),
            p[0, 4].log() + p[2, 0].log(),
            torch.zeros(()),
            p[4, 10].log(),
        ]
    )
    torch.testing.assert_close(found.double(), expected.view(2, 2), rtol=1e-6, atol=1e-6)
