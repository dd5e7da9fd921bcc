"""Rows in the form of the minimind tutorials' files rlaif*.jsonl and agent_rl*.jsonl."""

import json
from pathlib import Path
from typing import Any

UNUSED = {"reasoning_content": None, "tools": None, "tool_calls": None}  # columns of every message
PLACEHOLDERS = ("无", "", None)  # of the answer, which the model is to write
SCHEMAS = {
    name: {
        "type": "function",
        "function": {
            "name": name,
            "description": "工具",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in arguments.items()},
                "required": list(arguments),
            },
        },
    }
    for name, arguments in {
        "calculate_math": {"expression": "string"},
        "unit_converter": {"value": "number", "from_unit": "string", "to_unit": "string"},
        "get_current_weather": {"location": "string"},
        "get_current_time": {"timezone": "string"},
        "get_exchange_rate": {"from_currency": "string", "to_currency": "string"},
        "translate_text": {"text": "string", "target_language": "string"},
    }.items()
}
QUESTIONS = (  # question, tools on offer, values of the answer
    ("7 乘 8 是多少？", ("calculate_math", "get_current_time"), ["56"]),
    ("How many miles are 10 km?", ("unit_converter", "calculate_math"), [6.2137]),
    (
        "东京天气如何，一美元换多少人民币？",
        ("get_current_weather", "get_exchange_rate"),
        ["12°C", 7.21],
    ),
    ("请把“早上好”译成英文。", ("translate_text",), ["Good morning"]),
)


def answered(messages: list[dict], number: int) -> list[dict]:
    """A conversation with a placeholder at its end and all columns of an Arrow table."""
    last = {"role": "assistant", "content": PLACEHOLDERS[number % len(PLACEHOLDERS)]}
    return [{**UNUSED, **message} for message in [*messages, last]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def write_rlaif(path: Path, count: int = 12) -> Path:
    """Questions with nothing but a placeholder for an answer; every third is a follow-up."""
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"说说数字 {i}。"}]
        if i % 3 == 0:
            said = {"role": "assistant", "content": "好的。"}
            messages += [said, {"role": "user", "content": "再说一点。"}]
        rows.append({"conversations": answered(messages, i)})
    return write_rows(path, rows)


def agent_messages(question: str, tools: tuple[str, ...]) -> list[dict]:
    """A question after the system message that offers tools, as a JSON text."""
    schemas = json.dumps([SCHEMAS[name] for name in tools], ensure_ascii=False)
    system = {"role": "system", "content": "You can use tools.", "tools": schemas}
    return [system, {"role": "user", "content": question}]


def write_agent_rl(path: Path, count: int = 12) -> Path:
    """The QUESTIONS again and again, each with a number of its own in the text."""
    rows = []
    for i in range(count):
        question, tools, gt = QUESTIONS[i % len(QUESTIONS)]
        messages = agent_messages(f"（{i}）{question}", tools)
        rows.append({"conversations": answered(messages, i), "gt": gt})
    return write_rows(path, rows)
