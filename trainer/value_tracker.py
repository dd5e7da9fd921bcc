"""What the policy is likely to earn at each prompt, remembered over the steps: the baseline of SPO (Xu and Ding 2025).

A prompt's rewards in [0, 1] count as successes alpha and failures beta, those of a Beta distribution, and its mean is the
prompt's value v = alpha / (alpha + beta). The policy changes, so with each new reward r the older ones are forgotten,

    alpha <- rho alpha + r        beta <- rho beta + 1 - r        rho = 2^(-KL / half_kl), kept in [rho_min, rho_max]

the more, the further the policy has moved since it last answered this prompt. It is a moving average with a rate of its own for
each prompt: v <- v + (r - v) / (rho (alpha + beta) + 1). An answer's advantage is r - v, with the v from before its reward was
counted, whitened over the batch: one answer to a prompt is enough.
"""

import numpy as np
import torch

from trainer.advantages import whiten
from trainer.rewards import reward_weights
from trainer.rollout import Sample

EXPLORATION = 0.05  # weight that prompts have which are always or never solved
SLACK = 1e-6  # beyond 0 and 1, of a weighted sum in floats


class ValueTracker:
    """Values of `num_prompts` prompts, all 1/2 with the weight of one reward until `start` or `update`.

    half_kl: the divergence, in nats per token, after which half is forgotten. The number of rewards that a value remembers
    tends to 1 / (1 - rho): 8 to 25 with these bounds. The defaults are those of the published runs, whose code takes the mean
    |difference of log p| for the divergence: it is larger than the KL of a small move.
    """

    def __init__(self, num_prompts, half_kl=0.06, rho_min=0.875, rho_max=0.96):
        self.half_kl, self.rho_min, self.rho_max = half_kl, rho_min, rho_max
        self.alpha, self.beta = (torch.full((num_prompts,), 0.5, dtype=torch.float64) for _ in range(2))

    def values(self):
        """The expected reward of every prompt, float64 [N]."""
        return self.alpha / (self.alpha + self.beta)

    def start(self, items, rewards):
        """Begin at what the first answers earned: rewards [k, n0] of n0 answers to each of the k prompts `items`.

        They count as 1 / (1 - rho_min) rewards. Half a success and half a failure are added to the n0, so that no value is 0 or
        1 from the start.
        """
        rewards = shares_of_success(rewards)
        mean = (rewards.sum(1) + 0.5) / (rewards.shape[1] + 1)
        self.alpha[items], self.beta[items] = mean / (1 - self.rho_min), (1 - mean) / (1 - self.rho_min)

    def update(self, items, rewards, kl):
        """Count the rewards [k] of an answer to each of the prompts `items`, k numbers; one prompt's in their order.

        kl: [k], the divergence between the policy that has answered and the one that answered this prompt before (0 the
        first time), in nats per token.
        """
        rewards, kl = shares_of_success(rewards), torch.as_tensor(kl, dtype=torch.float64)
        rho = (2 ** (-kl / self.half_kl)).clamp(self.rho_min, self.rho_max)
        assert len(items) == len(rewards) == len(rho) and not rho.isnan().any()
        for item, reward, kept in zip(items, rewards, rho):
            self.alpha[item] = kept * self.alpha[item] + reward
            self.beta[item] = kept * self.beta[item] + 1 - reward

    def sampling_weights(self):
        """sqrt(v (1 - v)) + 0.05 of every prompt, float64 [N]: most where the outcome is open, never nothing."""
        v = self.values()
        return (v * (1 - v)).sqrt() + EXPLORATION

    def draw(self, k, seed):
        """The numbers of k different prompts, one after another in proportion to the weights of those left: a list.

        It depends on the values and the seed alone.
        """
        assert k <= len(self.alpha)
        # the first of independent waiting times with these rates (Efraimidis and Spirakis 2006)
        times = np.random.default_rng(seed).exponential(size=len(self.alpha)) / self.sampling_weights().numpy()
        return times.argsort(kind="stable")[:k].tolist()

    def state_dict(self):
        return {"alpha": self.alpha.clone(), "beta": self.beta.clone()}

    def load_state_dict(self, state):
        assert state["alpha"].shape == self.alpha.shape
        self.alpha, self.beta = (state[name].to("cpu", torch.float64, copy=True) for name in ("alpha", "beta"))


