"""Rollouts: the policy writes answers to prompts, and says how likely it was to write each token of them.

The log-probabilities are those of the very distribution that a token was drawn from, the temperature included, as the decoding
engine finds them: so they are the "old" policy of importance ratios, without a second forward. Prompts that are asked
several times are computed once, and answers that end make room for others at once (model/engine.py).
"""

import hashlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from dataset.toy_scorer import assistant_message
from model.engine import Engine
from model.sampling import SamplingParams


@dataclass
class Answer:
    """What was sampled after a prompt: ids, the ending one included, and the log-probability of each."""

    tokens: list[int]
    log_probs: list[float]
    text: str  # without the ending mark
    is_complete: bool  # ended by itself: False if it was cut at the longest length


@dataclass
class Sample:
    """An answer, or with tools a conversation, in training.

    tokens: all after the prompt; is_sampled and log_probs belong to them one by one, and what the environment wrote is not
    sampled, with 0 as log-probability. text: the last reply, with its marks. messages: the whole conversation.
    """

    row: dict
    prompt: list[int]
    tokens: list[int]
    is_sampled: list[bool]
    log_probs: list[float]
    text: str
    messages: list[dict]
    is_complete: bool
    item: int = 0  # the number of the row in its dataset
    rewards: dict[str, float] = field(default_factory=dict)  # each part, and "total"

    @property
    def num_sampled(self):
        return sum(self.is_sampled)

    @property
    def old_log_probs(self):
        """Of the sampled tokens, float32 [num_sampled]."""
        return torch.tensor([x for x, is_sampled in zip(self.log_probs, self.is_sampled) if is_sampled])


class Stopwatch:
    """How much of the time passes inside its `with`."""

    def __init__(self):
        self.inside, self.since = 0.0, time.perf_counter()

    def __enter__(self):
        self.entered = time.perf_counter()

    def __exit__(self, *error):
        self.inside += time.perf_counter() - self.entered

    def share(self):
        """Of the time since the last call of this, or since the beginning, from 0 to 1."""
        now = time.perf_counter()
        share = self.inside / (now - self.since)
        self.inside, self.since = 0.0, now
        return share


class Rollout:
    """Answers from the network in training, on its own device; call `refresh` after each change of its weights.

    watch: what share of the time it writes answers.
    """

    def __init__(self, model, tokenizer, run, args):
        self.tokenizer, self.temperature, self.watch = tokenizer, args.temperature, Stopwatch()
        self.engine = Engine(model, tokenizer, max_batch_size=args.rollout_batch_size, max_len=args.max_seq_len,
                             dtype=None if run.device.type == "cpu" else run.dtype, prefill_chunk=args.max_seq_len)

    def refresh(self, now=True):
        """Take over the weights as they are; `now` is for those that could put it off (remote_rollout.py)."""
        self.engine.refresh()

    def __call__(self, prompts, seeds, max_new_tokens, temperature=None):
        """An Answer for each prompt (a list of ids), drawn with its seed; temperature: default the run's, 0 for the likeliest."""
        temperature = self.temperature if temperature is None else temperature
        params = [SamplingParams(temperature, max_tokens=max_new_tokens, seed=seed) for seed in seeds]
        with self.watch:
            return [Answer(request.sampled, request.log_probs, request.text, request.finish_reason == "stop")
                    for request in self.engine.generate(prompts, params)]


def draw_seed(*what):
    """A seed below 2^63 that depends on nothing but these numbers."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def answer_samples(rollout, dataset, items, seeds, max_new_tokens, enable_thinking=None, temperature=None):
    """A Sample of one reply for each of `items`, numbers of rows of a PromptDataset."""
    answers = rollout([dataset.prompts[item] for item in items], seeds, max_new_tokens, temperature)
    opened = "<think>\n" if enable_thinking else ""  # by the prompt
    samples = []
    for item, answer in zip(items, answers):
        row, text = dataset.rows[item], opened + answer.text
        messages = [*row["conversations"], assistant_message(text, bool(row["conversations"][0].get("tools")))]
        samples.append(Sample(row, dataset.prompts[item], answer.tokens, [True] * len(answer.tokens), answer.log_probs, text,
                              messages, answer.is_complete, item))
    return samples


def share_of(items, ranks):
    """This rank's share of a list; `ranks.gather` of all shares is the list again."""
    return [items[i] for i in np.array_split(np.arange(len(items)), ranks.world_size)[ranks.rank]]
