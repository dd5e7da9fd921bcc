"""A raw completion -> reasoning, content and tool calls: the inverse of the chat template.

    parser = ReplyParser()
    for piece in pieces_of_text:
        for event in parser.feed(piece):
            print(event)
    print(parser.finish())

Pieces may be cut anywhere. Whatever is not well-formed (a call that is no JSON, a block that is
never closed) stays content, character by character. Line breaks that the template sets around its
special tokens belong to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
CALL_HEAD = re.compile(
    rf'<tool_call>\s*\{{\s*"name"\s*:\s*({STRING})\s*,\s*"arguments"\s*:\s*(?=\{{)'
)
CALL_TAIL = re.compile(r"\s*\}\s*</tool_call>")
JSON_SIGN = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


class Reasoning(NamedTuple):
    """A piece of the text in the think block."""

    text: str


class Content(NamedTuple):
    """A piece of the answer."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins; index counts the calls of the reply."""

    index: int
    name: str


class CallArguments(NamedTuple):
    """A piece of a call's arguments, which together are a JSON object as the model spelt it."""

    index: int
    text: str


class CallEnd(NamedTuple):
    """A tool call is complete."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


class ReplyParser:
    """Takes in a completion piece by piece; `feed` and `finish` return lists of events.

    in_reasoning: the prompt has opened the think block already. is_begun: it ends with a part of
    this block's text, or of the answer's. tools=False: `<tool_call>` is text like any other.
    trust_calls=False holds a call back until it is complete and well-formed. With True its
    arguments are returned as they come, for callers that constrain the model by a grammar: an
    argument that was returned cannot become content again.
    """

    def __init__(
        self,
        in_reasoning: bool = False,
        tools: bool = True,
        trust_calls: bool = False,
        is_begun: bool = False,
    ):
        self.state = "reasoning" if in_reasoning else "content" if is_begun else "start"
        self.tools, self.trust_calls = tools, trust_calls
        self.buffer = ""  # text that has not become an event yet
        self.num_calls = 0
        # nothing of the present block was returned: line breaks here belong to its opening token
        self.at_start = not is_begun

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends within the think block."""
        return self.state == "reasoning"

    def feed(self, text: str) -> list[Event]:
        """The events that are certain once `text` has come."""
        self.buffer += text
        return self._events(is_last=False)

    def finish(self) -> list[Event]:
        """The completion has ended: the events of whatever was held back."""
        events = self._events(is_last=True)
        if self.state == "tail":
            events.append(CallEnd(self.num_calls))
        return events

    def _events(self, is_last: bool) -> list[Event]:
        events, state = [], None
        # every step that changes the state may leave something for the next
        while self.buffer and state != self.state:
            state = self.state
            getattr(self, f"_in_{state}")(events, is_last)
        return events

    def _in_start(self, events: list, is_last: bool) -> None:
        text = self.buffer.lstrip()
        if text.startswith(THINK):
            self.buffer, self.state = text[len(THINK) :], "reasoning"
        elif is_last or not THINK.startswith(text):
            self.state, self.at_start = "content", False

    def _in_reasoning(self, events: list, is_last: bool) -> None:
        if self.at_start:
            self.buffer = self.buffer.lstrip("\n")
        text, token, rest = self.buffer.partition(END_THINK)
        if token or is_last:
            text, self.buffer = text.rstrip("\n"), rest
        else:
            text, self.buffer = _split_at_possible(text, END_THINK)
        if text:
            events.append(Reasoning(text))
            self.at_start = False
        if token:
            self.state, self.at_start = "content", True

    def _in_content(self, events: list, is_last: bool) -> None:
        if self.at_start:
            self.buffer = self.buffer.lstrip("\n")
        text, token, rest = self.buffer.partition(CALL) if self.tools else (self.buffer, "", "")
        if token:
            kept = text.rstrip("\n")
            text, self.buffer, self.state = kept, text[len(kept) :] + token + rest, "call"
        elif self.tools and not is_last:
            text, self.buffer = _split_at_possible(text, CALL)
        else:
            self.buffer = ""
        if text:
            events.append(Content(text))
            self.at_start = False

    def _in_call(self, events: list, is_last: bool) -> None:
        """The buffer holds line breaks, `<tool_call>` and the text after it."""
        start = self.buffer.index(CALL)
        if (
            self.trust_calls
            and (head := CALL_HEAD.match(self.buffer, start))
            and (name := _parse_json(head[1])) is not None
        ):
            self._open(events, start, name)
            self.buffer, self.state = self.buffer[head.end() :], "arguments"
            self.depth, self.in_string, self.escaped = 0, False, False
            return
        end = self.buffer.find(END_CALL, start)
        while end >= 0:
            call = read_call(self.buffer[start + len(CALL) : end])
            if call:
                self._open(events, start, call[0])
                events += [CallArguments(self.num_calls, call[1]), CallEnd(self.num_calls)]
                self.buffer, self.state = self.buffer[end + len(END_CALL) :], "content"
                self.num_calls, self.at_start = self.num_calls + 1, True
                return
            if "\n" in self.buffer[end - 1 : end] or not _in_open_string(
                self.buffer[start + len(CALL) : end]
            ):
                break  # not within a string, so this really was the end
            end = self.buffer.find(END_CALL, end + 1)
        if end >= 0 or is_last:
            self._give_up(events, start)

    def _open(self, events, start, name):
        if start > 1 and not self.at_start:  # the model's line breaks, but for the template's one
            events.append(Content(self.buffer[: start - 1]))
        events.append(CallStart(self.num_calls, name))

    def _give_up(self, events, start):
        """This is no call: the token is content, and the rest is parsed anew."""
        events.append(Content(self.buffer[: start + len(CALL)]))
        self.buffer, self.state, self.at_start = self.buffer[start + len(CALL) :], "content", False

    def _in_arguments(self, events: list, is_last: bool) -> None:
        end = self._end_of_value()
        text = self.buffer[:end]
        self.buffer = self.buffer[len(text) :]
        if text:
            events.append(CallArguments(self.num_calls, text))
        if end is not None:
            self.state = "tail"

    def _in_tail(self, events: list, is_last: bool) -> None:
        tail = CALL_TAIL.match(self.buffer)
        if tail or is_last:
            self.buffer = self.buffer[tail.end() :] if tail else self.buffer
            events.append(CallEnd(self.num_calls))
            self.state, self.at_start, self.num_calls = "content", True, self.num_calls + 1

    def _end_of_value(self):
        """Where in the buffer the JSON value ends that has begun before it; None: nowhere."""
        first = 1 if self.escaped else 0
        self.escaped = False
        for sign in JSON_SIGN.finditer(self.buffer, first):
            char = sign[0]
            if char[0] == "\\":
                self.escaped = char == "\\"  # the escaped character has not come yet
            elif char == '"':
                self.in_string = not self.in_string
            elif not self.in_string:
                self.depth += 1 if char in "{[" else -1
                if self.depth == 0:
                    return sign.end()
        return None


