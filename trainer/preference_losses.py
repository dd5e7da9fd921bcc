"""What is learned from a preferred and a rejected answer: the DPO family and the reward model's loss, written out.

All take log-probabilities of whole answers, log p(y | x) summed over the tokens of y, float [N], and give the loss of each
pair (`kto_loss`: of each answer), [N]. `ratio` is log p(y | x) - log p_ref(y | x), under the trained network and under the
frozen one that training began with; `margin` the chosen answer's ratio minus the rejected one's. `average` is the mean
log-probability of a token of the answer.
"""

import torch
import torch.nn.functional as F


def answer_log_probs(logits, batch):
    """log p of every answer, float32 [N, 2], from the logits [n, V] at the source positions of a `collate_trees` batch."""
    logits = logits.float()
    source, side = batch["source"], batch["side"]
    log_probs = logits[source, batch["targets"]] - logits.logsumexp(-1)[source]  # M
    return log_probs.new_zeros(batch["lengths"].numel()).index_add(0, side, log_probs).view(-1, 2)


def dpo_loss(margin, beta, label_smoothing=0.0):
    """-log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7).

    label_smoothing: the share of pairs thought to be the wrong way round; the loss is its expectation then (conservative
    DPO: Mitchell 2023).
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def robust_loss(margin, beta, label_smoothing):
    """((1 - e) * loss of the pair - e * loss of the flipped pair) / (1 - 2e), with e = label_smoothing below 1/2.

    Its mean over pairs of which a share e is the wrong way round is the DPO loss of the right ones (Chowdhury et al. 2024, the
    unbiased loss).
    """
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def ipo_loss(chosen_ratio, rejected_ratio, beta):
    """(difference - 1 / (2 beta))^2: a margin that is aimed at, not exceeded (Azar et al. 2023, eq. 17).

    The ratios are means over the tokens of their answers here: sums would ask the same margin of short and of long ones.
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_average, rejected_average, beta, gamma):
    """-log sigmoid(beta * (difference of averages) - gamma), without a reference (Meng et al. 2024, eq. 6)."""
    return -F.logsigmoid(beta * (chosen_average - rejected_average) - gamma)


def orpo_loss(chosen_average, rejected_average, beta):
    """-chosen average + beta * -log sigmoid(log odds ratio) (Hong et al. 2024, eq. 6 and 7).

    The odds are p / (1 - p) of p = exp(average): no reference.
    """
    def log_odds(average):
        average = average.clamp(max=-1e-6)  # at p = 1 they are infinite, and their gradient is not a number
        return average - torch.log(-torch.expm1(average))

    return -chosen_average - beta * F.logsigmoid(log_odds(chosen_average) - log_odds(rejected_average))


def kto_loss(ratio, is_desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """weight * (1 - sigmoid(+-beta * (ratio - kl))), + for desirable answers (Ethayarajh et al. 2024, section 4.1).

    ratio [N] and is_desirable, bool [N], are of single answers. kl: an estimate of KL(p || p_ref), 0 or more, without
    gradient: the mean ratio of answers to other prompts.
    """
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (ratio - kl))


def bradley_terry_loss(chosen_reward, rejected_reward, center_weight=0.0):
    """-log sigmoid(chosen - rejected) of a reward model (Ouyang et al. 2022, eq. 1).

    center_weight: of (chosen + rejected)^2, which keeps the rewards around 0 (Eisenstein et al. 2023, eq. 2): differences
    alone do not say where 0 is.
    """
    return -F.logsigmoid(chosen_reward - rejected_reward) + center_weight * (chosen_reward + rejected_reward) ** 2
