"""The tools: exact results without eval(), errors as results, and the protocol of a question that
needs a call.
"""

import json
import re
from datetime import date

import pytest

from dataset.chat.reply import assistant_message
from dataset.toy.rows import agent_row, question_of_item, question_of_row, rl_row
from dataset.toy.scorer import ask, score
from dataset.toy.tools import run_tool, tool_schemas
from dataset.toy.world import make_world


def item_of(skill, split="train"):
    return next(make_world("mini", 0).items("test", skill, split, 1))


def script_of(item):
    """A generate() that makes an item's calls, then gives its reply."""
    turn = item.turns[0]
    blocks = (
        json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False)
        for c in turn.calls
    )
    replies = ["\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks), turn.reply]
    return lambda messages, tools: replies.pop(0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("-7 + 2", -5),
        ("7 / 2", 3.5),
        ("0.1 + 0.2", 0.3),
        ("12 × 12", 144),
        ("9 ÷ 3", 3),
        ("17 % 5", 2),
        ("17 // 5", 3),
        ("10 - 2 - 3", 5),
    ],
)
def test_calculator(expression, value):
    assert json.loads(run_tool("calculator", {"expression": expression})) == {"result": value}


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "1 / 0",
        "2 ** 99999",
        "x + 1",
        "[1]",
        "1 +",
        "'a' * 9",
        "True + 1",
        "9" * 300,
        "(" * 150,
        "",
        "(lambda: 1)()",
        "1 if 1 else 2",
        5,
        None,
        "1e300*1e300/7",
    ],
)
def test_calculator_refuses_everything_else(expression):
    assert "error" in json.loads(run_tool("calculator", {"expression": expression}))


def test_other_tools_against_known_values():
    def result(name, **arguments):
        return json.loads(run_tool(name, arguments))

    assert result("convert_unit", value=3, **{"from": "hours", "to": "minutes"}) == {"result": 180}
    assert result("convert_unit", value=90, **{"from": "分钟", "to": "小时"}) == {"result": 1.5}
    assert result("days_between", start="2026-02-27", end="2026-03-02") == {
        "days": (date(2026, 3, 2) - date(2026, 2, 27)).days
    }
    assert result("count_letter", word="Banana", letter="a") == {"count": 3}
    assert result("get_weather", city="Miliport") == result("get_weather", city="米里港")
    assert re.fullmatch(r"\d\d:\d\d", result("get_time", city="Miliport")["time"])
    for name, arguments in [
        ("nothing", {}),
        ("get_time", {}),
        ("get_time", {"city": 3, "x": 1}),
        ("get_price", {"item": 3}),
        ("days_between", {"start": "now", "end": "then"}),
        ("get_time", "Rome"),
        ("get_time", {"city": 3}),
        ("convert_unit", {"value": "x", "from": "hours", "to": "minutes"}),
        ("convert_unit", {"value": "1e400", "from": "minutes", "to": "hours"}),
        ("convert_unit", {"value": 1, "from": [], "to": "minutes"}),
    ]:
        assert "error" in json.loads(run_tool(name, arguments)), (name, arguments)


def test_ask_needs_the_call_and_the_result():
    item = item_of("tools")
    question = question_of_item(item)
    assert not ask(question, lambda messages, tools: item.turns[0].reply)[
        0
    ]  # guessed without the tool
    looping, messages = ask(question, lambda messages, tools: script_of(item)(messages, tools))
    assert not looping and len(messages) < 15
    seen, script = [], script_of(item)

    def generate(messages, tools):
        seen.append((len(messages), tools))
        return script(messages, tools)

    assert ask(question, generate)[0]
    assert [tools for _, tools in seen] == [tool_schemas(item.tools)] * 2 and seen[1][0] == seen[0][
        0
    ] + 2


def test_broken_tool_calls_are_no_calls():
    def calls(reply):
        return assistant_message(reply, tools=True).get("tool_calls", [])

    good = '<tool_call>\n{"name": "get_time", "arguments": {"city": "X"}}\n</tool_call>'
    assert calls(good + good) == [{"name": "get_time", "arguments": {"city": "X"}}] * 2
    for block in (
        "{}",
        "{bad",
        "[1]",
        '{"name": 1, "arguments": {}}',
        '{"name": "get_time", "arguments": "Rome"}',
    ):
        assert calls(f"<tool_call>{block}</tool_call>") == []
    assert calls(good[:-3]) == calls(f"<think>{good}") == []
    assert "tool_calls" not in assistant_message(good, tools=False)


def test_a_thought_before_a_call_goes_on_with_the_conversation():
    item = item_of("tools")
    script, heard = script_of(item), []

    def generate(messages, tools):
        heard.append([*messages])
        return "<think>\nWhich tool?\n</think>\n\n" + script(messages, tools)

    right, messages = ask(question_of_item(item), generate)
    assert (
        right and heard[1][-2]["reasoning_content"] == "Which tool?" and heard[1][-2]["tool_calls"]
    )
    assert messages[-1] == {
        "role": "assistant",
        "content": item.turns[0].reply,
        "reasoning_content": "Which tool?",
    }


def test_rounds_are_limited_and_the_last_calls_are_not_run():
    item = item_of("tools")
    asked = []

    def generate(messages, tools):
        asked.append(len(messages))
        return script_of(item)(messages, tools)

    right, messages = ask(question_of_item(item), generate)
    assert (
        not right
        and len(asked) == 4
        and [message["role"] for message in messages].count("tool") == 3
    )


def test_rows_of_rl_and_agent_files_become_questions():
    for skill in ("arithmetic", "sorting", "dates", "units", "lookup"):
        for item in make_world("mini", 0).items("test", skill, "train", 20):
            question = question_of_row(json.loads(json.dumps(rl_row(item, None))))
            assert score(question, item.turns[0].reply) and not score(question, item.wrong)
    item = item_of("tools")
    question = question_of_row(json.loads(json.dumps(agent_row(item, None))))
    assert question.tools == tool_schemas(item.tools) and ask(question, script_of(item))[0]


def test_multi_turn_is_judged_by_the_last_reply_and_hears_the_models_own_words():
    item, heard = item_of("multi_turn", "heldout"), []

    def generate(messages, tools):
        heard.append([message["content"] for message in messages])
        return "I do not know." if len(heard) == 1 else item.turns[-1].reply

    assert ask(question_of_item(item), generate)[0] and "I do not know." in heard[1]
