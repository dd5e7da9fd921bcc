"""Whether a model that can reason keeps to the format that its prompt asks for: <think> or not."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat.format import encode_prompt
from dataset.packing import IGNORE
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.process import evaluating
from trainer.runtime.run import Run


def think_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of <think> and </think>. ValueError if they are no single tokens."""
    added = tokenizer.get_added_vocab()
    if not {"<think>", "</think>"} <= added.keys():
        raise ValueError(
            "the tokenizer of --from_weight has no tokens <think> and </think>, which this stage "
            "needs: begin with --from_weight none --tokenizer_path FOLDER, of trainer/"
            "train_tokenizer.py"
        )
    return [added["<think>"], added["</think>"]]


def bare_prompts(
    val_sets: list[Any], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[list[int]]:
    """Up to `count` held-out prompts: ids up to where the assistant begins its last message."""
    if not val_sets:
        return []
    _, empty_block = switch_endings(tokenizer)
    each = -(-count // len(val_sets))
    rows = [dataset[i] for dataset in val_sets for i in range(min(len(dataset), each))][:count]
    prompts = []
    for row in rows:
        is_target = row["labels"] != IGNORE
        begin = int((is_target[1:] & ~is_target[:-1]).nonzero()[0][-1]) + 1
        ids = row["input_ids"][:begin].tolist()
        if ids[-len(empty_block) :] == empty_block:
            ids = ids[: -len(empty_block)]
        prompts.append(ids)
    return prompts


def switch_endings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The end of a prompt, as ids, that asks for reasoning, and of one that asks for none."""
    question = [{"role": "user", "content": "?"}]
    bare = len(encode_prompt(tokenizer, question))
    return [encode_prompt(tokenizer, question, enable_thinking=x)[bare:] for x in (True, False)]


def keeps_format(completion: list[int], thinking: bool, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a completion, as ids up to its end token, has the form that its prompt asked for.

    thinking: the block, which the prompt opened, is closed once and not empty, and a non-empty
    answer follows that ends. Else there is no <think> and no </think>.
    """
    opening, closing = (completion.count(token) for token in think_ids(tokenizer))
    if not thinking:
        return opening == closing == 0
    if opening or closing != 1 or completion[-1] != tokenizer.eos_token_id:
        return False
    at = completion.index(think_ids(tokenizer)[1])
    return all(tokenizer.decode(x).strip() for x in (completion[:at], completion[at + 1 : -1]))


def format_ratios(
    run: Run,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> dict[str, float]:
    """{"val_format/thinking", "val_format/direct"}: fraction of completions in that format."""
    ratios, size = {}, run.args.batch_size
    for name, ending in zip(("thinking", "direct"), switch_endings(tokenizer)):
        kept = 0
        for start in range(0, len(prompts), size):
            batch = [ids + ending for ids in prompts[start : start + size]]
            for completion in greedy_ids(run, model, batch, max_new_tokens):
                kept += keeps_format(completion, name == "thinking", tokenizer)
        ratios[f"val_format/{name}"] = kept / len(prompts)
    return ratios


def greedy_ids(
    run: Run, model: MiniMindForCausalLM, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy completions of prompts, both as ids, up to and with the end token.

    By `generate`, which works on sharded networks too.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + x for n, x in zip(padding, prompts)], device=run.device)
    mask = torch.tensor([[0] * n + [1] * len(x) for n, x in zip(padding, prompts)])
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    with evaluating(model), run.autocast():
        out = model.generate(ids, attention_mask=mask.to(run.device), **options)
    completions, ends = [], model.generation_config.eos_token_id
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        completions.append(row[: end + 1])
    return completions
