"""Tool calls and reasoning that public data spells inside texts -> the fields of our messages.

    reasoning     <think>...</think> (or thinking, thought, reasoning, and the tags of OpenThoughts
                  and Kimi) at the beginning, in several blocks, or </think> alone; `reasoning` or
                  `thinking` as fields; next to reasoning, <answer> around the answer
    tool calls    <tool_call>JSON</tool_call> (Hermes, Qwen) at the end, also as a Python literal or
                  a list; <functioncall> (glaive); "Action:" and "Action Input:" lines (ReAct)
    tool results  <tool_response>...</tool_response> in a message of the user or of a tool;
                  "Observation:" lines; objects instead of texts
    JSON          results of tools, and arguments that are texts: spaces as our template has them
    tools         <tools>...</tools> in a system prompt
    not trained   "weight": 0, "train": false, "loss": false or "mask": true on an answer

A call in a message of its own joins the answer before it: the chat template writes both in one
turn, and so must the model. A text is read as a whole or left as it is: tags in code, in prose, or
around what is no call stay text. Messages in our own form stay as they are.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from dataset.chat.format import canonical_json
from dataset.chat.reply import read_call

REASONING = ("reasoning_content", "reasoning", "thinking")
SPECIAL_TAGS = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
XML_TAGS = tuple((f"<{name}>", f"</{name}>") for name in ("thinking", "thought", "reasoning"))
ANSWERS = (("<answer>", "</answer>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))
# none may hold its own opening tag: else many that are never closed would take quadratic time
CALL = re.compile(
    r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>"
    r"|<functioncall>\s*(\{(?:(?!<functioncall>).)*\})",
    re.DOTALL,
)
BETWEEN_CALLS = re.compile(r"\s*(?:<\|endoftext\|>)?\s*")
GLAIVE = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
RESULT = re.compile(r"<tool_response>\n?((?:(?!<tool_response>).)*?)\n?</tool_response>", re.DOTALL)
TOOLS = re.compile(r"<tools>\s*([\[{](?:(?!<tools>).)*?)</tools>", re.DOTALL)
# what Qwen, Hermes and our template write around the list of tools
BEFORE_TOOLS = re.compile(
    r"(?:# Tools\s+You may call one or more functions to assist with the user query\.\s+You are "
    r"provided with function signatures within <tools></tools> XML tags:|# Tools\s+You may call "
    r"these functions, one JSON signature per line:|Here are the available tools:)\s*\Z"
)
AFTER_TOOLS = re.compile(
    r"\s*(?:Use the following pydantic model json schema for each tool call you will make:[^\n]*?"
    r"\}\s*)?(?:For each function call,? return a json object with function name and arguments "
    r"within <tool_call></tool_call> XML tags(?: as follows)?:|To call a function, write its name "
    r"and arguments as JSON:)\s*<tool_call>\s*\{[^\n]*\}\s*</tool_call>\s*"
)
STEP = re.compile(r"^(Thought|Action Input|Action|Observation|Final Answer):[ \t]*", re.MULTILINE)
# T thought, A action, I its input, O observation, F final answer
TRACE = re.compile(r"(?:T?AI(?:O|\Z))*T?F|(?:T?AI(?:O|\Z))+")
OBSERVATION = re.compile(r"Observation:\s*(.*)", re.DOTALL)
WEIGHTS = ("weight", "train", "loss", "mask")

Message = dict[str, Any]


def read_messages(messages: Any) -> Any:
    """Messages with these spellings read; ValueError "message i: what is wrong. fix".

    Of anything but a list of objects nothing is read: `check_conversation` names the fault.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        return messages
    found: list[Message] = []
    for i, message in enumerate(messages):
        try:
            for one in read_message(message):
                add_message(found, one)
        except ValueError as error:
            raise ValueError(f"message {i}: {error}") from error
    return found


def read_message(message: Message) -> list[Message]:
    """The messages that one message spells: several for a whole ReAct trace, or for results."""
    message, role = read_weight(message), message.get("role")
    if role == "tool":
        message = {**message, "content": canonical_json(as_text(message.get("content")))}
    content = message.get("content")
    if role == "assistant":
        message = read_reasoning(message)
        return read_react(message) or [with_canonical_calls(read_calls(message))]
    if not isinstance(content, str):
        return [message]
    if role == "system" and "<tools>" in content:
        return [read_tools(message)]
    if role in ("user", "tool") and "<tool_response>" in content:
        results = RESULT.findall(content)
        if results and not RESULT.sub("", content).strip():
            contents = map(canonical_json, results)
            return [{**message, "role": "tool", "content": content} for content in contents]
    return [message]


