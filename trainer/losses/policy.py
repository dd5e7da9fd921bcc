"""The losses of PPO and its family: how the policy learns from completions that it has sampled.

All take flat tensors over the n sampled tokens of a micro-batch and give a loss for each, [n].
log_probs: log pi of the tokens under the network in training; old_log_probs: when they were
sampled. Both are of the distribution that was sampled from, its temperature included. `ratio` is
pi / pi_old, a `log_ratio` its logarithm. advantages: how much better than expected a token was; no
gradient goes into them. sequence: int64, the number of the completion that a token belongs to.
(weights * losses).sum() over all micro-batches of an update, with the weights of `token_weights`,
is its loss: so it is the same however it is cut.
"""

import torch

ENTROPY_ROWS = 256  # positions whose probabilities are in memory at once, for their entropy alone


def token_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of the targets [n], entropies [n] without gradient) from logits [n, V] / temperature.

    In nats, and in float32 if the logits have fewer bits: differences of bfloat16 log-probabilities
    are noise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:  # a copy of the logits less
        logits = logits / temperature
    log_z = logits.logsumexp(-1)
    with torch.no_grad():
        parts = zip(logits.split(ENTROPY_ROWS), log_z.split(ENTROPY_ROWS))
        entropy = torch.cat([z - ((part - z[:, None]).exp() * part).sum(-1) for part, z in parts])
    return logits.gather(-1, targets[:, None])[:, 0] - log_z, entropy


def clipped_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A), which tokens the clip leaves
    without gradient: bool [n]).

    PPO (Schulman et al. 2017, eq. 7) has epsilon_high = epsilon; DAPO's is larger, so that unlikely
    tokens can become likely (Yu et al. 2025, section 3.1). log_ratio: log_probs - old_log_probs for
    a ratio of each token (PPO, GRPO, Dr. GRPO, DAPO), or `sequence_log_ratio` for one of the whole
    completion (GSPO).
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    is_low, is_high = (ratio < 1 - epsilon) & (advantages < 0), ratio > 1 + epsilon_high
    return losses, torch.where(advantages > 0, is_high, is_low)


def cispo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-min(ratio, 1 + epsilon_high) A log pi, which ratios were above: bool [n]) (MiniMax 2025,
    eq. 4 and 5).

    The ratio has no gradient: it is a weight of the policy gradient, which every token keeps. It
    has no lower bound, as published.
    """
    ratio = (log_probs - old_log_probs).detach().exp()
    losses = -ratio.clamp(max=1 + epsilon_high) * advantages * log_probs
    return losses, ratio > 1 + epsilon_high


def sequence_log_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, sequence: torch.Tensor
) -> torch.Tensor:
    """The mean log-ratio of a completion's tokens, at each, [n] (GSPO: Zheng et al. 2025, eq. 7).

    All tokens of the completion must be in this micro-batch, and share its gradient: it counts as a
    whole or is clipped as a whole. With weights of 1 / length the losses of its tokens sum to
    GSPO's loss of the completion (eq. 5).
    """
    _, place, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
    sums = log_probs.new_zeros(counts.numel()).index_add(0, place, log_probs - old_log_probs)
    return (sums / counts)[place]


def kl_estimate(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str
) -> torch.Tensor:
    """KL(p || p_ref) by each token that p drew, [n] (Schulman 2020, "Approximating KL divergence").

    With r = p_ref / p: k1 = -log r (unbiased, of any sign), k2 = (log r)^2 / 2 (biased), k3 = r - 1
    - log r (unbiased, never negative). In a loss their mean gradients differ from those of their
    values: of k1 it is 0, of k2 that of KL(p || p_ref), of k3 that of KL(p_ref || p). In a reward,
    which has no gradient, k1 is usual.
    """
    log_r = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r**2 / 2
    assert estimator == "k3"
    return torch.expm1(log_r) - log_r


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float
) -> torch.Tensor:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) with c = cliprange_value: nothing
    is gained by moving further than c in a step.

    The worse of the two, so a value that has moved away from R is still brought back. With 1/2 its
    gradient is V - R (Schulman et al. 2017, eq. 9, has the square alone; the clip is of the code
    published with it).
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def token_weights(
    sequence: torch.Tensor,
    loss_normalization: str,
    num_sequences: int,
    num_tokens: int,
    max_completion_length: int,
) -> torch.Tensor:
    """The weight of each token's loss in that of the update, float32 [n].

    "token": 1 / num_tokens, a mean over tokens (DAPO). "sequence": 1 / (tokens of its completion *
    num_sequences), a mean over the completions of their means (GRPO). "constant": 1 /
    (max_completion_length * num_sequences), by which a token counts as much in a long completion as
    in a short one (Dr. GRPO: Liu et al. 2025). num_*: of the whole update, over all micro-batches
    and ranks.
    """
    assert loss_normalization in ("token", "sequence", "constant")
    if loss_normalization == "sequence":
        _, place, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
        return 1 / (counts[place].float() * num_sequences)
    total = num_tokens if loss_normalization == "token" else max_completion_length * num_sequences
    return torch.full(sequence.shape, 1 / total, dtype=torch.float32, device=sequence.device)
