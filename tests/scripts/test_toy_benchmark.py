"""Batched generation against transformers'; right and wrong answers; seeds of sampled answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dataset.toy.rows import heldout_questions
from dataset.toy.world import make_world
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams
from scripts import toy_benchmark
from scripts.checkpoint import ComputeArgs
from scripts.toy_benchmark import continuations, evaluation_engine, toy_answers
from trainer.runtime.process import Compute

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


@pytest.fixture
def run():
    return Compute(ComputeArgs("cpu"))


def tiny_model(tokenizer, **changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(
        MiniMindConfig(
            **{
                **dict(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    intermediate_size=16,
                    initializer_range=0.2,
                ),
                **changes,
            }
        )
    )


def test_batched_generation_equals_one_prompt_at_a_time(tokenizer, run):
    model = tiny_model(tokenizer).eval()
    prompts = [
        tokenizer(text).input_ids for text in ("one", "two three four", "你好", "a b c d e f g")
    ]
    engine = evaluation_engine(model, tokenizer, run, max_batch_size=3)
    ids = [torch.tensor([prompt]) for prompt in prompts]
    out = [
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False)[
            0, x.shape[1] :
        ]
        for x in ids
    ]
    greedy = [SamplingParams(temperature=0, max_tokens=8)] * len(prompts)
    assert continuations(engine, prompts, greedy) == [
        tokenizer.decode(x, skip_special_tokens=True) for x in out
    ]


def test_toy_benchmark_sees_right_and_wrong_answers(tokenizer, run, monkeypatch):
    questions = [
        q
        for q in heldout_questions(make_world("mini"), 6)
        if q.skill in ("arithmetic", "comparison")
    ]
    by_text = {q.messages[-1]["content"]: q.answer for q in questions}
    seen = []

    def oracle(engine, prompts, params):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        seen.extend(texts)
        return [
            next(answer for text, answer in by_text.items() if text in prompt) for prompt in texts
        ]

    engine = evaluation_engine(tiny_model(tokenizer), tokenizer, run)
    monkeypatch.setattr("scripts.toy_benchmark.continuations", oracle)
    assert all(right for _, right in toy_answers(engine, questions))
    assert all(text.endswith("<|im_start|>assistant\n") for text in seen)
    monkeypatch.setattr(
        "scripts.toy_benchmark.continuations", lambda engine, prompts, params: ["-"] * len(prompts)
    )
    assert not any(right for _, right in toy_answers(engine, questions))


def test_sampled_answers_depend_on_the_seed_alone(tokenizer, run, monkeypatch):
    questions = heldout_questions(make_world("mini"), 1)[:4]
    engine, replies = evaluation_engine(tiny_model(tokenizer), tokenizer, run), []
    ask_all = toy_benchmark.ask_all
    monkeypatch.setattr(
        toy_benchmark,
        "ask_all",
        lambda asked, generate: ask_all(
            asked, lambda requests: replies.append(generate(requests)) or replies[-1]
        ),
    )
    for seed in (1, 1, 2):
        replies.append(seed)
        toy_answers(engine, questions, max_new_tokens=6, temperature=1.0, seed=seed)
    first, again, other = (replies[i + 1] for i, x in enumerate(replies) if isinstance(x, int))
    assert first == again != other and len(first) == 4
