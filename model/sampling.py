"""One token from logits: penalties, temperature, truncation, and a draw that depends on nothing but
its seed.

Each request has its own parameters and its own stream of random numbers; a row's token does not
depend on the other rows of the batch. The order is that of transformers' logits processors and
warpers: repetition penalty, presence and frequency penalties, biases, constraint; then temperature,
top-k, top-p, min-p.

Shape letters: B rows   V vocabulary   C candidates for truncation
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

# Truncation first looks at so many of the most probable tokens: sorting all of them costs more than
# the network's head.
FEW = 256
COLDEST = 1e-6  # a lower temperature is computed as this one, which is as good as greedy


@dataclass
class SamplingParams:
    """How one request is sampled. ValueError, naming the field, for values without meaning."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020)
    min_p: float = 0.0  # drops tokens below this fraction of the highest (Nguyen et al. 2024)
    # divides positive logits of tokens in prompt or completion, multiplies negative ones (Keskar et
    # al. 2019)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted once from the logits of the completion's tokens
    frequency_penalty: float = 0.0  # subtracted once for each time that they occur there
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to single tokens
    max_tokens: int = 512  # of the completion
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # texts that end the completion and do not belong to it
    stop_switches: dict[int, bool] = field(default_factory=dict)  # see `TextStream`
    in_stop_scope: bool = True
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None  # the same seed gives the same completion; None draws one
    logprobs: int | None = None  # alternatives to report per token; 0: only the token itself
    constraint: "Constraint | None" = None

    def __post_init__(self):
        bounds = {
            (0, math.inf): ("temperature", "top_k", "min_tokens", "repetition_penalty"),
            (0, 1): ("top_p", "min_p"),
            (1, math.inf): ("max_tokens",),
        }
        for (low, high), names in bounds.items():
            for name in names:
                if not low <= (value := getattr(self, name)) <= high:
                    raise ValueError(f"{name} {value}: give a value from {low} to {high}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} 0: give more than 0")
        for name in ("presence_penalty", "frequency_penalty", "temperature", "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: give a finite number")
        if not all(self.stop):
            raise ValueError(
                "stop: an empty text would end every completion before it begins; leave it out"
            )

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before the temperature."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.constraint is not None
            or self.min_tokens
        )

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Constraint(Protocol):
    """A rule for the next token, such as a grammar."""

    def mask(self) -> torch.Tensor:
        """The tokens that may come next: bool [V] on the CPU, True where allowed."""

    def accept(self, token: int) -> None:
        """Take note that `token` was chosen."""


def edit_logits(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: list[int],
    completion: list[int],
    end_ids: Iterable[int] = (),
) -> None:
    """Apply one request's penalties, biases and constraint to its logits [V], in place.

    end_ids: tokens that would end the completion.
    """
    if (penalty := params.repetition_penalty) != 1:
        used = torch.tensor(sorted({*prompt, *completion}), device=logits.device)
        scores = logits[used]
        logits[used] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if completion and (params.presence_penalty or params.frequency_penalty):
        used, counts = torch.tensor(completion, device=logits.device).unique(return_counts=True)
        logits[used] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(completion) < params.min_tokens:
        logits[list(end_ids)] = -math.inf
    if params.constraint is not None:
        logits.masked_fill_(~params.constraint.mask().to(logits.device), -math.inf)


def sample(
    logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row of logits [B, V], float32, with a uniform number from [0, 1) each.

    Returns tokens [B] and log-probabilities [B] under the very distribution of the draw, after
    temperature and truncation (0 where decoding is greedy).
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    log_probs = torch.zeros(len(logits), device=logits.device)
    kinds = [
        "greedy" if p.temperature == 0 else "truncated" if p.truncates else "plain" for p in params
    ]
    for kind in set(kinds):
        rows = [i for i, other in enumerate(kinds) if other == kind]
        part = logits if len(rows) == len(logits) else logits[rows]
        if kind == "greedy":
            tokens[rows] = part.argmax(-1)
            continue
        chosen = [params[i] for i in rows]
        temperature = column(part, [max(p.temperature, COLDEST) for p in chosen])
        u = torch.tensor([[uniforms[i]] for i in rows], dtype=torch.float64, device=part.device)
        # the largest logit becomes 0 first: tiny temperatures must not overflow
        probs = ((part - part.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if kind == "plain":
            places = pick(probs, u)
            tokens[rows], log_probs[rows] = places[:, 0], probs.gather(-1, places)[:, 0].log()
        else:
            tokens[rows], log_probs[rows] = draw_truncated(probs, chosen, u)
    return tokens, log_probs


def column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    """Values as [B, 1], with the dtype and on the device of a tensor."""
    return like.new_tensor(values)[:, None]


def draw_truncated(
    probs: torch.Tensor, params: list[SamplingParams], u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw with u [B, 1] among the tokens of probs [B, V] that top-k, top-p and min-p keep, the
    most probable first; tokens [B], log_probs [B].
    """
    V = probs.shape[-1]
    for size in (min(max(FEW, *(p.top_k for p in params)), V), V):
        candidates, ids = probs.topk(size, dim=-1)  # B C
        kept = truncate(candidates, params)
        if size == V or not bool(kept[:, -1].any()):  # the cut lies within the candidates
            break
    candidates = torch.where(kept, candidates, 0.0)
    places = pick(candidates, u)
    log_probs = (candidates.gather(-1, places) / candidates.sum(-1, keepdim=True)).log()
    return ids.gather(-1, places)[:, 0], log_probs[:, 0]


def truncate(candidates: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Which candidates [B, C], the most probable first, stay: bool [B, C]; the first always."""
    rank = torch.arange(candidates.shape[-1], device=candidates.device)
    top_k = column(candidates, [p.top_k or math.inf for p in params])
    kept = rank < top_k
    within = torch.where(kept, candidates, 0.0)
    # top-p is a fraction of the probability that top-k leaves
    total = torch.where(top_k.isinf(), 1.0, within.sum(-1, keepdim=True))
    before = (within.cumsum(-1) - within) / total
    top_p = column(candidates, [p.top_p for p in params])
    kept &= (before < top_p) | (top_p >= 1)
    kept &= candidates >= column(candidates, [p.min_p for p in params]) * candidates[:, :1]
    kept[:, 0] = True
    return kept


def pick(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Where [B, 1] the cumulative weights [B, C] pass the fraction u [B, 1] of their total."""
    cumulative = weights.double().cumsum(-1)
    places = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # u * total may round up to the total: no further than the last weight above 0
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(places, last)


def top_log_probs(
    logits: torch.Tensor, token: int, number: int
) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of `token` and the `number` highest ones as (token, log-probability), for
    logits [V] of the bare model.
    """
    log_probs = logits.log_softmax(-1)
    best, ids = log_probs.topk(number) if number else ([], [])
    return log_probs[token].item(), [(int(i), float(p)) for i, p in zip(ids, best)]
