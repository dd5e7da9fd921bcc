"""Rows in other people's formats -> rows in ours (dataset.md), checked.

    alpaca      {"instruction", "input", "output"}, maybe "system" and "history" [[user, assistant], ...]; or a prompt
                and a response under one of their usual names
    sharegpt    {"conversations": [{"from": "human", "value": ...}, ...]}, with function_call, observation, tools, system
    messages    {"messages" or "conversations": [{"role", "content", ...}]}, with tool_calls and tools, as OpenAI has it
    preference  {"prompt", "chosen", "rejected"}: answers as strings or messages; or the answers beside "conversations"
    text        {"text"} or {"content"}

From .jsonl (.gz, .xz), .json (one list), .parquet, .csv, .tsv and .txt. A row's format is seen from its keys.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.chat_format import check_conversation
from dataset.jsonl import read_rows
from dataset.whole_file import whole_file

PROMPTS = ("instruction", "prompt", "question", "query", "input")
RESPONSES = ("output", "response", "answer", "completion", "target")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "bot": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool",
         "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
         "function_call": "function_call", "tool_call": "function_call"}
VERIFIED = ("answer", "gt")  # what reinforcement learning checks: stays beside a conversation
SPLITS = ("paragraphs", "file", "lines")
NAMED = 5


def convert_row(row: dict, format: str = "auto") -> dict:
    """Return the row in our format; ValueError says why it cannot be."""
    if format == "auto":
        format = detect(row)
    converted = FORMATS[format](row)
    for key, messages in converted.items():
        if key != "text":
            check_conversation(messages)
    if "conversations" in converted:
        if format != "alpaca":  # where "answer" is the response
            converted |= {key: row[key] for key in VERIFIED if key in row}
        if len(converted) == 1 and not any(message["role"] == "assistant" for message in converted["conversations"]):
            raise ValueError("no message of the assistant, so there is nothing to learn. Add the answer.")
    return converted


def detect(row: dict) -> str:
    """Return the name of the format that a row's keys speak for; ValueError if there is none."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    conversation = _as_json(row.get("conversations") or row.get("messages"))
    if isinstance(conversation, list) and conversation and isinstance(conversation[0], dict):
        return "sharegpt" if "from" in conversation[0] else "messages"
    if _first(row, PROMPTS) is not None and _first(row, RESPONSES) is not None:
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
    """Instruction, input and output -> a conversation; the input stands below the instruction."""
    prompt_key = next((key for key in PROMPTS if row.get(key)), None)
    if prompt_key is None:
        raise ValueError(f"no prompt. Give it under one of {', '.join(PROMPTS)}.")
    prompt = _string(row, prompt_key)
    if prompt_key == "instruction" and row.get("input"):
        prompt = f"{prompt}\n{_string(row, 'input')}"
    answer_key = next((key for key in RESPONSES if row.get(key)), None)
    if answer_key is None or not _string(row, answer_key).strip():
        raise ValueError(f"no answer, or an empty one. Give it under one of {', '.join(RESPONSES)}.")
    messages = []
    for turn in _as_json(row.get("history")) or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError("history: a turn is no pair. Give [[user, assistant], ...].")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": _string(row, answer_key)}]
    return {"conversations": _with_system(messages, row)}


def from_sharegpt(row: dict) -> dict:
    """Messages with "from" and "value" -> a conversation."""
    return {"conversations": _with_system([_from_turn(i, turn) for i, turn in enumerate(_messages_of(row))], row)}


def from_messages(row: dict) -> dict:
    """OpenAI's messages -> a conversation."""
    return {"conversations": _with_system([_from_message(i, item) for i, item in enumerate(_messages_of(row))], row)}


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
        answer = [_any_message(i, message) for i, message in enumerate(answer)]
        whole = any(message["role"] == "user" for message in answer)
        if not whole and not prompt:
            raise ValueError(f"{side} holds only the answer, and there is no prompt. Give one under 'prompt'.")
        both[side] = _with_system(answer if whole else [*prompt, *answer], row)
        if both[side][-1]["role"] != "assistant" or not both[side][-1]["content"]:
            raise ValueError(f"{side} does not end with an answer of the assistant. Add it.")
    if both["chosen"][0] != both["rejected"][0]:
        raise ValueError("chosen and rejected begin differently. Give both the same prompt.")
    return both


FORMATS = {"alpaca": from_alpaca, "sharegpt": from_sharegpt, "messages": from_messages, "preference": from_preference,
           "text": from_text}


def _prompt_of(row: dict) -> list[dict]:
    prompt = _as_messages(row.get("conversations") or row.get("messages") or _first(row, PROMPTS))
    if isinstance(prompt, list):
        return [_any_message(i, message) for i, message in enumerate(prompt)]
    if row.get("instruction") and row.get("input"):
        prompt = f"{prompt}\n{_string(row, 'input')}"
    return [{"role": "user", "content": prompt}] if prompt else []


