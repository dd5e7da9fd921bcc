"""Tool calls and reasoning that public data spells inside texts -> the fields of our messages.

    reasoning     <think>...</think> (or thinking, thought, reasoning, and the tags of OpenThoughts
                  and Kimi): after white space, in several blocks, or with the closing tag alone;
                  `reasoning` or `thinking` as fields; <answer> around the answer
    tool calls    <tool_call>JSON</tool_call> (Hermes, Qwen), also as a Python literal or a list;
                  <functioncall> (glaive); "Action:" and "Action Input:" lines (ReAct)
    tool results  <tool_response>...</tool_response> in a message of the user or of a tool;
                  "Observation:" lines; objects instead of texts
    tools         <tools>...</tools> in a system prompt
    not trained   "weight": 0, "train": false, "loss": false or "mask": true on an answer

A call in a message of its own joins the answer before it: the chat template writes both in one
turn, and so must the model. Messages in our own form stay as they are.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning")),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
BLOCK = "|".join(f"{re.escape(begin)}(?:.*?){re.escape(end)}" for begin, end in TAGS)
FIRST_BLOCK = re.compile(rf"\s*({BLOCK})", re.DOTALL)
LATER_BLOCK = re.compile(rf"^({BLOCK})\s*", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(
    r"\s*(?:<answer>|<\|begin_of_solution\|>)\s*(.*?)\s*(?:</answer>|<\|end_of_solution\|>)\s*",
    re.DOTALL,
)
CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>|\s*<functioncall>\s*(\{.*\})", re.DOTALL)
GLAIVE = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
# around the list in the system prompts of Qwen and Hermes: our template has such words of its own
HEADING = re.compile(r"(?:^|\n)# Tools\n.*|[^\n.]*tools:\s*$", re.DOTALL)
INSTRUCTIONS = re.compile(r"\s*(?:Use the following|For each function call|To call a).*", re.DOTALL)
STEP = re.compile(r"^(Thought|Action Input|Action|Observation|Final Answer):[ \t]*", re.MULTILINE)
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
    role, content = message.get("role"), message.get("content")
    if role == "tool" and content is not None and not isinstance(content, str):
        message = {**message, "content": json.dumps(content, ensure_ascii=False)}
        content = message["content"]
    message = read_weight(message)
    if not isinstance(content, str):
        return [read_reasoning(message)] if role == "assistant" else [message]
    if role in ("user", "tool") and (results := RESULT.findall(content)):
        if not RESULT.sub("", content):
            return [{**message, "role": "tool", "content": result} for result in results]
    if role == "system":
        return [read_tools(message)]
    if role != "assistant":
        return [message]
    steps = STEP.findall(content)
    if "Action Input" in steps or {"Thought", "Final Answer"} <= set(steps):
        return read_react(message)
    return [read_calls(read_reasoning(message))]


def add_message(messages: list[Message], new: Message) -> None:
    """Append a message; a call without a text goes to the assistant's message before it."""
    last = messages[-1] if messages else {}
    turn = next((one for one in reversed(messages) if one.get("role") != "tool"), {})
    if new.get("role") == "user" and turn.get("tool_calls"):
        if observed := OBSERVATION.fullmatch(str(new.get("content"))):
            new = {**new, "role": "tool", "content": observed[1]}
    joins = last.get("role") == new.get("role") == "assistant" and new.get("tool_calls")
    if not joins or new.get("content") or new.get("train") != last.get("train"):
        messages.append(new)
        return
    calls = [*_as_list(last.get("tool_calls")), *_as_list(new["tool_calls"])]
    both = [one["reasoning_content"] for one in (last, new) if one.get("reasoning_content")]
    reasoning = {"reasoning_content": "\n\n".join(both)} if both else {}
    messages[-1] = {**last, **reasoning, "tool_calls": calls}


def _as_list(calls: Any) -> list:
    calls = json.loads(calls) if isinstance(calls, str) and calls.strip() else calls
    return calls if isinstance(calls, list) else [calls] if calls else []


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
        if given and (answer := ANSWER.fullmatch(content)):
            content = answer[1]
        message["content"] = content
    return {**message, "reasoning_content": given[0]} if given else message


