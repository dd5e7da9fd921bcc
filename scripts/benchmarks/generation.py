"""What decoding and rollouts time: the engine, and transformers' generate() with its weights."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.utils import GenerateOutput

from model.engine import Engine
from model.sampling import SamplingParams
from scripts.benchmarks.timing import timed
from trainer.runtime.costs import wait_for

Timed = tuple[float, list[list[int]]]
Completions = list[tuple[list[int], list[float]]]  # ids and their log-probabilities


def random_prompts(lengths: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Prompts of random ids that are no special tokens."""
    draw = np.random.default_rng(0)
    return [draw.integers(32, vocab_size, length).tolist() for length in lengths]


def generate(
    model: PreTrainedModel, prompts: list[list[int]], **options: Any
) -> GenerateOutput | torch.Tensor:
    """transformers' generate() on prompts that are padded on the left; nothing ends it early."""
    width = max(map(len, prompts))
    padding = [[0] * (width - len(prompt)) for prompt in prompts]
    ids = torch.tensor([zeros + prompt for zeros, prompt in zip(padding, prompts)])
    mask = torch.tensor([zeros + [1] * len(prompt) for zeros, prompt in zip(padding, prompts)])
    return model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


class Clock(StoppingCriteria):
    """Notes when each token of generate() was there, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Lengths(StoppingCriteria):
    """Row i of generate() is done after lengths[i] tokens; `width`: columns of the prompts."""

    eos_token_id = None  # its presence tells generate() to write padding into rows that are done

    def __init__(self, lengths: list[int], width: int, device: torch.device):
        self.ends = torch.tensor(lengths, device=device) + width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def time_reference(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> Timed:
    """(seconds per step after the first token, ids of each prompt) of a greedy generate()."""
    clock = Clock()
    options = {"do_sample": False, "max_new_tokens": new_tokens + 1, "stopping_criteria": [clock]}
    ids = generate(model, prompts, **options)[:, -new_tokens - 1 :].tolist()
    return (clock.times[-1] - clock.times[0]) / new_tokens, ids


def time_engine(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Timed:
    """As time_reference; the engine's cache is emptied first, so that it computes the prompts."""
    engine.refresh()
    params = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    engine.step()  # lets all of them in and writes the first token of each
    assert all(len(request.sampled) == 1 for request in requests)

    def finish():
        while engine.num_unfinished:
            engine.step()

    seconds, _ = timed(finish, engine.device)
    return seconds / new_tokens, [request.sampled for request in requests]


def sample_reference(
    model: PreTrainedModel,
    prompts: list[list[int]],
    lengths: list[int],
    batch_size: int,
    temperature: float,
) -> Completions:
    """Sample with generate(), one batch after another."""
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    completions = []
    for start in range(0, len(prompts), batch_size):
        part, asked = prompts[start : start + batch_size], lengths[start : start + batch_size]
        width = max(map(len, part))
        ends = [Lengths(asked, width, model.device)]
        out = generate(model, part, max_new_tokens=max(asked), stopping_criteria=ends, **options)
        ids = out.sequences[:, width:]
        assert ids.shape[1] == max(asked) and not any(ids[i, n:].any() for i, n in enumerate(asked))
        log_probs = [scores.float().log_softmax(-1) for scores in out.scores]
        columns = [one.gather(1, ids[:, [i]]) for i, one in enumerate(log_probs)]
        rows = zip(ids.tolist(), torch.cat(columns, dim=1).tolist(), asked)
        completions += [(row[:n], row_log_probs[:n]) for row, row_log_probs, n in rows]
    return completions


def sample_engine(
    engine: Engine, prompts: list[list[int]], lengths: list[int], temperature: float
) -> Completions:
    """Sample with the engine, which takes the weights over anew and empties its cache."""
    engine.refresh()
    options = {"temperature": temperature, "ignore_eos": True}
    params = [SamplingParams(max_tokens=n, seed=i, **options) for i, n in enumerate(lengths)]
    return [(request.sampled, request.log_probs) for request in engine.generate(prompts, params)]
