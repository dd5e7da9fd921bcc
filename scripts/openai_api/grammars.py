"""The grammar of a completion, enforced while sampling: JSON by a schema, tool calls, reasoning or
none before it.

A grammar is written in llguidance's dialect of Lark. Special tokens like `<tool_call>` are single
tokens to it, and free text may not spell them, so that `dataset.chat.reply` can read a completion
that follows the grammar in exactly one way.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from model.sampling import Constraint
from scripts.openai_api.requests import Function

# as the chat template writes JSON
SPELLING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
FREE_TEXT = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<\/?(tool_call|think)>(.|\n)*/"
MOST_CALLS = 8  # of a completion that must call
OPEN_ENDED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"}


class GrammarConstraint(Constraint):
    """A completion on its way through a grammar. It never raises: after a failure only the end is
    allowed, and `failure` tells the reason.
    """

    def __init__(self, matcher: LLMatcher, end_ids: Iterable[int], size: int):
        self.matcher, self.size = matcher, size
        self.bits = np.zeros((size + 31) // 32, dtype=np.int32)
        self.only_end = torch.zeros(size, dtype=torch.bool)
        self.only_end[sorted(end_ids)] = True

    @property
    def failure(self) -> str:
        """The error of the grammar, an empty text without one."""
        return self.matcher.get_error() if self.matcher.is_error() else ""

    def mask(self) -> torch.Tensor:
        """Which tokens may come next: bool [V]."""
        if not self.matcher.is_error():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
            allowed = np.unpackbits(self.bits.view(np.uint8), bitorder="little")[: self.size]
            if allowed.any():
                return torch.from_numpy(allowed.view(np.bool_))
        return self.only_end

    def accept(self, token: int) -> None:
        """Continue after this token."""
        self.matcher.consume_token(token)


class Grammars:
    """Compiles grammars for one tokenizer; compiled ones are kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]):
        self.end_ids, self.size = end_ids, len(tokenizer)
        self.tokenizer = from_tokenizer(tokenizer, eos_token=sorted(end_ids))
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def constraint(self, grammar: str) -> GrammarConstraint:
        """A fresh GrammarConstraint. ValueError for a grammar or schema that cannot be followed."""
        return GrammarConstraint(self._compiled(grammar).deep_copy(), self.end_ids, self.size)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            line = matcher.get_error().partition("\n")[0]
            reason = line.rpartition("failed to compile JSON schema: ")[2]
            raise ValueError(f"the JSON schema cannot be followed: {reason}")
        return matcher


def json_rule(schema: dict) -> str:
    """A grammar's expression for the values of a JSON schema."""
    return "%json " + json.dumps(schema | {"x-guidance": SPELLING})


def call_schema(function: Function) -> dict:
    """Schema of a function's arguments, none unlisted. ValueError unless they are an object."""
    schema = {"type": "object", **(function.parameters or {"properties": {}})}
    if schema["type"] != "object":
        raise ValueError(
            f"the parameters of {function.name} have type {schema['type']!r}: a function's "
            "arguments are an object"
        )
    return close(schema)


def close(schema: dict) -> dict:
    """The schema; additionalProperties are false where it lists properties and says no more."""
    if OPEN_ENDED & set(schema) or "properties" not in schema:
        return schema
    return {**schema, "additionalProperties": False}


def call_rules(functions: Sequence[Function], loose: Sequence[str] = ()) -> list[str]:
    """The rules `call`, `call_0`, ...; functions named in `loose` take any object as arguments."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": "{function.name}", "arguments": ')
        schema = {"type": "object"} if function.name in loose else call_schema(function)
        rules += [
            f'call_{i}: <tool_call> {head} arguments_{i} "}}\\n" </tool_call>',
            f"arguments_{i}: {json_rule(schema)}",
        ]
    return rules


def completion_grammar(
    content: dict | None = None,
    functions: Sequence[Function] = (),
    must_call: bool = False,
    parallel: bool = True,
    thinking: bool | None = None,
    loose: Sequence[str] = (),
) -> str:
    """The grammar of a whole completion.

    content: JSON schema of the content, None for free text. functions: those on offer; must_call:
    one has to be called. thinking: True: the prompt has opened a think block; False: the completion
    may not have one; None: it may open one, unless JSON or a call is enforced, so that max_tokens
    is not spent on reasoning nobody asked for.
    """
    rules = [FREE_TEXT, f"content: {json_rule(close(content)) if content is not None else 'TEXT'}"]
    calls = "call" + (rf' ("\n" call){{0,{MOST_CALLS - 1}}}' if parallel else "")
    if not functions:
        body = "content"
    elif must_call:
        body = calls
    elif content is not None:
        body = f"content | {calls}"
    else:
        body = "TEXT (call TEXT)*" if parallel else "TEXT (call)?"
    rules += [f"body: {body}", r"gap: /\n{0,2}/"] + (
        call_rules(functions, loose) if functions else []
    )
    if thinking is None and (must_call or content is not None):
        thinking = False
    start = {
        True: "TEXT </think> gap body",
        False: "body",
        None: "(<think> TEXT </think> gap)? body",
    }[thinking]
    return "\n".join([f"start: {start}", *rules])