def split_reasoning(content: str) -> tuple[str | None, str]:
    """(reasoning, answer) of an assistant's text; (None, text) if there is no reasoning."""
    blocks, rest = [], content
    while match := FIRST_BLOCK.match(rest):
        blocks.append(_inside(match[1]))
        rest = rest[match.end() :]
    if not blocks:
        for begin, end in TAGS:
            head, _, tail = content.partition(end)
            is_line = head.endswith("\n") or tail.startswith("\n")  # not a word about the tag
            if is_line and begin not in head and tail.strip():
                return head, tail.lstrip("\n")
        return None, content
    later = [_inside(match[1]) for match in LATER_BLOCK.finditer(rest)]
    if later:
        blocks, rest = [*blocks, *later], LATER_BLOCK.sub("", rest)
    if len(blocks) > 1:
        blocks = ["\n\n".join(block.strip("\n") for block in blocks)]
    return blocks[0], rest.lstrip("\n")


def _inside(block: str) -> str:
    return next(block[len(begin) : -len(end)] for begin, end in TAGS if block.startswith(begin))


def read_calls(message: Message) -> Message:
    """An assistant's message with the calls of its text in `tool_calls`; a text that only looks
    like a call stays.
    """
    content = message.get("content") or ""
    matches = [] if message.get("tool_calls") else list(CALL.finditer(content))
    calls = [call for match in matches for call in parse_calls(match[1] or match[2])]
    if not calls or any(not parse_calls(match[1] or match[2]) for match in matches):
        return message
    text, after = content[: matches[0].start()], CALL.sub("", content[matches[0].start() :])
    if after.strip():
        raise ValueError(
            f"the text {after.strip()[:40]!r} stands behind a tool call. Put it before the call, "
            "or in a message of its own."
        )
    return {**message, "content": text, "tool_calls": calls}


def parse_calls(text: str) -> list[dict]:
    """The calls that a JSON text or a Python literal holds; [] if it holds none."""
    if match := GLAIVE.fullmatch(text):  # arguments as JSON in single quotes, which is neither
        return [{"name": match[1], "arguments": match[2].replace("\\'", "'")}]
    value = parse_value(text)
    calls = value if isinstance(value, list) else [value]
    calls = [call.get("function", call) if isinstance(call, dict) else {} for call in calls]
    is_call = all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    if not is_call:
        return []
    names = ("arguments", "parameters")
    return [
        {
            "name": call["name"],
            "arguments": next((call[name] for name in names if call.get(name) is not None), {}),
        }
        for call in calls
    ]


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
    value = match and parse_value(match[1])
    tools = value if isinstance(value, list) else [value]
    if match and value is None:  # one on each line
        tools = [parse_value(line) for line in match[1].splitlines() if line.strip()]
    if not all(isinstance(tool, dict) for tool in tools):
        return message
    if message.get("tools") and _names(_as_list(message["tools"])) != _names(tools):
        return message
    before = HEADING.sub("", message["content"][: match.start()]).strip()
    after = INSTRUCTIONS.sub("", message["content"][match.end() :]).strip()
    content = "\n\n".join(part for part in (before, after) if part)
    return {"tools": json.dumps(tools, ensure_ascii=False), **message, "content": content}


def _names(tools: list) -> list:
    return [tool.get("function", tool).get("name") for tool in tools if isinstance(tool, dict)]


def read_react(message: Message) -> list[Message]:
    """The turns of a ReAct trace (Yao et al. 2022): thought, action, observation, answer."""
    first, *parts = STEP.split(message["content"])
    thoughts, name, messages = [first.strip()] if first.strip() else [], "", []

    def turn(**fields) -> Message:
        reasoning = "\n".join(thoughts)
        thoughts.clear()
        extra = {"reasoning_content": reasoning} if reasoning else {}
        return {**message, **extra, "content": "", **fields}

    for label, text in zip(parts[::2], map(str.strip, parts[1::2])):
        if label == "Thought":
            thoughts.append(text)
        elif label == "Action":
            name = text
        elif label == "Action Input":
            arguments = parse_value(text)
            if not name or not isinstance(arguments, dict):
                raise ValueError(
                    f"Action Input {text[:40]!r} is no JSON object below an Action. Give "
                    'Action: name, then Action Input: {"key": value}.'
                )
            messages.append(turn(tool_calls=[{"name": name, "arguments": arguments}]))
        elif label == "Observation" and text:
            messages.append({"role": "tool", "content": text})
        elif label == "Final Answer":
            messages.append(turn(content=text))
    if thoughts:
        messages.append({**message, "content": "\n".join(thoughts)})
    return messages
