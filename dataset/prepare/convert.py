"""Rows in other people's formats -> rows in ours (dataset.md), checked.

    alpaca      {"instruction", "input", "output"}, maybe "system", "reasoning_content" and
                "history" [[user, assistant], ...]; or a prompt, a "context" and a response under
                one of their usual names
    sharegpt    {"conversations": [{"from": "human", "value": ...}, ...]}, with function_call,
                observation, tools, system
    messages    {"messages" or "conversations": [{"role", "content", ...}]}, with tool_calls and
                tools, as OpenAI has it
    preference  {"prompt", "chosen", "rejected"}: answers as strings or messages; or the answers
                next to "conversations"
    glaive      {"system", "chat"} or {"sample"}: a whole conversation in one text
    text        {"text"} or {"content"}

From .jsonl, .json, .parquet, .csv, .tsv and .txt, packed too (.gz, .xz). A row's format is seen
from its keys. Tool calls and reasoning inside texts are read as dataset/chat/spellings.py says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from dataset.chat.format import check_answers, check_conversation
from dataset.chat.spellings import REASONING, WEIGHTS, read_messages
from dataset.files.jsonl import dump_row, parse_row
from dataset.files.outputs import check_outputs, whole_file
from dataset.prepare.cleaning import VERIFIED
from dataset.prepare.foreign_files import SPLITS, read_any
from dataset.prepare.glaive import SPEAKER, from_glaive

PROMPTS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("input", "context")  # of a prompt: stands below it
RESPONSES = ("output", "response", "answer", "completion", "target")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
MESSAGES = ("conversations", "messages")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "bot", "model"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
    "function_call": ("function_call", "tool_call"),
}
MESSAGE_KEYS = {"from", "value", "role", "content", "tool_calls", "function_call", "tools"}
MESSAGE_KEYS |= {*REASONING, *WEIGHTS}
ROLES = {theirs: ours for ours, names in ROLES.items() for theirs in names}
NAMED = 5
OTHER_SPELLING = "tool calls, reasoning or weights read from another spelling"


def convert_row(row: dict, format: str = "auto", notes: set[str] | None = None) -> dict:
    """Return the row in our format; ValueError says why it cannot be. notes: gets "respelled"."""
    if None in row:  # where csv puts fields without a column
        raise ValueError(
            "more fields than the table's first line. Put quotes around fields with the separator."
        )
    if format == "auto":
        format = detect(row)
    if format != "text" and (media := _first(row, MEDIA)):
        raise ValueError(f"{media} cannot be learned, only text. Leave the row out.")
    converted = FORMATS[format](row)
    for key, messages in converted.items():
        if key != "text":
            read = read_messages(messages)
            if read != messages and notes is not None:
                notes.add("respelled")
            converted[key] = [_with_json_calls(one) for one in read]
            check_conversation(converted[key])
            if not any(row.get(name) is not None for name in VERIFIED):  # a prompt has no answer
                check_answers(converted[key])
    if "conversations" in converted:
        if format != "alpaca":  # where "answer" is the response
            converted |= {key: row[key] for key in VERIFIED if row.get(key) is not None}
        roles = {message["role"] for message in converted["conversations"]}
        if len(converted) == 1 and "assistant" not in roles:
            raise ValueError(
                "no message of the assistant, so there is nothing to learn. Add the answer."
            )
    return converted


def unused_keys(row: dict, format: str) -> list[str]:
    """Return the keys with a value that a row's conversion leaves out, of its messages too."""
    common = {*SYSTEMS, *TOOLS, _first(row, MESSAGES)}
    prompt = {_first(row, PROMPTS), *CONTEXTS, "history"}
    used = {
        "text": {"text" if "text" in row else "content"},
        "sharegpt": {*common, *VERIFIED},
        "messages": {*common, *VERIFIED},
        "alpaca": {*common, *prompt, *REASONING, _first(row, RESPONSES)},
        "preference": {*common, *prompt, "chosen", "rejected"},
        "glaive": {"system", "chat", "sample"},
    }
    lists = (_as_json(row.get(key)) for key in (*MESSAGES, "chosen", "rejected"))
    messages = [one for found in lists if isinstance(found, list) for one in found]
    in_messages = {
        key: value for one in messages if isinstance(one, dict) for key, value in one.items()
    }
    return [
        *(key for key, value in row.items() if _is_some(value) and key not in used[format]),
        *(
            f"{key} of messages"
            for key, value in in_messages.items()
            if _is_some(value) and key not in MESSAGE_KEYS
        ),
    ]


def _is_some(value) -> bool:
    return value not in (None, "", [], {})


