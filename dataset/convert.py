"""Rows in other people's formats -> rows in ours (dataset.md), checked.

    alpaca      {"instruction", "input", "output"}, maybe "system", "reasoning_content" and "history" [[user, assistant],
                ...]; or a prompt, a "context" and a response under one of their usual names
    sharegpt    {"conversations": [{"from": "human", "value": ...}, ...]}, with function_call, observation, tools, system
    messages    {"messages" or "conversations": [{"role", "content", ...}]}, with tool_calls and tools, as OpenAI has it
    preference  {"prompt", "chosen", "rejected"}: answers as strings or messages; or the answers beside "conversations"
    text        {"text"} or {"content"}

From .jsonl (.gz, .xz), .json (one list), .parquet, .csv, .tsv and .txt. A row's format is seen from its keys.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path

from dataset.chat_format import check_conversation
from dataset.cleaning import VERIFIED
from dataset.jsonl import dump_row, iter_lines, parse_row
from dataset.outputs import check_outputs, whole_file

PROMPTS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("input", "context")  # what a prompt is about: stands below it
RESPONSES = ("output", "response", "answer", "completion", "target")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")
MESSAGES = ("conversations", "messages")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "bot": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool",
         "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
         "function_call": "function_call", "tool_call": "function_call"}
SPLITS = ("paragraphs", "file", "lines")
NAMED = 5


def convert_row(row: dict, format: str = "auto") -> dict:
    """Return the row in our format; ValueError says why it cannot be."""
    if None in row:  # where csv puts what has no column
        raise ValueError("more fields than the table's first line. Put quotes around fields that hold the separator.")
    if format == "auto":
        format = detect(row)
    if format != "text" and (media := _first(row, MEDIA)):
        raise ValueError(f"{media} cannot be learned, only text. Leave the row out.")
    converted = FORMATS[format](row)
    for key, messages in converted.items():
        if key != "text":
            check_conversation(messages)
    if "conversations" in converted:
        if format != "alpaca":  # where "answer" is the response
            converted |= {key: row[key] for key in VERIFIED if row.get(key) is not None}
        if len(converted) == 1 and not any(message["role"] == "assistant" for message in converted["conversations"]):
            raise ValueError("no message of the assistant, so there is nothing to learn. Add the answer.")
    return converted


def unused_keys(row: dict, format: str) -> list[str]:
    """Return the keys with a value that a row's conversion leaves out."""
    beside = {*SYSTEMS, *TOOLS, _first(row, MESSAGES)}
    prompt = {_first(row, PROMPTS), *CONTEXTS, "history"}
    used = {"text": {"text" if "text" in row else "content"}, "sharegpt": {*beside, *VERIFIED}, "messages": {*beside, *VERIFIED},
            "alpaca": {*beside, *prompt, *REASONING, _first(row, RESPONSES)},
            "preference": {*beside, *prompt, "chosen", "rejected"}}
    return [key for key, value in row.items() if value not in (None, "", [], {}) and key not in used[format]]


