"""What a reply must look like, enforced while it is sampled: JSON by a schema, tool calls, with or without thinking before.

A grammar is written in llguidance's dialect of Lark. Marks like `<tool_call>` are single tokens to it, and free text may
not spell them, so that a reply that follows the grammar is read by `dataset.chat_reply` in exactly one way.
"""

import json
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from model.sampling import Constraint

SPELLING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}  # as the chat template writes JSON
FREE_TEXT = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<\/?(tool_call|think)>(.|\n)*/"
MOST_CALLS = 8  # of one reply that must call
OPEN_ENDED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"}


class GrammarConstraint(Constraint):
    """One reply on its way through a grammar. It never raises: after a failure only the end is allowed, `failure` says why."""

    def __init__(self, matcher, end_ids, size):
        self.matcher, self.size = matcher, size
        self.bits = np.zeros((size + 31) // 32, dtype=np.int32)
        self.only_end = torch.zeros(size, dtype=torch.bool)
        self.only_end[sorted(end_ids)] = True

    @property
    def failure(self):
        """What went wrong, an empty text if nothing did."""
        return self.matcher.get_error() if self.matcher.is_error() else ""

    def mask(self):
        if not self.matcher.is_error():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
            allowed = np.unpackbits(self.bits.view(np.uint8), bitorder="little")[:self.size]
            if allowed.any():
                return torch.from_numpy(allowed.view(np.bool_))
        return self.only_end

    def accept(self, token):
        self.matcher.consume_token(token)


class Grammars:
    """Compiles grammars for one tokenizer; compiled ones are kept."""

    def __init__(self, tokenizer, end_ids):
        self.end_ids, self.size = end_ids, len(tokenizer)
        self.tokenizer = from_tokenizer(tokenizer, eos_token=sorted(end_ids))
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def constraint(self, grammar):
        """A fresh GrammarConstraint. ValueError if the grammar, or a schema in it, cannot be followed."""
        return GrammarConstraint(self._compiled(grammar).deep_copy(), self.end_ids, self.size)

    def _compile(self, grammar):
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0].partition("failed to compile JSON schema: ")
            raise ValueError(f"the JSON schema cannot be followed: {reason[2] or reason[0]}")
        return matcher


def json_rule(schema):
    """A grammar's expression for the values of a JSON schema."""
    return "%json " + json.dumps(schema | {"x-guidance": SPELLING})


def call_schema(function):
    """The schema of a function's arguments; ones that it does not list are not invented. ValueError if it is no object's."""
    schema = {"type": "object", **(function.parameters or {"properties": {}})}
    if schema["type"] != "object":
        raise ValueError(f"the parameters of {function.name} have type {schema['type']!r}: a function's arguments are an object")
    return close(schema)


def close(schema):
    """The schema with additionalProperties: false where properties are listed and nothing else is said about them."""
    return schema if OPEN_ENDED & set(schema) or "properties" not in schema else {**schema, "additionalProperties": False}


def call_rules(functions, loose=()):
    """The rules `call`, `call_0`, ...; of the functions named in `loose` the arguments may be any object."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": "{function.name}", "arguments": ')
        rules += [f'call_{i}: <tool_call> {head} arguments_{i} "}}\\n" </tool_call>',
                  f"arguments_{i}: {json_rule({'type': 'object'} if function.name in loose else call_schema(function))}"]
    return rules


def reply_grammar(content=None, functions=(), must_call=False, parallel=True, thinking=None, loose=()):
    """The grammar of a whole reply.

    content: JSON schema of the content, None for free text. functions: what may be called; must_call: it has to be.
    thinking: True: the prompt has opened a think block; False: the reply may not have one; None: it may open one, unless it
    must have a form: then it comes without, so that max_tokens is not spent on thoughts nobody asked for.
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
    rules += [f"body: {body}", r"gap: /\n{0,2}/"] + (call_rules(functions, loose) if functions else [])
    if thinking is None and (must_call or content is not None):
        thinking = False
    start = {True: "TEXT </think> gap body", False: "body", None: "(<think> TEXT </think> gap)? body"}[thinking]
    return "\n".join([f"start: {start}", *rules])