def detect(row: dict) -> str:
    """Return the name of the format that a row's keys fit; ValueError if there is none."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    conversation = _as_json(row.get(_first(row, MESSAGES)))
    if isinstance(conversation, list) and conversation and isinstance(conversation[0], dict):
        return "sharegpt" if "from" in conversation[0] else "messages"
    if SPEAKER.match(str(row.get("chat", row.get("sample", "")))):
        return "glaive"
    if any(row.get(key) is not None for key in PROMPTS) and any(
        row.get(key) is not None for key in RESPONSES
    ):
        return "alpaca"
    if isinstance(row.get("text", row.get("content")), str):
        return "text"
    raise ValueError(
        f"the keys {', '.join(map(str, row)) or '(none)'} fit no format. Rename them, or see "
        "dataset/prepare/convert.py for the formats and give --format."
    )


def from_text(row: dict) -> dict:
    """{"text"} or {"content"} -> {"text"}."""
    text = row.get("text", row.get("content"))
    if isinstance(text, str) and text.strip():
        return {"text": text}
    raise ValueError("no text. Give a string that is not blank under 'text'.")


def from_alpaca(row: dict) -> dict:
    """A prompt, maybe with an input below it, and a response -> a conversation."""
    prompt, answer_key = _prompt_of(row), _first(row, RESPONSES)
    if not prompt:
        raise ValueError(f"no prompt. Give it under one of {', '.join(PROMPTS)}.")
    if answer_key is None or not _string(row, answer_key).strip():
        raise ValueError(
            f"no answer, or an empty one. Give it under one of {', '.join(RESPONSES)}."
        )
    answer = {"role": "assistant", "content": _string(row, answer_key), **_reasoning(row)}
    return {"conversations": _with_system([*prompt, answer], row)}


def from_messages(row: dict) -> dict:
    """Messages with "role" and "content", or with "from" and "value" -> a conversation."""
    messages = _as_json(row.get(_first(row, MESSAGES)))
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages. Give a list under 'conversations' or 'messages'.")
    messages = [_message(i, item) for i, item in enumerate(messages)]
    return {"conversations": _with_system(messages, row)}


def from_preference(row: dict) -> dict:
    """A prompt with two answers, or two whole conversations -> {"chosen", "rejected"}."""
    prompt = _prompt_of(row)
    both = {}
    for side in ("chosen", "rejected"):
        answer = _as_messages(row[side])
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list) or not answer:
            raise ValueError(
                f"{side} is {type(row[side]).__name__}, or empty. Give a string or messages."
            )
        answer = [_message(i, item) for i, item in enumerate(answer)]
        whole = any(message["role"] == "user" for message in answer)
        if not whole and not prompt:
            raise ValueError(
                f"{side} holds only the answer, and there is no prompt. Give one under 'prompt'."
            )
        both[side] = _with_system(answer if whole else [*prompt, *answer], row)
        if both[side][-1]["role"] != "assistant" or not both[side][-1]["content"]:
            raise ValueError(f"{side} does not end with an answer of the assistant. Add it.")
    chosen, rejected = (
        [*takewhile(lambda message: message["role"] != "assistant", side)] for side in both.values()
    )
    if chosen != rejected:
        raise ValueError("chosen and rejected begin differently. Give both the same prompt.")
    return both


FORMATS = {
    "alpaca": from_alpaca,
    "sharegpt": from_messages,
    "messages": from_messages,
    "preference": from_preference,
    "glaive": from_glaive,
    "text": from_text,
}


def _prompt_of(row: dict) -> list[dict]:
    """Return the messages before the answer: given so, or as text with context and history."""
    key = _first(row, MESSAGES) or _first(row, PROMPTS)
    found = _as_messages(row.get(key))
    if isinstance(found, list):
        return [_message(i, item) for i, item in enumerate(found)]
    if not found:
        return []
    messages = []
    for turn in _as_json(row.get("history")) or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError("history: a turn is no pair. Give [[user, assistant], ...].")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    parts = [_string(row, name) for name in dict.fromkeys((key, *CONTEXTS)) if row.get(name)]
    return [*messages, {"role": "user", "content": "\n".join(parts)}]


def _message(i: int, item) -> dict:
    if not isinstance(item, dict):
        raise ValueError(
            f"message {i} is a {type(item).__name__}. Give {{'role': ..., 'content': ...}}."
        )
    given, content = item.get("from", item.get("role")), item.get("value", item.get("content"))
    role = ROLES.get(str(given).lower())
    if role is None:
        raise ValueError(
            f"message {i} has the unknown role {given!r}. Known are {', '.join(ROLES)}."
        )
    calls = item.get("tool_calls") or (item.get("function_call") and [item["function_call"]])
    if role == "function_call":
        role, content, calls = "assistant", "", _calls(i, content)
    if isinstance(content, list) and role != "tool":  # parts
        if any(
            not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content
        ):
            raise ValueError(f"message {i} has a part that is no text. Only text can be learned.")
        content = "".join(part["text"] for part in content)
    kept = (*REASONING, *WEIGHTS)
    out = {"role": role, "content": content}
    out |= {key: item[key] for key in kept if item.get(key) is not None}
    if calls:
        out |= {"content": content or "", "tool_calls": calls}
    if item.get("tools"):
        out["tools"] = item["tools"]
    return out


def _with_json_calls(message: dict) -> dict:
    """Return the message with its calls as JSON: a table's columns have one type."""
    calls = message.get("tool_calls")
    if not calls or isinstance(calls, str):
        return message
    return {**message, "tool_calls": json.dumps(calls, ensure_ascii=False)}