def _any_message(i: int, message) -> dict:
    return _from_turn(i, message) if isinstance(message, dict) and "from" in message else _from_message(i, message)


def _from_turn(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"message {i} is a {type(turn).__name__}. Give {{'from': ..., 'value': ...}}.")
    role, value = _role(i, turn.get("from")), turn.get("value")
    if role == "function_call":
        calls = _as_json(value)
        if not isinstance(calls, list | dict):
            raise ValueError(f"message {i}: the call is not JSON. Give {{'name': ..., 'arguments': {{...}}}}.")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": json.dumps(calls, ensure_ascii=False)}
    return {"role": role, "content": value}


def _from_message(i: int, message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} is a {type(message).__name__}. Give {{'role': ..., 'content': ...}}.")
    content = message.get("content")
    if isinstance(content, list):  # parts; only text can be learned here
        if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"message {i} has a part that is no text. Only text can be learned.")
        content = "".join(part["text"] for part in content)
    out = {"role": _role(i, message.get("role")), "content": content}
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    if calls:
        calls = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)
        out |= {"content": content or "", "tool_calls": calls}
    if message.get("tools"):
        out["tools"] = message["tools"]
    if isinstance(message.get("reasoning_content"), str):
        out["reasoning_content"] = message["reasoning_content"]
    return out


def _role(i: int, role) -> str:
    if role not in ROLES:
        raise ValueError(f"message {i} has the unknown role {role!r}. Known are {', '.join(ROLES)}.")
    return ROLES[role]


def _with_system(messages: list[dict], row: dict) -> list[dict]:
    """Put the row's "system" and "tools" on a system message that comes first."""
    system, tools = row.get("system"), row.get("tools")
    tools = None if tools in ("", "[]", [], None) else tools
    if (system or tools) and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system or ""}, *messages]
    if tools:
        text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        messages = [{**messages[0], "tools": text}, *messages[1:]]
    return messages


def _messages_of(row: dict) -> list:
    messages = _as_json(row.get("conversations") or row.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages. Give a list under 'conversations' or 'messages'.")
    return messages


def _string(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is a {type(row[key]).__name__}. Give a string.")
    return row[key]


def _first(row: dict, keys: tuple[str, ...]):
    return next((row[key] for key in keys if row.get(key) is not None), None)


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


def read_any(path: str | Path, split: str = "paragraphs") -> Iterator[tuple[int, dict]]:
    """Yield (line number; in .json and .parquet: row number, from 1; row) of a file of any kind that the module lists."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Check the path.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return read_rows(path)
    return reader(path, split)


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
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, ValueError) as error:  # what pyarrow raises
        raise ValueError(f"{path}: damaged Parquet file ({error}). Fetch it again.") from error


def _read_table(path: Path, split: str):
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in table:
                yield table.line_num, {key: value for key, value in row.items() if key is not None and value is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{table.line_num + 1}: no row of a table in UTF-8 ({error}). Repair it.") from error


def _read_text(path: Path, split: str):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    if split == "file":
        yield 1, {"text": text}
        return
    lines, first = [], 1
    for line_no, line in enumerate([*text.split("\n"), ""], start=1):
        if lines and (split == "lines" or not line.strip()):
            yield first, {"text": "\n".join(lines)}
            lines = []
        if line.strip():
            first = first if lines else line_no
            lines.append(line)


READERS = {".json": _read_json, ".parquet": _read_parquet, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_text}


@dataclass
class ConvertReport:
    """Rows read, written and skipped, the formats they were in, and the first skipped rows with the reason."""

    rows_read: int = 0
    rows_written: int = 0
    rows_skipped: int = 0
    formats: dict[str, int] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        text = f"rows: {self.rows_read:,} read, {self.rows_written:,} written ({formats}), {self.rows_skipped:,} skipped"
        return "\n".join([text, *self.named])


def convert(paths: list[str], out: str, format: str = "auto", split: str = "paragraphs", bad_rows: str = "stop") -> ConvertReport:
    """Convert files into one .jsonl and return the report.

    ValueError "file:line: what is wrong. way out" at the first row that fits nothing, unless bad_rows is "skip".
    """
    report = ConvertReport()
    with whole_file(out) as file:
        for path in paths:
            for line_no, row in read_any(path, split):
                report.rows_read += 1
                try:
                    kind = detect(row) if format == "auto" else format
                    converted = convert_row(row, kind)
                except ValueError as error:
                    if bad_rows == "stop":
                        raise ValueError(f"{path}:{line_no}: {error}") from error
                    report.rows_skipped += 1
                    report.named += [f"skipped {path}:{line_no}: {error}"] if len(report.named) < NAMED else []
                    continue
                file.write(json.dumps(converted, ensure_ascii=False) + "\n")
                report.rows_written += 1
                report.formats[kind] += 1
        if not report.rows_written:
            raise ValueError(f"{', '.join(map(str, paths))}: no row could be converted.\n{report}")
    return report
