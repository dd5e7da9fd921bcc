"""The reward that the policy is likely to get at each prompt, remembered over the steps: the
baseline of SPO (Xu and Ding 2025).

A prompt's rewards in [0, 1] count as successes alpha and failures beta, those of a Beta
distribution, and its mean is the prompt's value v = alpha / (alpha + beta). The policy changes, so
with each new reward r the older ones are forgotten,

    alpha <- rho alpha + r        beta <- rho beta + 1 - r        rho = 2^(-KL / half_kl), kept in
                                  [rho_min, rho_max]

the more, the further the policy has moved since this prompt's last completion. It is a moving
average with a rate of its own for each prompt: v <- v + (r - v) / (rho (alpha + beta) + 1). A
completion's advantage is r - v, with the v from before its reward was counted, whitened over the
batch: one completion for each prompt is enough.
"""

from collections.abc import Callable

import numpy as np
import torch

from trainer.rl.arguments import SLACK
from trainer.rl.rollout import Sample, total_rewards

EXPLORATION = 0.05  # weight of a prompt that is always or never solved

# samples -> log-probabilities of their sampled tokens under the policy as it is now, of each
Score = Callable[[list[Sample]], list[torch.Tensor]]


class ValueTracker:
    """Values of `num_prompts` prompts, all 1/2 with one reward's weight until `start` or `update`.

    half_kl: the divergence, in nats per token, after which half is forgotten. A value remembers
    about 1 / (1 - rho) rewards: 8 to 25 with these bounds. The defaults are those of the published
    runs, whose code takes the mean |difference of log p| as the divergence: it is larger than the
    KL of a small move.
    """

    def __init__(
        self, num_prompts: int, half_kl: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96
    ):
        self.half_kl, self.rho_min, self.rho_max = half_kl, rho_min, rho_max
        self.alpha = torch.full((num_prompts,), 0.5, dtype=torch.float64)
        self.beta = self.alpha.clone()

    def values(self) -> torch.Tensor:
        """The expected reward of every prompt, float64 [N]."""
        return self.alpha / (self.alpha + self.beta)

    def start(self, items: list[int], rewards: torch.Tensor) -> None:
        """Begin at the first rewards [k, n0], of n0 completions to each of the k prompts `items`.

        They count as 1 / (1 - rho_min) rewards. Half a success and half a failure are added to the
        n0, so that no value is 0 or 1 from the start.
        """
        rewards = as_successes(rewards)
        mean = (rewards.sum(1) + 0.5) / (rewards.shape[1] + 1)
        self.alpha[items] = mean / (1 - self.rho_min)
        self.beta[items] = (1 - mean) / (1 - self.rho_min)

    def update(self, items: list[int], rewards: torch.Tensor, kl: torch.Tensor) -> None:
        """Count a reward of each of the prompts `items`, [k]; one prompt's in their order.

        kl: [k], how far the policy has moved since the prompt's last completion (0 the first time),
        in nats per token.
        """
        rewards, kl = as_successes(rewards), torch.as_tensor(kl, dtype=torch.float64)
        rho = (2 ** (-kl / self.half_kl)).clamp(self.rho_min, self.rho_max)
        assert len(items) == len(rewards) == len(rho) and not rho.isnan().any()
        for item, reward, kept in zip(items, rewards, rho):
            self.alpha[item] = kept * self.alpha[item] + reward
            self.beta[item] = kept * self.beta[item] + 1 - reward

    def sampling_weights(self) -> torch.Tensor:
        """sqrt(v (1 - v)) + 0.05 of all prompts, float64 [N]: most at an open outcome, never 0."""
        v = self.values()
        return (v * (1 - v)).sqrt() + EXPLORATION

    def draw(self, k: int, seed: int) -> list[int]:
        """The numbers of k different prompts, one after another in proportion to the weights of
        those left. It depends on the values and the seed alone.
        """
        assert k <= len(self.alpha)
        # the first of independent waiting times with these rates (Efraimidis and Spirakis 2006)
        waiting = np.random.default_rng(seed).exponential(size=len(self.alpha))
        times = waiting / self.sampling_weights().numpy()
        return times.argsort(kind="stable")[:k].tolist()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"alpha": self.alpha.clone(), "beta": self.beta.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state["alpha"].shape == self.alpha.shape
        self.alpha = state["alpha"].to("cpu", torch.float64, copy=True)
        self.beta = state["beta"].to("cpu", torch.float64, copy=True)