def _calls(i: int, value) -> list:
    calls = _as_json(value)
    if not isinstance(calls, list | dict):
        raise ValueError(
            f"message {i}: the call is not JSON. Give {{'name': ..., 'arguments': {{...}}}}."
        )
    return calls if isinstance(calls, list) else [calls]


def _reasoning(item: dict) -> dict:
    """Return {"reasoning_content"} if there is one; an empty one is an empty think block."""
    found = ({"reasoning_content": item[key]} for key in REASONING if item.get(key) is not None)
    return next(found, {})


def _with_system(messages: list[dict], row: dict) -> list[dict]:
    """Put the row's system prompt and tools on a system message that comes first."""
    system, tools = row.get(_first(row, SYSTEMS)), row.get(_first(row, TOOLS))
    if tools and not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    both = {"content": system, "tools": tools}
    extra = {key: value for key, value in both.items() if value and value != "[]"}
    if not extra:
        return messages
    first, rest = {"role": "system", "content": ""}, messages
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
    for key, value in extra.items():
        if first.get(key) and _as_json(first[key]) != _as_json(value):
            raise ValueError(
                f"the row and its system message differ in their {key}. Keep one of the two."
            )
    return [{**first, **extra}, *rest]


def _string(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is a {type(row[key]).__name__}. Give a string.")
    return row[key]


def _first(row: dict, keys: tuple[str, ...]) -> str | None:
    """Return the first of the keys under which there is something."""
    return next((key for key in keys if row.get(key)), None)


def _as_json(value):
    """Return the JSON list or object that a string (of a table's column) spells, else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def _as_messages(value):
    """Return a list of messages, given so, as one message or as JSON; other values as they are."""
    found = _as_json(value)
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list) and found and all(map(_is_message, found)):
        return found
    return value


def _is_message(item):
    return isinstance(item, dict) and {"role", "from"} & item.keys()


@dataclass
class ConvertReport:
    """Rows by their fate and format, keys left out in how many rows, first skipped rows and why."""

    rows_read: int = 0
    rows_written: int = 0
    rows_skipped: int = 0
    rows_respelled: int = 0  # written, with tool calls, reasoning or weights of other spellings
    formats: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)

    def count(self, format: str, unused: list[str], respelled: bool) -> None:
        """Count a row that was written."""
        self.rows_written += 1
        self.rows_respelled += respelled
        self.formats[format] = self.formats.get(format, 0) + 1
        for key in unused:
            self.left_out[key] = self.left_out.get(key, 0) + 1

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        written = f"{self.rows_written:,} written ({formats})"
        lines = [f"rows: {self.rows_read:,} read, {written}, {self.rows_skipped:,} skipped"]
        if self.rows_respelled:
            lines.append(f"{OTHER_SPELLING}: {self.rows_respelled:,} rows")
        if self.left_out:
            keys = (f"{key} ({count:,} rows)" for key, count in self.left_out.items())
            lines.append(f"left out: {', '.join(keys)}")
        return "\n".join([*lines, *self.named])


def convert(
    paths: list[str], out: str, format: str = "auto", split: str = "", bad_rows: str = "stop"
) -> ConvertReport:
    """Convert files into one .jsonl and return the report. split: one of SPLITS, for .txt files; ""
    is the first of them.

    ValueError "file:line: what is wrong. fix" at the first row that fits no format, unless bad_rows
    is "skip".
    """
    check_outputs(paths, {"--out": out})
    if split and not any(Path(path).suffix.lower() == ".txt" for path in paths):
        raise ValueError(f"--split {split}: it is for .txt files, and none is given. Leave it out.")
    report = ConvertReport()
    with whole_file(out) as file:
        for path in paths:
            for line_no, row in read_any(path, split or SPLITS[0]):
                report.rows_read += 1
                try:
                    row = parse_row(row) if isinstance(row, str) else row
                    kind = detect(row) if format == "auto" else format
                    notes, unused = set(), unused_keys(row, kind)
                    line = dump_row(convert_row(row, kind, notes))
                except ValueError as error:
                    if bad_rows == "stop":
                        raise ValueError(f"{path}:{line_no}: {error}") from error
                    report.rows_skipped += 1
                    if len(report.named) < NAMED:
                        report.named.append(f"skipped {path}:{line_no}: {error}")
                    continue
                file.write(line)
                report.count(kind, unused, bool(notes))
        if not report.rows_written:
            raise ValueError(f"{', '.join(map(str, paths))}: no row could be converted.\n{report}")
    return report
