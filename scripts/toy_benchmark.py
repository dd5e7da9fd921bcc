"""A model answers questions of the toy world: in batches, greedily or sampled."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.chat.format import encode_prompt
from dataset.toy.scorer import GenerateAll, Question, ask_all
from model.engine import Engine
from model.model_minimind import MiniMindForCausalLM
from model.sampling import SamplingParams
from trainer.runtime.process import Compute

MAX_LEN = 4096  # tokens of the toy world's longest kind of question, its completion, and room


def evaluation_engine(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    run: Compute,
    max_batch_size: int = 64,
) -> Engine:
    """An Engine that measures `model`, in the run's arithmetic."""
    max_len = min(MAX_LEN, model.config.max_position_embeddings)
    return Engine(model, tokenizer, max_batch_size, max_len, run.dtype)


def continuations(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[str]:
    """The continuations, as text, of prompts given as token ids."""
    return [request.text for request in engine.generate(prompts, params)]


def completer(
    engine: Engine,
    enable_thinking: bool | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
) -> GenerateAll:
    """A `generate_all` for dataset.toy.scorer: greedy, or sampled with a seed per completion."""

    def complete(requests):
        prompts = [
            encode_prompt(engine.tokenizer, messages, tools, enable_thinking)
            for messages, tools in requests
        ]
        params = [
            SamplingParams(
                temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed * 100_000 + i
            )
            for i in range(len(prompts))
        ]
        # the prompt opened the think block: reasoning that never ends is no answer
        opened = "<think>\n" if enable_thinking else ""
        return [opened + text for text in continuations(engine, prompts, params)]

    return complete


def toy_answers(
    engine: Engine, questions: Sequence[Question], **options: Any
) -> list[tuple[Question, bool]]:
    """Ask a model questions: [(question, answered rightly)]; options: those of `completer`."""
    return ask_all(questions, completer(engine, **options))


def print_conversation(messages: list[dict]) -> None:
    """Print messages, reasoning and calls included."""
    for message in messages:
        if message.get("reasoning_content"):
            print(f"  {message['role']} thinks: {message['reasoning_content']}")
        for call in message.get("tool_calls") or ():
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            print(f"  {message['role']} calls: {call['name']}({arguments})")
        if message["content"]:
            print(f"  {message['role']}: {message['content'].strip()}")