class SingleStream:
    """The baseline with one completion for each prompt: the prompts' values and last completions.

    ValueError if there are too few prompts for a step of `num_prompts` different ones.
    """

    def __init__(self, prompts: list[list[int]], num_prompts: int):
        if num_prompts > len(prompts):
            raise ValueError(
                f"--num_prompts {num_prompts}: a step has different prompts, and there are "
                f"{len(prompts)}: give fewer, or more rows"
            )
        self.tracker, self.last = ValueTracker(len(prompts)), LastSamples(prompts)

    def begin(self, items: list[int], rewards: list[float]) -> None:
        """Begin the values of some prompts with their first rewards, those of a prompt together."""
        table = torch.tensor(rewards, dtype=torch.float64).view(len(items), -1)
        self.tracker.start(items, table)

    def values(self, samples: list[Sample]) -> torch.Tensor:
        """The value of each sample's prompt, float64 [k]."""
        return self.tracker.values()[[sample.item for sample in samples]]

    def update(self, samples: list[Sample], score: Score) -> None:
        """Count the rewards of a step's samples, those of all ranks."""
        items = [sample.item for sample in samples]
        self.tracker.update(items, total_rewards(samples), self.last.divergences(items, score))
        self.last.remember(samples)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"tracker": self.tracker.state_dict(), "last": self.last.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.last.load_state_dict(state["last"])


class LastSamples:
    """The last sample of each prompt of a PromptDataset, and how likely it was then."""

    def __init__(self, prompts: list[list[int]]):
        self.prompts, self.samples = prompts, {}

    def divergences(self, items: list[int], score: Score) -> torch.Tensor:
        """How far the policy has moved since each prompt's last sample, float64 [k]; 0 without one.

        The mean of |log p then - log p now| over that sample's tokens, in nats, as in the published
        code: it bounds their estimate of the divergence.
        """
        known = [item for item in items if item in self.samples]
        now = dict(zip(known, score([self.samples[item] for item in known]))) if known else {}
        return torch.tensor(
            [
                (self.samples[item].old_log_probs - now[item]).abs().mean().item()
                if item in now
                else 0.0
                for item in items
            ],
            dtype=torch.float64,
        )

    def remember(self, samples: list[Sample]) -> None:
        """Replace the last samples of some prompts."""
        for one in samples:
            kept = Sample({}, one.prompt, one.tokens, one.is_sampled, one.log_probs, item=one.item)
            self.samples[one.item] = kept

    def state_dict(self) -> dict[str, torch.Tensor]:
        ordered = [self.samples[item] for item in sorted(self.samples)]

        def joined(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([x for one in ordered for x in getattr(one, name)], dtype=dtype)

        return {
            "items": torch.tensor([one.item for one in ordered], dtype=torch.long),
            "lengths": torch.tensor([len(one.tokens) for one in ordered], dtype=torch.long),
            "tokens": joined("tokens", torch.long),
            "is_sampled": joined("is_sampled", torch.bool),
            "log_probs": joined("log_probs", torch.float64),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        lengths = state["lengths"].tolist()
        columns = [
            [part.tolist() for part in state[name].split(lengths)]
            for name in ("tokens", "is_sampled", "log_probs")
        ]
        self.samples = {
            item: Sample({}, self.prompts[item], *parts, item=item)
            for item, *parts in zip(state["items"].tolist(), *columns)
        }


def as_successes(rewards: torch.Tensor) -> torch.Tensor:
    """As float64; ValueError unless they are successes and failures, or something between.

    Weights that sum to 1 may have sums of floats a little above: these are 1.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    wrong = rewards[~((rewards >= -SLACK) & (rewards <= 1 + SLACK))]
    if len(wrong):
        raise ValueError(
            f"a reward of {wrong[0]:g}: SPO counts rewards as fractions of a success, from 0 to 1. "
            "Give --rewards whose parts are not negative and whose weights sum to 1, or take "
            "train_grpo.py, which bears any"
        )
    return rewards.clamp(0, 1)
