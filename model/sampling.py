"""From next-token logits to a token: penalties, temperature, truncation, and a draw that depends on nothing but its seed.

Each request has its own parameters and its own stream of random numbers; a row's token does not depend on which other
rows are in the batch. The order is that of transformers' logits processors and warpers: repetition penalty, presence
and frequency penalties, biases, constraint; then temperature, top-k, top-p, min-p.

Shape letters: B rows   V vocabulary   C candidates that truncation looks at
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

FEW = 256  # truncation first looks at so many of the likeliest tokens: sorting all of them costs more than the network's head
COLDEST = 1e-6  # a lower temperature is computed as this one, which is as good as greedy


@dataclass
class SamplingParams:
    """How one request is to be continued.

    temperature: 0 always takes the likeliest token. top_k: 0 means all. top_p: nucleus (Holtzman et al. 2020). min_p: drop
    what is less likely than this share of the likeliest (Nguyen et al. 2024). repetition_penalty: divides positive logits
    of tokens that occur in prompt or answer, multiplies negative ones (Keskar et al. 2019). presence_penalty and
    frequency_penalty: subtracted once, and once per occurrence, from the logits of the answer's tokens. logit_bias: added
    to single tokens. max_tokens: of the answer. stop: texts that end it and do not belong to it. seed: the same seed
    gives the same answer; None draws one. logprobs: how many alternatives to report for each token; None none, 0 only the
    token itself. constraint: an object that says which tokens may come next (see `Constraint`).

    Raises ValueError, naming the field, for values without meaning.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int = 512
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    constraint: Any = None

    def __post_init__(self):
        bounds = {"temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1),
                  "max_tokens": (1, math.inf), "min_tokens": (0, math.inf), "repetition_penalty": (0, math.inf)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)}: give a value from {low} to {high}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} 0: give more than 0")
        for name in ("presence_penalty", "frequency_penalty", "temperature", "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: give a finite number")
        if any(not text for text in self.stop):
            raise ValueError("stop: an empty text would end every answer before it begins; leave it out")

    @property
    def edits_logits(self):
        """Whether logits are changed before the temperature."""
        return (self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
                or self.constraint is not None or self.min_tokens)

    @property
    def truncates(self):
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Constraint(Protocol):
    """What a request's `constraint` has to offer: a grammar, for example."""

    def mask(self):
        """Which tokens may come next: bool [V] on the CPU, True where allowed."""

    def accept(self, token):
        """Take note that `token` (int) was chosen."""


def edit_logits(logits, params, prompt, answer, end_ids=()):
    """Apply one request's penalties, biases and constraint to its logits [V], in place.

    prompt, answer: lists of token ids so far; end_ids: tokens that would end the answer.
    """
    if params.repetition_penalty != 1:
        used = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        scores = logits[used]
        logits[used] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        used, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits[used] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(answer) < params.min_tokens:
        logits[list(end_ids)] = -math.inf
    if params.constraint is not None:
        logits.masked_fill_(~params.constraint.mask().to(logits.device), -math.inf)


def sample(logits, params, uniforms):
    """Draw one token per row: logits [B, V] float32, params and uniforms (floats in [0, 1)) lists of length B.

    Returns (tokens [B], log_probs [B]): the log-probability is that of the very distribution the token was drawn from,
    after temperature and truncation (0 where the likeliest token was taken for certain).
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    log_probs = torch.zeros(len(logits), device=logits.device)
    kinds = ["greedy" if p.temperature == 0 else "truncated" if p.truncates else "plain" for p in params]
    for kind, draw in (("greedy", None), ("plain", draw_from_all), ("truncated", draw_from_likeliest)):
        rows = [i for i, other in enumerate(kinds) if other == kind]
        if not rows:
            continue
        part = logits if len(rows) == len(logits) else logits[rows]
        if draw is None:
            tokens[rows] = part.argmax(-1)
            continue
        chosen = [params[i] for i in rows]
        temperature = logits.new_tensor([max(p.temperature, COLDEST) for p in chosen])[:, None]
        u = torch.tensor([uniforms[i] for i in rows], dtype=torch.float64, device=logits.device)[:, None]
        # tiny temperatures must not overflow: the largest logit becomes 0 first
        tokens[rows], log_probs[rows] = draw(((part - part.amax(-1, keepdim=True)) / temperature).softmax(-1), chosen, u)
    return tokens, log_probs


def draw_from_all(probs, params, u):
    """Inverse of the cumulative distribution in the vocabulary's order; probs [B, V], u [B, 1] -> tokens, log_probs [B]."""
    tokens = pick(probs, u)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def draw_from_likeliest(probs, params, u):
    """The same among the tokens that top-k, top-p and min-p leave, from the likeliest down."""
    V = probs.shape[-1]
    enough = min(max(FEW, *(p.top_k for p in params)), V)  # top-p is a share of all that top-k leaves
    for size in (enough, V):
        candidates, ids = probs.topk(size, dim=-1)  # B C
        kept = truncate(candidates, params)
        if size == V or not bool(kept[:, -1].any()):  # the cut lies within what was looked at
            break
    candidates = torch.where(kept, candidates, 0.0)
    places = pick(candidates, u)
    log_probs = (candidates.gather(-1, places) / candidates.sum(-1, keepdim=True)).log()
    return ids.gather(-1, places)[:, 0], log_probs[:, 0]


def truncate(candidates, params):
    """Which candidates [B, C], sorted from the likeliest, stay: bool [B, C]; the likeliest always does."""
    rank = torch.arange(candidates.shape[-1], device=candidates.device)
    column = lambda values: candidates.new_tensor(values)[:, None]  # noqa: E731
    top_k = column([p.top_k or math.inf for p in params])
    kept = rank < top_k
    within = torch.where(kept, candidates, 0.0)
    whole = torch.where(top_k.isinf(), 1.0, within.sum(-1, keepdim=True))  # top-p is a share of what top-k has left
    before = (within.cumsum(-1) - within) / whole
    top_p = column([p.top_p for p in params])
    kept &= (before < top_p) | (top_p >= 1)
    kept &= candidates >= column([p.min_p for p in params]) * candidates[:, :1]
    kept[:, 0] = True
    return kept


def pick(weights, u):
    """The place [B, 1] at which the cumulative sum of weights [B, C] passes the share u [B, 1] of the whole."""
    cumulative = weights.double().cumsum(-1)
    places = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)  # u * whole may round up to the whole
    return torch.minimum(places, last)


def top_log_probs(logits, token, number):
    """(log-probability of `token`, the `number` likeliest as [(token, log-probability)]) for logits [V] of the bare model."""
    log_probs = logits.log_softmax(-1)
    best, ids = log_probs.topk(number) if number else ([], [])
    return log_probs[token].item(), [(int(i), float(p)) for i, p in zip(ids, best)]