def _split_at_possible(text: str, token: str) -> tuple[str, str]:
    """(certain text, the end that may begin `token` or the line breaks before it)."""
    longest = min(len(text), len(token) - 1)
    held = next((n for n in range(longest, 0, -1) if text.endswith(token[:n])), 0)
    certain = text[: len(text) - held].rstrip("\n")
    return certain, text[len(certain) :]


def _in_open_string(text: str) -> bool:
    """Whether a JSON text ends within a string."""
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', text)) % 2 == 1


def _parse_json(text: str) -> Any:
    """The value of a JSON text; None for other text, for NaN, and if UTF-8 cannot hold it."""

    def refuse(name):
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def read_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of the text inside `<tool_call>` tags; None if it is no call."""
    call = _parse_json(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments)
    is_call = isinstance(arguments, dict)
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if is_call else None


def collect(events: Iterable[Event]) -> dict:
    """The assistant's message that a list of events adds up to; see `parse_reply`."""
    events = list(events)
    content, reasoning = (
        "".join(event.text for event in events if isinstance(event, kind))
        for kind in (Content, Reasoning)
    )
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append({"type": "function", "function": {"name": event.name, "arguments": ""}})
        elif isinstance(event, CallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    if calls:
        message["tool_calls"] = calls
    return message


def parse_reply(text: str, in_reasoning: bool = False, tools: bool = True) -> dict:
    """A whole completion as a message: role and content, and where there are any, reasoning_content
    and tool_calls.

    tool_calls: [{"type": "function", "function": {"name": ..., "arguments": JSON text}}], as
    `encode_conversation` takes them.
    """
    parser = ReplyParser(in_reasoning, tools)
    return collect([*parser.feed(text), *parser.finish()])


def assistant_message(reply: str, tools: bool) -> dict:
    """A completion as a message; its tool calls are [{"name", "arguments": object}]."""
    message = parse_reply(reply, tools=tools)
    calls = [call["function"] for call in message.pop("tool_calls", ())]
    if calls:
        message["tool_calls"] = [
            {"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls
        ]
    return message


def strip_thinking(reply: str) -> str:
    """The completion after its reasoning; empty if the reasoning never ends."""
    return reply.rpartition("</think>")[2].partition("<think>")[0].strip()
