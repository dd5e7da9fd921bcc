"""Rollouts: the policy samples completions, and says how likely each of their tokens was.

The log-probabilities are those of the very distribution that a token was drawn from, the
temperature included, as the decoding engine finds them: so they are the "old" policy of importance
ratios, without a second forward. A prompt that is sampled several times is computed once, and
completions that end make room for others at once (model/engine.py).

A *sampler* makes Samples of prompts: `SingleTurn` here, or `Episodes` with tools (episodes.py).
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat.reply import assistant_message, strip_thinking
from dataset.prompt_dataset import PromptDataset
from model.engine import Engine
from model.sampling import SamplingParams
from trainer.runtime.ranks import Ranks
from trainer.runtime.run import Run

T = TypeVar("T")


@dataclass
class Completion:
    """Sampled after a prompt: ids, the ending one included, and the log-probability of each."""

    tokens: list[int]
    log_probs: list[float]
    text: str  # without the ending token
    is_complete: bool  # ended by itself: False if it was cut at the longest length


@dataclass
class Sample:
    """A completion, or with tools an episode of several, in training.

    tokens: all after the prompt; is_sampled and log_probs belong to them one by one. What the
    environment wrote is not sampled, and has 0 as log-probability. text: the last completion, with
    its special tokens. messages: the whole conversation. item: the row's number in its dataset.
    """

    row: dict
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    messages: list[dict] = field(default_factory=list)
    is_complete: bool = False
    item: int = 0
    rewards: dict[str, float] = field(default_factory=dict)  # each part, and "total"

    def add(self, completion: Completion, thinking: bool | None, has_tools: bool) -> None:
        """Add what was sampled after the prompt and these tokens.

        thinking: True if the prompt has opened the reasoning. has_tools: calls in it are read.
        """
        self.tokens += completion.tokens
        self.is_sampled += [True] * len(completion.tokens)
        self.log_probs += completion.log_probs
        self.text = ("<think>\n" if thinking else "") + completion.text
        self.messages.append(assistant_message(self.text, has_tools))
        self.is_complete = completion.is_complete

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)

    @property
    def old_log_probs(self) -> torch.Tensor:
        """Of the sampled tokens, float32 [num_sampled]."""
        pairs = zip(self.log_probs, self.is_sampled)
        return torch.tensor([x for x, is_sampled in pairs if is_sampled])


def last_message(sample: Sample) -> dict:
    """The last completion as a message: content, reasoning_content, tool_calls."""
    return assistant_message(sample.text, bool(sample.row["conversations"][0].get("tools")))


def final_answer(sample: Sample) -> str:
    """The last completion without reasoning and calls; empty if the reasoning never ends."""
    return strip_thinking(last_message(sample)["content"])


class Stopwatch:
    """Measures which fraction of the time passes inside its `with`."""

    def __init__(self) -> None:
        self.inside, self.since = 0.0, time.perf_counter()

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.inside += time.perf_counter() - self.entered

    def lap(self) -> float:
        """The fraction, from 0 to 1, since the last call of this, or since the beginning."""
        now = time.perf_counter()
        fraction = self.inside / (now - self.since)
        self.inside, self.since = 0.0, now
        return fraction


class Rollout:
    """Completions from the network in training, on its own device.

    Call `refresh` after each change of its weights. watch: measures the time spent sampling.
    """

    def __init__(self, run: Run, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase):
        args = run.args
        self.temperature, self.watch = args.temperature, Stopwatch()
        self.engine = Engine(
            model,
            tokenizer,
            max_batch_size=args.rollout_batch_size,
            max_len=args.max_seq_len,
            dtype=None if run.device.type == "cpu" else run.dtype,
            prefill_chunk=args.max_seq_len,
        )

    def refresh(self, now: bool = True) -> None:
        """Take over the weights as they are; `now` is for remote_rollout.py, which can wait."""
        self.engine.refresh()

    def __call__(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        max_completion_length: int,
        temperature: float | None = None,
    ) -> list[Completion]:
        """A Completion of each prompt (a list of ids), drawn with its seed.

        temperature: default the run's; 0 is greedy.
        """
        temperature = self.temperature if temperature is None else temperature
        params = [
            SamplingParams(temperature, max_tokens=max_completion_length, seed=seed)
            for seed in seeds
        ]
        with self.watch:
            requests = self.engine.generate(prompts, params)
        return [
            Completion(one.sampled, one.log_probs, one.text, one.finish_reason == "stop")
            for one in requests
        ]


class SingleTurn:
    """A sampler of one completion for each prompt: `sampler(dataset, items, seeds)` -> [Sample].

    items: numbers of rows of a PromptDataset. temperature: default the run's; 0 is greedy.
    """

    def __init__(self, run: Run, rollout: Rollout):
        self.args, self.rollout = run.args, rollout

    def __call__(
        self,
        dataset: PromptDataset,
        items: list[int],
        seeds: list[int],
        temperature: float | None = None,
    ) -> list[Sample]:
        completions = self.rollout(
            [dataset.prompts[item] for item in items],
            seeds,
            self.args.max_completion_length,
            temperature,
        )
        samples = begin_samples(dataset, items)
        for sample, completion in zip(samples, completions):
            has_tools = bool(sample.row["conversations"][0].get("tools"))
            sample.add(completion, self.args.thinking, has_tools)
        return samples


Sampler = Callable[..., list[Sample]]


def begin_samples(dataset: PromptDataset, items: list[int]) -> list[Sample]:
    """Samples of these rows to which nothing has been added yet."""
    rows, prompts = dataset.rows, dataset.prompts
    return [
        Sample(rows[i], prompts[i], messages=list(rows[i]["conversations"]), item=i) for i in items
    ]


def draw_seed(*key: Any) -> int:
    """A seed below 2^63 that depends on nothing but this key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def part_of_rank(items: list[T], ranks: Ranks) -> list[T]:
    """This rank's part of a list; `ranks.gather` of all parts is the list again."""
    return [items[i] for i in np.array_split(np.arange(len(items)), ranks.world_size)[ranks.rank]]


def sample_groups(
    run: Run, sampler: Sampler, dataset: PromptDataset, items: list[int], *key: int
) -> list[Sample]:
    """--num_generations Samples of each of `items`, one group after another: this rank's part.

    A seed depends on (the run's seed, key, the prompt's place in `items`, number in the group).
    """
    pairs = [
        (item, draw_seed(run.args.seed, *key, place, number))
        for place, item in part_of_rank(list(enumerate(items)), run.ranks)
        for number in range(run.args.num_generations)
    ]
    return sampler(dataset, [item for item, _ in pairs], [seed for _, seed in pairs])


def total_rewards(samples: list[Sample]) -> torch.Tensor:
    """The rewards of samples that have been rated, float64 [n]."""
    return torch.tensor([sample.rewards["total"] for sample in samples], dtype=torch.float64)


def rollout_metrics(samples: list[Sample], rollout: Rollout) -> dict[str, float]:
    """{name: mean over the samples}: rewards by part, their spread, lengths, the fraction that
    ended by itself; and the fraction of the step's time spent sampling.
    """
    lengths = [sample.num_sampled for sample in samples]
    rewards = {
        f"reward/{name}": float(np.mean([sample.rewards[name] for sample in samples]))
        for name in samples[0].rewards
    }
    return rewards | {
        "reward/std": float(np.std([sample.rewards["total"] for sample in samples])),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": max(lengths),
        "completions/finished_ratio": float(np.mean([one.is_complete for one in samples])),
        "rollout_ratio": rollout.watch.lap(),
    }
