"""Penalties and truncation against transformers' logits processors; draws against the distribution
they come from.
"""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.sampling import SamplingParams, edit_logits, sample, top_log_probs, truncate
from tests.helpers.networks import assert_close

V = 1000
GRID = [i / 4000 for i in range(4000)]


def logits(rows=1, seed=0, spread=3.0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def reference(scores, params):
    """The distribution [B, V] that transformers' warpers leave."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    return LogitsProcessorList(warpers)(None, scores.double()).softmax(-1)


OPTIONS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.02},
    {"top_p": 0.7, "min_p": 0.3},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_is_that_of_transformers(options, temperature):
    params = SamplingParams(temperature=temperature, **options)
    scores = logits(rows=2)
    expected = reference(scores, params)
    candidates, ids = (scores.double() / temperature).softmax(-1).topk(V)
    kept = torch.where(truncate(candidates, [params] * 2), candidates, 0.0)
    ours = torch.zeros_like(expected).scatter(1, ids, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, expected)
    for row, probs in zip(scores, expected):  # every draw comes from there, with its probability
        tokens, log_probs = sample(row.expand(500, -1), [params] * 500, GRID[::8])
        assert (probs[tokens] > 0).all()
        assert_close(log_probs, probs[tokens].log().float(), 1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"temperature": 3.0, "top_p": 0.999}], ids=str
)
def test_the_fraction_of_random_numbers_that_give_a_token_is_its_probability(options):
    params = SamplingParams(**options)
    scores = logits()
    tokens, _ = sample(scores.expand(len(GRID), -1), [params] * len(GRID), GRID)
    fractions = torch.bincount(tokens, minlength=V) / len(GRID)
    assert (fractions - reference(scores, params)[0]).abs().max() <= 1 / len(GRID) + 1e-6


def test_a_row_does_not_depend_on_the_others():
    scores = logits(rows=40, spread=1.0)
    options = [OPTIONS[i % len(OPTIONS)] if i % 3 else {"temperature": i % 2} for i in range(40)]
    params = [SamplingParams(**one) for one in options]
    u = [(i * 0.618) % 1 for i in range(40)]
    tokens, log_probs = sample(scores, params, u)
    for i in range(40):
        token, log_prob = sample(scores[i : i + 1], params[i : i + 1], u[i : i + 1])
        assert token == tokens[i] and log_prob.item() == pytest.approx(
            log_probs[i].item(), abs=1e-5
        )


def test_the_ends_of_the_scale():
    scores = logits()
    greedy, log_prob = sample(scores, [SamplingParams(temperature=0)], [0.7])
    assert greedy[0] == scores.argmax() and log_prob[0] == 0
    for temperature in (1e-6, 1e-30, 1e-300):
        token, _ = sample(scores, [SamplingParams(temperature=temperature)], [0.7])
        assert token == scores.argmax()
    certain = torch.full((1, V), -math.inf)
    certain[0, 5] = 0
    for u in (0.0, math.nextafter(1, 0)):
        for params in (SamplingParams(), SamplingParams(top_p=0.5)):
            assert sample(certain, [params], [u])[0][0] == 5
    two = torch.full((1, V), -math.inf)
    two[0, [3, 8]] = 0
    assert sample(two, [SamplingParams()], [math.nextafter(1, 0)])[0][0] == 8


def test_penalties():
    prompt, completion = [1, 2, 3], [3, 3, 9]
    (scores,) = logits()
    ours = scores.clone()
    edit_logits(ours, SamplingParams(repetition_penalty=1.3), prompt, completion)
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    (expected,) = penalty(torch.tensor([prompt + completion]), scores[None].clone())
    torch.testing.assert_close(ours, expected)
    ours = scores.clone()
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -100.0})
    edit_logits(ours, params, prompt, completion)
    assert ours[3] == pytest.approx(scores[3].item() - 0.5 - 2 * 0.25, abs=1e-6)
    assert ours[9] == pytest.approx(scores[9].item() - 0.5 - 0.25, abs=1e-6)
    assert ours[1] == scores[1] and ours[7] == scores[7] - 100
    edit_logits(ours, SamplingParams(min_tokens=4), prompt, completion, end_ids={0, 2})
    assert ours[0] == ours[2] == -math.inf
    ours = scores.clone()

    class Even:
        def mask(self):
            return torch.arange(V) % 2 == 0

    edit_logits(ours, SamplingParams(constraint=Even()), prompt, completion)
    assert ours[1::2].isinf().all() and torch.equal(ours[::2], scores[::2])


def test_reported_log_probs():
    scores = logits()[0]
    log_prob, best = top_log_probs(scores, 4, 3)
    expected = scores.log_softmax(-1)
    assert log_prob == pytest.approx(expected[4].item())
    assert [token for token, _ in best] == expected.topk(3).indices.tolist()
    assert top_log_probs(scores, 4, 0)[1] == []


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 5),
        ("min_p", -0.1),
        ("top_k", -1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("stop", ("",)),
    ],
)
def test_values_without_meaning_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})