def as_text(value: Any) -> Any:
    """A tool's result as text: parts of text joined, other objects as JSON."""
    if isinstance(value, str | None):
        return value
    is_parts = isinstance(value, list) and all(
        isinstance(part, dict) and part.keys() == {"type", "text"} for part in value
    )
    if value and is_parts:
        return "".join(str(part["text"]) for part in value)
    return json.dumps(value, ensure_ascii=False)


def add_message(messages: list[Message], new: Message) -> None:
    """Append a message; a call without a text goes to the assistant's message before it."""
    last, content = messages[-1] if messages else {}, new.get("content")
    if new.get("role") == "user" and last.get("role") == "assistant" and last.get("tool_calls"):
        if observed := OBSERVATION.fullmatch(str(content)):
            new = {**new, "role": "tool", "content": observed[1]}
    has_text = isinstance(content, str) and content.strip()
    joins = last.get("role") == new.get("role") == "assistant" and new.get("tool_calls")
    calls = [_as_list(one.get("tool_calls")) for one in (last, new)]
    reasons_late = new.get("reasoning_content") and last.get("content")
    if not joins or has_text or reasons_late or None in calls or _train(new) != _train(last):
        messages.append(new)
        return
    both = [one["reasoning_content"] for one in (last, new) if one.get("reasoning_content")]
    reasoning = {"reasoning_content": "\n\n".join(both)} if both else {}
    messages[-1] = {**last, **reasoning, "tool_calls": calls[0] + calls[1]}


def _train(message: Message) -> bool:
    return message.get("train", True)


def _as_list(value: Any) -> list | None:
    """Calls or tools as a list; None if they are none, which `check_conversation` names."""
    if isinstance(value, str) and value.strip():
        value = parse_value(value)
        return value if isinstance(value, list) else None
    return value if isinstance(value, list) else None if value else []


def read_weight(message: Message) -> Message:
    """The message with "train": False if it says in any spelling that it is not to be learned."""
    given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    if not given:
        return message
    message = {key: value for key, value in message.items() if key not in WEIGHTS}
    for key, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"{key} is {value!r}. Give 0 or 1: an answer is learned or it is not.")
    is_trained = all(bool(value) != (key == "mask") for key, value in given.items())
    if message.get("role") == "assistant":
        return message if is_trained else {**message, "train": False}
    if given.get("train") or given.get("loss"):
        raise ValueError(
            f"{next(iter(given))} on role {message.get('role')}. Only the assistant's words are "
            "learned: leave it out."
        )
    return message


def read_reasoning(message: Message) -> Message:
    """An assistant's message with its reasoning in `reasoning_content`."""
    given = [message[key] for key in REASONING if message.get(key) is not None]
    message = {key: value for key, value in message.items() if key not in REASONING}
    content = message.get("content")
    if isinstance(content, str):
        reasoning, rest = split_reasoning(content)
        if reasoning is not None and (not given or given[0] in ("", reasoning)):
            given, content = [reasoning], rest
        for begin, end in ANSWERS:
            inside = content.strip()
            if given and inside.startswith(begin) and inside.find(end) == len(inside) - len(end):
                content = inside.removeprefix(begin).removesuffix(end).strip()
        message["content"] = content
    return {**message, "reasoning_content": given[0]} if given else message


def split_reasoning(content: str) -> tuple[str | None, str]:
    """(reasoning, answer) of an assistant's text; (None, text) if there is no reasoning."""
    start = content.lstrip()
    for begin, end in (*SPECIAL_TAGS, *XML_TAGS):
        if start.startswith(begin) and end in start:
            blocks, rest = _blocks(start, begin, end)
            is_xml = (begin, end) in XML_TAGS and not rest.strip()
            return (None, content) if is_xml else (blocks, rest.lstrip("\n"))
    for begin, end in SPECIAL_TAGS:
        head, _, tail = content.partition(end)
        is_line = head.endswith("\n") or tail.startswith("\n")  # not a word about the tag
        if is_line and begin[:-1] not in head and tail.strip() and not _in_code(head):
            return head, tail.lstrip("\n")
    return None, content


def _blocks(text: str, begin: str, end: str) -> tuple[str, str]:
    """(the reasoning of the block at the beginning and of all that begin a line, the rest)."""
    blocks, kept = [], ""
    while end in text:
        before, tag, after = text.partition(begin)
        begins_line = before == "" or before.endswith("\n")
        if not tag or not begins_line or end not in after or _in_code(kept + before):
            break
        block, _, text = after.partition(end)
        blocks.append(block)
        kept, text = kept + before, text.lstrip("\n")
    reasoning = blocks[0] if len(blocks) == 1 else "\n\n".join(x.strip("\n") for x in blocks)
    return reasoning, kept + text


def _in_code(before: str) -> bool:
    """Whether a text ends inside a block or a span of code."""
    return before.count("```") % 2 == 1 or before.rpartition("\n")[2].count("`") % 2 == 1


