"""An assistant's raw reply -> reasoning, content and tool calls: the inverse of what the chat template writes.

    parser = ReplyParser()
    for piece in pieces_of_text:
        for event in parser.feed(piece):
            print(event)
    print(parser.finish())

Pieces may be cut anywhere. Whatever is not well-formed (a call that is no JSON, a block that is never closed) stays
content, character by character. Line breaks that the template sets around its marks belong to the marks.
"""

import json
import re
from typing import NamedTuple

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
CALL_HEAD = re.compile(rf'<tool_call>\s*\{{\s*"name"\s*:\s*({STRING})\s*,\s*"arguments"\s*:\s*(?=\{{)')
CALL_TAIL = re.compile(r"\s*\}\s*</tool_call>")
JSON_MARK = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


class Reasoning(NamedTuple):
    """A piece of what stands in the think block."""

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


class ReplyParser:
    """Takes in a reply piece by piece; `feed` and `finish` return lists of events.

    in_reasoning: the prompt has opened the think block already. tools=False: `<tool_call>` is text like any other.
    trust_calls=False holds a call back until it is seen to be well-formed. With True its arguments are handed out as
    they come, for callers that make the model write by a grammar: what was handed out cannot become content again.
    """

    def __init__(self, in_reasoning=False, tools=True, trust_calls=False):
        self.state = "reasoning" if in_reasoning else "start"
        self.tools, self.trust_calls = tools, trust_calls
        self.buffer = ""  # what was fed and has not become an event yet
        self.num_calls = 0
        self.is_first = True  # nothing of the present block was handed out: line breaks here belong to its opening mark

    @property
    def in_reasoning(self):
        return self.state == "reasoning"

    def feed(self, text):
        """The events that are certain once `text` has come."""
        self.buffer += text
        return self._events(is_last=False)

    def finish(self):
        """The reply has ended: the events of whatever was held back."""
        events = self._events(is_last=True)
        if self.state == "tail":
            events.append(CallEnd(self.num_calls))
        return events

    def _events(self, is_last):
        events, state = [], None
        while self.buffer and state != self.state:  # every step that changes the state may leave something for the next
            state = self.state
            getattr(self, f"_in_{state}")(events, is_last)
        return events

    def _in_start(self, events, is_last):
        text = self.buffer.lstrip()
        if text.startswith(THINK):
            self.buffer, self.state = text[len(THINK):], "reasoning"
        elif is_last or not THINK.startswith(text):
            self.state, self.is_first = "content", False

    def _in_reasoning(self, events, is_last):
        if self.is_first:
            self.buffer = self.buffer.lstrip("\n")
        text, mark, rest = self.buffer.partition(END_THINK)
        if mark or is_last:
            text, self.buffer = text.rstrip("\n"), rest
        else:
            text, self.buffer = split_at_possible(text, END_THINK)
        if text:
            events.append(Reasoning(text))
            self.is_first = False
        if mark:
            self.state, self.is_first = "content", True

    def _in_content(self, events, is_last):
        if self.is_first:
            self.buffer = self.buffer.lstrip("\n")
        if not self.tools:
            text, mark, rest = self.buffer, "", ""
        else:
            text, mark, rest = self.buffer.partition(CALL)
        if mark:
            kept = text.rstrip("\n")
            text, self.buffer, self.state = kept, text[len(kept):] + mark + rest, "call"
        elif self.tools and not is_last:
            text, self.buffer = split_at_possible(text, CALL)
        else:
            self.buffer = ""
        if text:
            events.append(Content(text))
            self.is_first = False

    def _in_call(self, events, is_last):
        """The buffer holds line breaks, `<tool_call>` and what follows it."""
        start = self.buffer.index(CALL)
        if self.trust_calls and (head := CALL_HEAD.match(self.buffer, start)) and (name := parse_json(head[1])) is not None:
            self._open(events, start, name)
            self.buffer, self.state = self.buffer[head.end():], "arguments"
            self.depth, self.in_string, self.escaped = 0, False, False
            return
        end = self.buffer.find(END_CALL, start)
        while end >= 0:
            call = read_call(self.buffer[start + len(CALL):end])
            if call:
                self._open(events, start, call[0])
                events += [CallArguments(self.num_calls, call[1]), CallEnd(self.num_calls)]
                self.buffer, self.state = self.buffer[end + len(END_CALL):], "content"
                self.num_calls, self.is_first = self.num_calls + 1, True
                return
            if "\n" in self.buffer[end - 1:end] or not in_open_string(self.buffer[start + len(CALL):end]):
                break  # not within a string, so this really was the end
            end = self.buffer.find(END_CALL, end + 1)
        if end >= 0 or is_last:
            self._give_up(events, start)

    def _open(self, events, start, name):
        if start > 1 and not self.is_first:  # the template sets one line break, the others were the model's
            events.append(Content(self.buffer[:start - 1]))
        events.append(CallStart(self.num_calls, name))

    def _give_up(self, events, start):
        """This is no call: the mark is content, and what follows is looked at anew."""
        events.append(Content(self.buffer[:start + len(CALL)]))
        self.buffer, self.state, self.is_first = self.buffer[start + len(CALL):], "content", False

    def _in_arguments(self, events, is_last):
        end = self._end_of_value()
        text = self.buffer[:end]
        self.buffer = self.buffer[len(text):]
        if text:
            events.append(CallArguments(self.num_calls, text))
        if end is not None:
            self.state = "tail"

    def _in_tail(self, events, is_last):
        tail = CALL_TAIL.match(self.buffer)
        if tail or is_last:
            self.buffer = self.buffer[tail.end():] if tail else self.buffer
            events.append(CallEnd(self.num_calls))
            self.state, self.is_first, self.num_calls = "content", True, self.num_calls + 1

    def _end_of_value(self):
        """Where in the buffer the JSON value ends that began before or at its beginning; None: not yet."""
        first = 1 if self.escaped else 0
        self.escaped = False
        for mark in JSON_MARK.finditer(self.buffer, first):
            char = mark[0]
            if char[0] == "\\":
                self.escaped = char == "\\"  # what it escapes has not come yet
            elif char == '"':
                self.in_string = not self.in_string
            elif not self.in_string:
                self.depth += 1 if char in "{[" else -1
                if self.depth == 0:
                    return mark.end()
        return None


def split_at_possible(text, mark):
    """(what is certain, the end that may be the beginning of `mark` or of the line breaks before it)."""
    longest = min(len(text), len(mark) - 1)
    held = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    certain = text[:len(text) - held].rstrip("\n")
    return certain, text[len(certain):]


def in_open_string(text):
    """Whether a JSON text ends within a string."""
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', text)) % 2 == 1


def parse_json(text):
    """The value of a JSON text, None if it is none (NaN is none, and so is what cannot be written as UTF-8)."""
    def refuse(name):
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def read_call(text):
    """(name, arguments as JSON text) of what stands between `<tool_call>` and `</tool_call>`; None if it is no call."""
    call = parse_json(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def collect(events):
    """The assistant's message that a list of events adds up to; see `parse_reply`."""
    message = {"role": "assistant", "content": "".join(event.text for event in events if isinstance(event, Content))}
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
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


def parse_reply(text, in_reasoning=False, tools=True):
    """A whole raw reply as a message: role and content, and where there are any, reasoning_content and tool_calls.

    tool_calls: [{"type": "function", "function": {"name": ..., "arguments": JSON text}}], as `encode_conversation` takes them.
    """
    parser = ReplyParser(in_reasoning, tools)
    return collect([*parser.feed(text), *parser.finish()])
