"""How much better than expected the policy did: rewards into advantages. Nothing here has a gradient.

P prompts with G answers each, or n sampled tokens in a row, those of an answer neighbouring and in order.
"""

import torch

EPSILON = 1e-4  # added to a standard deviation of rewards, as TRL does; rewards that differ do so by much more
SAME = 1e-8  # rewards that differ by no more are the same, summed in another order


def gae(rewards, values, sequence, discount, gae_lambda):
    """(advantages [n], returns [n]) by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values: [n], a value being what is expected before the token is drawn; sequence: [n], the number of its answer.
    Beyond an answer's last token the value is 0, as in TRL's PPO, also if it was cut at the longest length: not to end in time
    is a fault of the answer, which a value of what might have followed would forgive. Returns: what the values should be.
    """
    counts = torch.unique_consecutive(sequence, return_counts=True)[1]
    last = counts.cumsum(0) - 1
    next_values = values.roll(-1)
    next_values[last] = 0
    advantages = rewards + discount * next_values - values
    for back in range(1, max(counts.tolist(), default=0)):  # A_t = delta_t + discount lambda A_{t+1}, all answers at once
        t = last[counts > back] - back
        advantages[t] += discount * gae_lambda * advantages[t + 1]
    return advantages, advantages + values


def whiten(x):
    """[n] with mean 0 and (unbiased) variance 1; all 0 where there is no spread. 1e-8 is added to the variance, as TRL does."""
    if x.numel() < 2:
        return torch.zeros_like(x)
    centered = x.double() - x.double().mean()  # float32 would leave a large constant some spread
    return (centered * (centered.var() + 1e-8).rsqrt()).to(x.dtype)


def group_advantages(rewards, scale="group"):
    """Rewards [P, G] less the mean of their group, divided by a standard deviation + 1e-4: [P, G].

    scale: "group", the deviation of the group (Shao et al. 2024, GRPO), which makes easy and hard prompts count more than they
    should; "batch", that of all these rewards, the same for all prompts; "none", no division (Liu et al. 2025, Dr. GRPO).
    Deviations are unbiased.
    """
    assert scale in ("group", "batch", "none") and rewards.shape[1] > 1
    centered = rewards - rewards.mean(1, keepdim=True)
    if scale == "none" or not len(rewards):
        return centered
    return centered / ((rewards.std(1, keepdim=True) if scale == "group" else rewards.std()) + EPSILON)


def has_spread(rewards):
    """Which groups of rewards [P, G] say something, since not all of their answers were as good: bool [P]."""
    return rewards.amax(1) - rewards.amin(1) > SAME


def explained_variance(values, returns):
    """1 - var(returns - values) / var(returns), a float: 1 if the values tell all, 0 if nothing or if all returns agree."""
    if returns.numel() < 2 or returns.max() == returns.min():
        return 0.0
    return 1 - ((returns.double() - values.double()).var() / returns.double().var()).item()
