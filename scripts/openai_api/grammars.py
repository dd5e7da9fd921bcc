"""The grammar of a completion, enforced while sampling: JSON by a schema, tool calls, reasoning or
none before it.

A grammar is written in llguidance's dialect of Lark. Special tokens like `<tool_call>` are single
tokens to it, and free text may not spell them, so that `dataset.chat.reply` can read a completion
that follows the grammar in exactly one way.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from model.sampling import Constraint
from scripts.openai_api.notices import Notices
from scripts.openai_api.requests import Function

# as the chat template writes JSON
SPELLING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
FREE_TEXT = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<\/?(tool_call|think)>(.|\n)*/"
MOST_CALLS = 8  # of a completion that must call
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("const", "enum", "default", "examples")
OPEN_ENDED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"}
NOTICES = Notices()


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
            raise ValueError(f"the JSON schema cannot be followed: {reason_of(matcher)}")
        for warning in matcher.get_grammar_warnings():
            NOTICES.print_once(f"not enforced in a tool's arguments: {warning}")
        return matcher


def reason_of(matcher: LLMatcher) -> str:
    """The error of a schema as one line, without the listing of the grammar around it."""
    error = matcher.get_error().rpartition("failed to compile JSON schema: ")[2]
    lines = error.partition("\n   1 | ")[0].splitlines()
    return " ".join(line.strip() for line in lines if line.strip(" ^"))  # ^^^ marks a place


def json_rule(schema: dict, lenient: bool = False) -> str:
    """A grammar's expression for the values of a JSON schema; lenient: it leaves out what cannot be
    enforced.
    """
    options = SPELLING | ({"lenient": True} if lenient else {})
    return "%json " + json.dumps(schema | {"x-guidance": options})


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


def without_hard_patterns(schema: Any, is_map: bool = False) -> Any:
    """The schema without regular expressions that cannot be enforced, such as look-ahead.

    is_map: this is a map from names to schemas, in which "pattern" is a name like any other.
    """
    if isinstance(schema, list):
        return [without_hard_patterns(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if is_map:
        return {name: without_hard_patterns(one) for name, one in schema.items()}
    by_pattern = schema.get("patternProperties")
    hard = [schema.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]
    left_out = set()
    if not is_easy_pattern(hard[0]):
        left_out |= {"pattern"}
    if not all(map(is_easy_pattern, hard[1:])):  # the other properties depend on it
        left_out |= {"patternProperties", "additionalProperties"}
    return {
        name: one if name in VALUES else without_hard_patterns(one, is_map=name in MAPS)
        for name, one in schema.items()
        if name not in left_out
    }


def is_easy_pattern(pattern: Any) -> bool:
    """Whether a regular expression can be enforced; other values are for others to judge."""
    if not isinstance(pattern, str):
        return True
    schema = {"type": "string", "pattern": pattern}
    if not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema)):
        return True
    NOTICES.print_once(f"not enforced in a tool's arguments: the pattern {pattern}")
    return False


def call_rules(functions: Sequence[Function], loose: Sequence[str] = ()) -> list[str]:
    """The rules `call`, `call_0`, ...; functions named in `loose` take any object as arguments, and
    the arguments of those that are not strict follow their schema where it can be enforced.
    """
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": "{function.name}", "arguments": ')
        schema = {"type": "object"} if function.name in loose else call_schema(function)
        if not function.strict:
            schema = without_hard_patterns(schema)
        rules += [
            f'call_{i}: <tool_call> {head} arguments_{i} "}}\\n" </tool_call>',
            f"arguments_{i}: {json_rule(schema, lenient=not function.strict)}",
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