def detect(row: dict) -> str:
    """Return the name of the format that a row's keys speak for; ValueError if there is none."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    conversation = _as_json(row.get(_first(row, MESSAGES)))
    if isinstance(conversation, list) and conversation and isinstance(conversation[0], dict):
        return "sharegpt" if "from" in conversation[0] else "messages"
    if any(row.get(key) is not None for key in PROMPTS) and any(row.get(key) is not None for key in RESPONSES):
        return "alpaca"
    if isinstance(row.get("text", row.get("content")), str):
        return "text"
    raise ValueError(f"the keys {', '.join(map(str, row)) or '(none)'} fit no format. Rename them, or see dataset/convert.py for "
                     "the formats and give --format.")


def from_text(row: dict) -> dict:
    """{"text"} or {"content"} -> {"text"}."""
    text = row.get("text", row.get("content"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text. Give a string that is not blank under 'text'.")
    return {"text": text}


def from_alpaca(row: dict) -> dict:
    """A prompt, maybe with an input, and a response -> a conversation; the input stands below the prompt."""
    prompt, answer_key = _prompt_of(row), _first(row, RESPONSES)
    if not prompt:
        raise ValueError(f"no prompt. Give it under one of {', '.join(PROMPTS)}.")
    if answer_key is None or not _string(row, answer_key).strip():
        raise ValueError(f"no answer, or an empty one. Give it under one of {', '.join(RESPONSES)}.")
    answer = {"role": "assistant", "content": _string(row, answer_key), **_reasoning(row)}
    return {"conversations": _with_system([*prompt, answer], row)}


def from_messages(row: dict) -> dict:
    """Messages with "role" and "content", or with "from" and "value" -> a conversation."""
    messages = _as_json(row.get(_first(row, MESSAGES)))
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages. Give a list under 'conversations' or 'messages'.")
    return {"conversations": _with_system([_message(i, item) for i, item in enumerate(messages)], row)}


def from_preference(row: dict) -> dict:
    """A prompt with a chosen and a rejected answer, or two whole conversations -> {"chosen", "rejected"}."""
    prompt = _prompt_of(row)
    both = {}
    for side in ("chosen", "rejected"):
        answer = _as_messages(row[side])
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list) or not answer:
            raise ValueError(f"{side} is {type(row[side]).__name__}, or empty. Give a string or messages.")
        answer = [_message(i, item) for i, item in enumerate(answer)]
        whole = any(message["role"] == "user" for message in answer)
        if not whole and not prompt:
            raise ValueError(f"{side} holds only the answer, and there is no prompt. Give one under 'prompt'.")
        both[side] = _with_system(answer if whole else [*prompt, *answer], row)
        if both[side][-1]["role"] != "assistant" or not both[side][-1]["content"]:
            raise ValueError(f"{side} does not end with an answer of the assistant. Add it.")
    chosen, rejected = ([*takewhile(lambda message: message["role"] != "assistant", side)] for side in both.values())
    if chosen != rejected:
        raise ValueError("chosen and rejected begin differently. Give both the same prompt.")
    return both


FORMATS = {"alpaca": from_alpaca, "sharegpt": from_messages, "messages": from_messages, "preference": from_preference,
           "text": from_text}


def _prompt_of(row: dict) -> list[dict]:
    """Return the messages before the answer: given as messages, or as text with what it is about and a history."""
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
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    parts = [_string(row, name) for name in dict.fromkeys((key, *CONTEXTS)) if row.get(name)]
    return [*messages, {"role": "user", "content": "\n".join(parts)}]


def _message(i: int, item) -> dict:
    if not isinstance(item, dict):
        raise ValueError(f"message {i} is a {type(item).__name__}. Give {{'role': ..., 'content': ...}}.")
    given, content = item.get("from", item.get("role")), item.get("value", item.get("content"))
    role = ROLES.get(str(given).lower())
    if role is None:
        raise ValueError(f"message {i} has the unknown role {given!r}. Known are {', '.join(ROLES)}.")
    calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else None)
    if role == "function_call":
        role, content, calls = "assistant", "", _calls(i, content)
    if isinstance(content, list):  # parts
        if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"message {i} has a part that is no text. Only text can be learned.")
        content = "".join(part["text"] for part in content)
    out = {"role": role, "content": content, **_reasoning(item)}
    if calls:
        calls = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)
        out |= {"content": content or "", "tool_calls": calls}
    if item.get("tools"):
        out["tools"] = item["tools"]
    return out


def _calls(i: int, value) -> list:
    calls = _as_json(value)
    if not isinstance(calls, list | dict):
        raise ValueError(f"message {i}: the call is not JSON. Give {{'name': ..., 'arguments': {{...}}}}.")
    return calls if isinstance(calls, list) else [calls]


def _reasoning(item: dict) -> dict:
    """Return {"reasoning_content"} if a message or a row has one; an empty one counts: it is an empty think block."""
    return next(({"reasoning_content": item[key]} for key in REASONING if item.get(key) is not None), {})


def _with_system(messages: list[dict], row: dict) -> list[dict]:
    """Put the row's system prompt and tools on a system message that comes first."""
    system, tools = row.get(_first(row, SYSTEMS)), row.get(_first(row, TOOLS))
    if tools and not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    extra = {key: value for key, value in (("content", system), ("tools", tools)) if value and value != "[]"}
    if not extra:
        return messages
    first, rest = {"role": "system", "content": ""}, messages
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
    for key, value in extra.items():
        if first.get(key) and _as_json(first[key]) != _as_json(value):
            raise ValueError(f"the row and its system message differ in their {key}. Keep one of the two.")
    return [{**first, **extra}, *rest]