def read_calls(message: Message) -> Message:
    """An assistant's message with the calls at the end of its text in `tool_calls`."""
    content = message.get("content") or ""
    if message.get("tool_calls") or not ("<tool_call>" in content or "<functioncall>" in content):
        return message
    calls, text, end = [], content, None
    for match in CALL.finditer(content):
        found = parse_calls((match[2] if match[1] is None else match[1]).strip())
        if end is None:
            text, end = content[: match.start()], match.start()
        if not found or not BETWEEN_CALLS.fullmatch(content, end, match.start()):
            return message
        calls, end = calls + found, match.end()
    if not calls or not BETWEEN_CALLS.fullmatch(content, end) or _in_code(text):
        return message
    return {**message, "content": text.rstrip(), "tool_calls": calls}


def with_canonical_calls(message: Message) -> Message:
    """An assistant's message whose calls have no arguments that are JSON in another spelling."""
    calls = _as_list(message.get("tool_calls"))
    if not calls or not all(isinstance(call, dict) for call in calls):
        return message
    new = [_canonical_call(call) for call in calls]
    return message if new == calls else {**message, "tool_calls": new}


def _canonical_call(call: dict) -> dict:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _canonical_call(call["function"])}
    if "arguments" not in call:
        return call
    return {**call, "arguments": canonical_json(call["arguments"])}


def parse_calls(text: str) -> list[dict]:
    """The calls that a JSON text or a Python literal holds; [] unless the model could make each."""
    if match := GLAIVE.fullmatch(text):  # arguments as JSON in single quotes, which is neither
        value = {"name": match[1], "arguments": match[2].replace("\\'", "'")}
    else:
        value = parse_value(text)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else {}
        given = [call[key] for key in ("arguments", "parameters") if key in call]
        if not given:
            return []
        try:
            spelled = json.dumps({"name": call.get("name"), "arguments": given[0] or {}})
        except (TypeError, ValueError):  # a set, bytes
            return []
        if not (read := read_call(spelled)):
            return []
        calls.append({"name": read[0], "arguments": json.loads(read[1])})
    return calls


def parse_value(text: str) -> Any:
    """The value of a JSON text or of a Python literal; None for other text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            pass
    return None


def read_tools(message: Message) -> Message:
    """A system message with the list inside <tools> in `tools`."""
    match = TOOLS.search(message["content"])
    value = parse_value(match[1].strip()) if match else None
    tools = value if isinstance(value, list) else [value]
    if match and value is None:  # one on each line
        tools = [parse_value(line) for line in match[1].splitlines() if line.strip()]
    names = _names(tools)
    if not names or not all(names):
        return message
    if message.get("tools") and _names(_as_list(message["tools"]) or []) != names:
        return message
    before = BEFORE_TOOLS.sub("", message["content"][: match.start()]).strip()
    after = message["content"][match.end() :]
    if found := AFTER_TOOLS.match(after):
        after = after[found.end() :]
    content = "\n\n".join(part for part in (before, after.strip()) if part)
    return {"tools": json.dumps(tools, ensure_ascii=False), **message, "content": content}


def _names(tools: list) -> list:
    tools = [tool if isinstance(tool, dict) else {} for tool in tools]
    functions = (tool.get("function", tool) for tool in tools)
    return [one.get("name") if isinstance(one, dict) else None for one in functions]


def read_react(message: Message) -> list[Message]:
    """The turns of a ReAct trace (Yao et al. 2022); [] if the text is no whole trace."""
    content = message.get("content") or ""
    if not isinstance(content, str) or message.get("tool_calls") or "```" in content:
        return []
    first, *parts = STEP.split(content)
    labels, texts = parts[::2], [text.strip() for text in parts[1::2]]
    kinds = "".join({"Action Input": "I"}.get(label, label[0]) for label in labels)
    is_start = first.strip() == "" or "I" in kinds
    if not TRACE.fullmatch(kinds) or kinds == "F" or not is_start:
        return []
    thoughts = [text for text in (message.get("reasoning_content"), first.strip()) if text]
    messages: list[Message] = []

    def add_turn(content: str, **fields: Any) -> None:
        reasoning = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        messages.append({**message, "content": content, **fields, **reasoning})
        thoughts.clear()

    for label, text, following in zip(labels, texts, [*texts[1:], ""]):
        if label == "Thought":
            thoughts.append(text)
        elif label == "Action":
            calls = parse_calls(f'{{"name": {json.dumps(text)}, "arguments": {following}}}')
            if not calls or "\n" in text:
                return []
            add_turn("", tool_calls=calls)
        elif label == "Observation" and text:
            messages.append({"role": "tool", "content": text})
        elif label == "Final Answer":
            add_turn(text)
    return messages
