"""What is learned from answers that the policy itself has sampled: the losses of PPO and its family, written out.

All take flat tensors over the n sampled tokens of a micro-batch and give a loss for each, [n]. log_probs: log pi of the tokens
under the network in training; old_log_probs: when they were sampled. Both are of the distribution that was sampled from, its
temperature included. `ratio` is pi / pi_old, a `log_ratio` its logarithm. advantages: how much better than expected a token
was; no gradient goes into them. sequence: int64, the number of the answer that a token belongs to. (weights * losses).sum()
over all micro-batches of an update, with the weights of `token_weights`, is its loss: so it is the same however it is cut.
"""

import torch

ENTROPY_ROWS = 256  # positions whose probabilities are in memory at once, for their entropy alone


def token_log_probs(logits, targets, temperature):
    """(log p of the targets [n], entropy of each position [n], without gradient) from logits [n, V] / temperature.

    In nats, and in float32 if the logits have fewer bits: differences of bfloat16 log-probabilities are noise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:  # a copy of the logits less
        logits = logits / temperature
    log_z = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.cat([z - ((part - z[:, None]).exp() * part).sum(-1)
                             for part, z in zip(logits.split(ENTROPY_ROWS), log_z.split(ENTROPY_ROWS))])
    return logits.gather(-1, targets[:, None])[:, 0] - log_z, entropy


def clipped_loss(log_ratio, advantages, low, high):
    """(-min(ratio A, clip(ratio, 1 - low, 1 + high) A), which tokens the clip leaves without gradient: bool [n]).

    PPO's (Schulman et al. 2017, eq. 7) with low = high; DAPO's high is larger, so that unlikely tokens can become likely (Yu et
    al. 2025, section 3.1). log_ratio: log_probs - old_log_probs for a ratio of each token (PPO, GRPO, Dr. GRPO, DAPO), or
    `sequence_log_ratio` for one of the whole answer (GSPO).
    """
    ratio = log_ratio.exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return losses, torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - low) & (advantages < 0))


def cispo_loss(log_probs, old_log_probs, advantages, high):
    """(-min(ratio, 1 + high) A log pi, which ratios were above: bool [n]) (MiniMax 2025, eq. 4 and 5).

    The ratio has no gradient: a weight of the policy gradient, that every token keeps. It has no lower bound, as published.
    """
    ratio = (log_probs - old_log_probs).detach().exp()
    return -ratio.clamp(max=1 + high) * advantages * log_probs, ratio > 1 + high


def sequence_log_ratio(log_probs, old_log_probs, sequence):
    """The mean log-ratio of the tokens of an answer, at each of them: [n] (Zheng et al. 2025, GSPO, eq. 7).

    All tokens of the answer must be in this micro-batch, and share its gradient: it counts as a whole or is clipped as a whole.
    With weights of 1 / length the losses of an answer's tokens sum to GSPO's of the answer (eq. 5).
    """
    _, place, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
    sums = log_probs.new_zeros(counts.numel()).index_add(0, place, log_probs - old_log_probs)
    return (sums / counts)[place]


def kl_estimate(log_probs, ref_log_probs, kind):
    """What a token that was drawn from p says of KL(p || p_ref), [n] (Schulman 2020, "Approximating KL divergence").

    With r = p_ref / p: k1 = -log r (right on average, of any sign), k2 = (log r)^2 / 2 (biased), k3 = r - 1 - log r (right on
    average, never negative). In a loss their gradients, averaged over tokens from p, are others than their values suggest: of
    k1 it is 0, of k2 that of KL(p || p_ref), of k3 that of KL(p_ref || p). In a reward, which has no gradient, k1 is usual.
    """
    log_r = ref_log_probs - log_probs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r ** 2 / 2
    assert kind == "k3"
    return torch.expm1(log_r) - log_r


def value_loss(values, old_values, returns, clip):
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2): no gain from moving further than `clip` in a step.

    The worse of the two, so a value that has moved away from R is still brought back. With 1/2 its gradient is V - R (Schulman
    et al. 2017, eq. 9, has the square alone; the clip is of the code published with it).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def token_weights(sequence, how, num_sequences, num_tokens, max_new_tokens):
    """What the loss of each token counts in that of the update, float32 [n].

    "token": 1 / num_tokens, a mean over tokens (DAPO). "sequence": 1 / (tokens of its answer * num_sequences), a mean over the
    answers of their means (GRPO). "constant": 1 / (max_new_tokens * num_sequences), by which a token counts as much in a long
    answer as in a short one (Dr. GRPO: Liu et al. 2025). num_*: of the whole update, over all micro-batches and ranks.
    """
    assert how in ("token", "sequence", "constant")
    if how == "sequence":
        _, place, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
        return 1 / (counts[place].float() * num_sequences)
    return torch.full(sequence.shape, 1 / (num_tokens if how == "token" else max_new_tokens * num_sequences),
                      dtype=torch.float32, device=sequence.device)
