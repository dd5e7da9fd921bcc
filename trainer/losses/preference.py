"""Losses of a chosen and a rejected completion: the DPO family and the reward model, written out.

All take log-probabilities of whole completions, log p(y | x) summed over the tokens of y, float
[N], and give the loss of each pair (`kto_loss`: of each completion), [N]. `ratio` is log p(y | x) -
log p_ref(y | x), under the trained network and under the frozen one that training began with;
`margin` the chosen completion's ratio minus the rejected one's. `average` is the mean
log-probability of a token of the completion.
"""

from typing import Any

import torch
import torch.nn.functional as F


def completion_log_probs(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of completions, float32 [N, 2], from logits [n, V] at the sources (`collate_trees`)."""
    logits = logits.float()
    source, side = batch["source"], batch["side"]
    log_probs = logits[source, batch["targets"]] - logits.logsumexp(-1)[source]  # M
    return log_probs.new_zeros(batch["lengths"].numel()).index_add(0, side, log_probs).view(-1, 2)


def dpo_loss(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7).

    label_smoothing: the fraction of pairs that are assumed to be swapped; the loss is its
    expectation then (conservative DPO: Mitchell 2023).
    """
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def robust_loss(margin: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """((1 - e) loss of the pair - e loss of the flipped one) / (1 - 2e), e = label_smoothing < 1/2.

    Its mean over pairs of which a fraction e is swapped is the DPO loss of the right ones
    (Chowdhury et al. 2024, the unbiased loss).
    """
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def ipo_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """(difference - 1 / (2 beta))^2: a margin to reach, not to exceed (Azar et al. 2023, eq. 17).

    The ratios are means over the tokens of their completions here: sums would ask the same margin
    of short and of long ones.
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen_average: torch.Tensor, rejected_average: torch.Tensor, beta: float, gamma: float
) -> torch.Tensor:
    """-log sigmoid(beta * (difference of averages) - gamma), without a reference (Meng et al. 2024,
    eq. 6).
    """
    return -F.logsigmoid(beta * (chosen_average - rejected_average) - gamma)


def orpo_loss(
    chosen_average: torch.Tensor, rejected_average: torch.Tensor, beta: float
) -> torch.Tensor:
    """-chosen average + beta * -log sigmoid(log odds ratio) (Hong et al. 2024, eq. 6 and 7).

    The odds are p / (1 - p) of p = exp(average): no reference.
    """

    def log_odds(average):
        # at p = 1 they are infinite, and their gradient is not a number
        average = average.clamp(max=-1e-6)
        return average - torch.log(-torch.expm1(average))

    log_odds_ratio = log_odds(chosen_average) - log_odds(rejected_average)
    return -chosen_average - beta * F.logsigmoid(log_odds_ratio)


def kto_loss(
    ratio: torch.Tensor,
    is_desirable: torch.Tensor,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """weight * (1 - sigmoid(+-beta * (ratio - kl))), + for desirable completions (Ethayarajh et al.
    2024, section 4.1).

    ratio [N] and is_desirable, bool [N], are of single completions. kl: an estimate of KL(p ||
    p_ref), 0 or more, without gradient: the mean ratio of completions to other prompts.
    """
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (ratio - kl))


def bradley_terry_loss(
    chosen_reward: torch.Tensor, rejected_reward: torch.Tensor, center_coefficient: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(chosen - rejected) of a reward model (Ouyang et al. 2022, eq. 1).

    center_coefficient: of (chosen + rejected)^2, which keeps the rewards around 0 (Eisenstein et
    al. 2023, eq. 2): differences alone do not say where 0 is.
    """
    center = center_coefficient * (chosen_reward + rejected_reward) ** 2
    return -F.logsigmoid(chosen_reward - rejected_reward) + center


def pair_losses(
    args: Any,
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    lengths: torch.Tensor,
    kl: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each pair, kto: of its completions together, [N]; rewards [N, 2]).

    args: loss_type, beta, gamma, label_smoothing, sft_weight, desirable_weight, undesirable_weight.
    policy, reference, lengths [N, 2]: log p, log p_ref and number of tokens of the chosen and the
    rejected completion; a missing one has length 0. kl: KTO's estimate.
    """
    average = policy / lengths.clamp(min=1)
    log_ratio = policy - reference if reference is not None else average
    margin = log_ratio[:, 0] - log_ratio[:, 1]
    if args.loss_type == "sigmoid":
        losses = dpo_loss(margin, args.beta, args.label_smoothing)
    elif args.loss_type == "robust":
        losses = robust_loss(margin, args.beta, args.label_smoothing)
    elif args.loss_type == "ipo":
        losses = ipo_loss(*(log_ratio / lengths).unbind(1), args.beta)
    elif args.loss_type == "simpo":
        losses = simpo_loss(*average.unbind(1), args.beta, args.gamma)
    elif args.loss_type == "orpo":
        losses = orpo_loss(*average.unbind(1), args.beta)
    else:
        is_desirable = torch.tensor([True, False], device=policy.device)
        weights = args.desirable_weight, args.undesirable_weight
        losses = kto_loss(log_ratio, is_desirable, kl, args.beta, *weights)
        losses = (losses * (lengths > 0)).sum(1)
    return losses - args.sft_weight * average[:, 0], args.beta * log_ratio.detach()