def _string(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is a {type(row[key]).__name__}. Give a string.")
    return row[key]


def _first(row: dict, keys: tuple[str, ...]) -> str | None:
    """Return the first of the keys under which there is something."""
    return next((key for key in keys if row.get(key)), None)


def _as_json(value):
    """Return what a string spells if it is a JSON list or object (a column of a table), else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def _as_messages(value):
    """Return messages, one or several, as they are or as JSON, in a list; any other value as it is."""
    found = _as_json(value)
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list) and found and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in found):
        return found
    return value


def read_any(path: str | Path, split: str = "paragraphs") -> Iterator[tuple[int, dict | str]]:
    """Yield (line number; in .json and .parquet: row number, from 1; row) of a file of any kind that the module lists.

    A row of .jsonl is the line as it stands, for `parse_row`, so that a broken one can be passed over.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Check the path.")
    reader = READERS.get(path.suffix.lower())
    return reader(path, split) if reader else iter_lines(path)


def _read_json(path: Path, split: str):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error}). If it has an object on each line, name it .jsonl.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no list of objects. Give [{{...}}, {{...}}].")
    return enumerate(rows, start=1)


def _read_parquet(path: Path, split: str):
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading .parquet needs pyarrow. Install it: pip install -r requirements.txt") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from enumerate((_without_nulls(row) for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, ValueError) as error:  # what pyarrow raises
        raise ValueError(f"{path}: damaged Parquet file ({error}). Fetch it again.") from error


def _without_nulls(value):
    """Return a value without the null fields of its structs: Parquet gives every struct the fields of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_table(path: Path, split: str):
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in _utf8_lines(path))
    table = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    line_no = 0
    try:
        for row in table:
            yield table.line_num, {key: value for key, value in row.items() if value is not None}
            line_no = table.line_num
    except csv.Error as error:
        raise ValueError(f"{path}:{line_no + 1}: no row of a table ({error}). Repair its quotes.") from error


def _read_text(path: Path, split: str):
    if split == "file":
        yield 1, {"text": "".join(line for _, line in _utf8_lines(path)).replace("\r\n", "\n")}
        return
    lines, first = [], 1
    for line_no, line in chain(_utf8_lines(path), [(0, "")]):
        line = line.rstrip("\r\n")
        if lines and (split == "lines" or not line.strip()):
            yield first, {"text": "\n".join(lines)}
            lines = []
        if line.strip():
            first = first if lines else line_no
            lines.append(line)


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end); ValueError names the line that is not UTF-8."""
    with open(path, "rb") as file:
        for line_no, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if line_no == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{line_no}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
            yield line_no, line


READERS = {".json": _read_json, ".parquet": _read_parquet, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_text}


@dataclass
class ConvertReport:
    """Rows read, written and skipped, the formats they were in, the keys that were left out (and in how many rows), and
    the first skipped rows with the reason."""

    rows_read: int = 0
    rows_written: int = 0
    rows_skipped: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)

    def count(self, format: str, unused: list[str]) -> None:
        """Count a row that was written."""
        self.rows_written += 1
        self.formats[format] = self.formats.get(format, 0) + 1
        for key in unused:
            self.left_out[key] = self.left_out.get(key, 0) + 1

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        lines = [f"rows: {self.rows_read:,} read, {self.rows_written:,} written ({formats}), {self.rows_skipped:,} skipped"]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{key} ({count:,} rows)" for key, count in self.left_out.items()))
        return "\n".join([*lines, *self.named])


def convert(paths: list[str], out: str, format: str = "auto", split: str = "", bad_rows: str = "stop") -> ConvertReport:
    """Convert files into one .jsonl and return the report. split: one of SPLITS, for .txt files; "" is the first of them.

    ValueError "file:line: what is wrong. way out" at the first row that fits nothing, unless bad_rows is "skip".
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
                    line, unused = dump_row(convert_row(row, kind)), unused_keys(row, kind)
                except ValueError as error:
                    if bad_rows == "stop":
                        raise ValueError(f"{path}:{line_no}: {error}") from error
                    report.rows_skipped += 1
                    report.named += [f"skipped {path}:{line_no}: {error}"] if len(report.named) < NAMED else []
                    continue
                file.write(line)
                report.count(kind, unused)
        if not report.rows_written:
            raise ValueError(f"{', '.join(map(str, paths))}: no row could be converted.\n{report}")
    return report
