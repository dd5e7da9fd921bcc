"""How much better than expected the policy did: rewards into advantages. Nothing here has a
gradient.

Shapes: `P` prompts with `G` completions each; `B` completions, padded to `T` tokens; `n` numbers.
"""

import torch

# added to a standard deviation of rewards, as TRL does; rewards that differ do so by much more
EPSILON = 1e-4
SAME = 1e-8  # rewards that differ by no more are the same, summed in another order


def gae(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Advantages [B, T] by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards: [B, T]. values: [B, T + 1], the expected return before each token is drawn. Both are 0
    after a completion's last token, also if it was cut at the longest length: not to end in time is
    a fault of the completion, and a value of the unwritten rest would forgive it (TRL's PPO does
    the same). The returns, which the values should predict, are advantages + values.
    """
    B, T = rewards.shape
    advantages, advantage = torch.zeros_like(rewards), rewards.new_zeros(B)
    for t in reversed(range(T)):
        delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
        advantage = delta + gamma * gae_lambda * advantage
        advantages[:, t] = advantage
    return advantages


def whiten(x: torch.Tensor) -> torch.Tensor:
    """[n] with mean 0 and (unbiased) variance 1 plus 1e-8, as in TRL; all 0 without spread."""
    if x.numel() < 2:
        return torch.zeros_like(x)
    centered = x.double() - x.double().mean()  # float32 would leave a large constant some spread
    return (centered * (centered.var() + 1e-8).rsqrt()).to(x.dtype)


def group_advantages(rewards: torch.Tensor, scale_rewards: str = "group") -> torch.Tensor:
    """Rewards [P, G] less the mean of their group, divided by a standard deviation + 1e-4: [P, G].

    scale_rewards: "group", the deviation of the group (Shao et al. 2024, GRPO), which gives easy
    and hard prompts more weight than others; "batch", one deviation for all these rewards; "none",
    no division (Liu et al. 2025, Dr. GRPO). Deviations are unbiased.
    """
    assert scale_rewards in ("group", "batch", "none") and rewards.shape[1] > 1
    centered = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "none" or not len(rewards):
        return centered
    std = rewards.std(1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centered / (std + EPSILON)


def has_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups of rewards [P, G] teach something, since they are not all the same: bool [P]."""
    return rewards.amax(1) - rewards.amin(1) > SAME


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 is perfect, 0 useless; 0 if all returns agree."""
    if returns.numel() < 2 or returns.max() == returns.min():
        return 0.0
    return 1 - ((returns.double() - values.double()).var() / returns.double().var()).item()