class SingleStream:
    """The baseline of a run with one answer for each prompt: its values, and the answers by which they are forgotten.

    ValueError if a step of `num_prompts` different prompts cannot be had of these.
    """

    def __init__(self, prompts, num_prompts):
        if num_prompts > len(prompts):
            raise ValueError(f"--num_prompts {num_prompts}: a step asks different prompts, and there are {len(prompts)}: give "
                             "fewer, or more rows")
        self.tracker, self.last = ValueTracker(len(prompts)), LastAnswers(prompts)

    def advantages(self, samples, score):
        """Rewards less the values from before, whitened over the samples, float64 [k]; the rewards are counted now.

        `samples` are those of all ranks; score: see `LastAnswers.divergences`.
        """
        items = [sample.item for sample in samples]
        rewards = torch.tensor([sample.rewards["total"] for sample in samples], dtype=torch.float64)
        advantages = whiten(rewards - self.tracker.values()[items])
        self.tracker.update(items, rewards, self.last.divergences(items, score))
        self.last.remember(samples)
        return advantages

    def state_dict(self):
        return {"tracker": self.tracker.state_dict(), "last": self.last.state_dict()}

    def load_state_dict(self, state):
        self.tracker.load_state_dict(state["tracker"])
        self.last.load_state_dict(state["last"])


class LastAnswers:
    """What each prompt of a PromptDataset was answered last, and how likely it was then: how far has the policy moved since?"""

    def __init__(self, prompts):
        self.prompts, self.samples = prompts, {}

    def divergences(self, items, score):
        """How far the policy has moved since it answered each of these prompts, float64 [k]; 0 for one not answered yet.

        The mean of |log p then - log p now| over the former answer's tokens, in nats, as in the published code: it bounds their
        estimate of the divergence. score: samples -> log-probabilities of their sampled tokens now, a tensor for each.
        """
        known = [item for item in items if item in self.samples]
        now = dict(zip(known, score([self.samples[item] for item in known]))) if known else {}
        return torch.tensor([(self.samples[item].old_log_probs - now[item]).abs().mean().item() if item in now else 0.0
                             for item in items], dtype=torch.float64)

    def remember(self, samples):
        """Take note of new answers."""
        for sample in samples:
            self.samples[sample.item] = Sample({}, sample.prompt, sample.tokens, sample.is_sampled, sample.log_probs, "", [],
                                               sample.is_complete, sample.item)

    def state_dict(self):
        ordered = [self.samples[item] for item in sorted(self.samples)]
        return {"items": torch.tensor([one.item for one in ordered], dtype=torch.long),
                "lengths": torch.tensor([len(one.tokens) for one in ordered], dtype=torch.long),
                "tokens": torch.tensor([x for one in ordered for x in one.tokens], dtype=torch.long),
                "is_sampled": torch.tensor([x for one in ordered for x in one.is_sampled], dtype=torch.bool),
                "log_probs": torch.tensor([x for one in ordered for x in one.log_probs], dtype=torch.float64)}

    def load_state_dict(self, state):
        lengths = state["lengths"].tolist()
        columns = [[part.tolist() for part in state[name].split(lengths)] for name in ("tokens", "is_sampled", "log_probs")]
        self.samples = {item: Sample({}, self.prompts[item], *parts, "", [], False, item)
                        for item, *parts in zip(state["items"].tolist(), *columns)}


def check_success_rewards(args):
    """ValueError for --rewards that are seen to go beyond 0 to 1 before any answer is, and for a batch of one."""
    weights = reward_weights(args)
    outside = [name for name, weight in weights.items() if weight < 0 or name in ("length", "overlong", "repetition")]
    if outside or sum(weights.values()) > 1 + SLACK:
        raise ValueError(f"--rewards {' '.join(args.rewards)}: SPO counts rewards as shares of a success, from 0 to 1. Give "
                         "parts that are not negative, with weights that sum to 1, or take train_grpo.py, which bears any")
    if args.num_prompts < 2:
        raise ValueError("--num_prompts 1: one answer cannot be compared with the others of its step; give 2 or more")


def shares_of_success(rewards):
    """As float64; ValueError unless they are successes and failures, or something between.

    Weights that sum to 1 may have sums of floats a little above: these are 1.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    wrong = rewards[~((rewards >= -SLACK) & (rewards <= 1 + SLACK))]
    if len(wrong):
        raise ValueError(f"a reward of {wrong[0]:g}: SPO counts rewards as shares of a success, from 0 to 1. Give --rewards "
                         "whose parts are not negative and whose weights sum to 1, or take train_grpo.py, which bears any")
    return rewards.clamp(0, 1)
