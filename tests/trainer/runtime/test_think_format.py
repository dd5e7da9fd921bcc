"""Whether completions keep the format that a prompt asks for, and the prompts that ask for it."""

import json
from types import SimpleNamespace

import pytest
import torch

from dataset.chat.format import encode_prompt
from dataset.lm_dataset import ReasonDataset
from model.engine import Engine
from model.sampling import SamplingParams
from tests.helpers.checkpoints import load_tokenizer, random_network
from tests.helpers.rows import chat, write
from trainer.runtime import think_format
from trainer.runtime.run import Run
from trainer.runtime.stage_args import TrainArgs
from trainer.runtime.think_format import (
    bare_prompts,
    format_ratios,
    greedy_ids,
    keeps_format,
    switch_endings,
    think_ids,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize(
    "text, thinking, direct",
    [
        ("so\n</think>\n\n4.<|im_end|>", True, False),
        ("4.<|im_end|>", False, True),
        ("4.", False, True),
        ("so\n</think>\n\n4.", False, False),
        ("so\n</think>\n\n4.<|endoftext|>", False, False),  # does not end, or not the turn
        ("\n</think>\n\n4.<|im_end|>", False, False),
        ("so\n</think>\n\n<|im_end|>", False, False),  # no reasoning, or no answer
        ("so\n</think>\n\n4.</think><|im_end|>", False, False),
        ("<think>so\n</think>\n\n4.<|im_end|>", False, False),
        ("so <|im_end|>", False, True),
        ("<think>\nso<|im_end|>", False, False),
        ("<tool_call>\n{}\n</tool_call><|im_end|>", False, True),
        ("so\n</think>\n\n<tool_call>\n{}\n</tool_call><|im_end|>", True, False),
    ],
)
def test_completions_that_keep_the_format(text, thinking, direct, tokenizer):
    completion = tokenizer(text).input_ids
    assert keeps_format(completion, True, tokenizer) == thinking
    assert keeps_format(completion, False, tokenizer) == direct


def test_the_ids_of_the_special_tokens(tokenizer):
    assert tokenizer.decode(think_ids(tokenizer)) == "<think></think>"


def test_prompts_of_held_out_rows_are_those_of_the_chat(tokenizer, tmp_path):
    """Of both kinds of rows, with any number of turns; with the switch's endings they are what a
    chat would ask.
    """
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = {"role": "assistant", "content": "d"}
    chats = write(tmp_path / "chats.jsonl", [{"conversations": [*messages, answer]}])
    rows = [chat(f"What is {i}?", f"{i}", reasoning_content="so " * (1 + i % 5)) for i in range(20)]
    reasoning = write(tmp_path / "reasoning.jsonl", rows)
    views = [
        ReasonDataset(path, tokenizer, 96, cache_dir=tmp_path, num_proc=1, direct_ratio=0.5)
        for path in (chats, reasoning)
    ]
    prompts = bare_prompts(views, tokenizer, 9)
    questions = [json.loads(line)["conversations"][:1] for line in reasoning.open()]
    assert prompts == [encode_prompt(tokenizer, prompt) for prompt in (messages, *questions[:5])]
    for ending, thinking in zip(switch_endings(tokenizer), (True, False)):
        assert prompts[0] + ending == encode_prompt(tokenizer, messages, enable_thinking=thinking)
    assert bare_prompts(views, tokenizer, 1) == prompts[:1]
    assert bare_prompts([], tokenizer, 9) == []


def test_completions_of_prompts_of_several_lengths_are_the_engines(tokenizer):
    model = random_network(0, num_hidden_layers=2, qk_norm=True, initializer_range=0.2).eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    questions = [[{"role": "user", "content": "a " * n}] for n in (1, 9, 30, 4)]
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    run = Run(TrainArgs(device="cpu"))
    completions = greedy_ids(run, model, prompts, 12)
    params = SamplingParams(temperature=0, max_tokens=12)
    requests = Engine(model, tokenizer).generate(prompts, params)
    assert completions == [request.sampled for request in requests]
    token = completions[0][5]
    first = completions[0].index(token)  # as if this token were one that ends a completion
    model.generation_config.eos_token_id = [token, tokenizer.pad_token_id]
    assert greedy_ids(run, model, prompts, 12)[0] == completions[0][: first + 1]


def test_the_ratios_are_of_all_prompts_in_batches(tokenizer, monkeypatch):
    """Three prompts in batches of two; the network reasons in the first of them alone."""
    good, seen = tokenizer("so\n</think>\n\n4.<|im_end|>").input_ids, []

    def complete(run, model, prompts, max_new_tokens):
        seen.append((prompts, max_new_tokens))
        return [good if prompt[0] == 1 else tokenizer("4.").input_ids for prompt in prompts]

    monkeypatch.setattr(think_format, "greedy_ids", complete)
    run = SimpleNamespace(args=SimpleNamespace(batch_size=2))
    ratios = format_ratios(run, torch.nn.Identity(), tokenizer, [[1], [2], [3]], 7)
    assert ratios == {"val_format/thinking": 1 / 3, "val_format/direct": 2 / 3}
    thinking, direct = switch_endings(tokenizer)
    assert seen[:2] == [([[1] + thinking, [2] + thinking], 7), ([[3] + thinking], 7)]
    assert seen[2][0] == [[1] + direct, [2] + direct]
