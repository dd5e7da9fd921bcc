"""Tool calls, reasoning and weights as public data spells them, against messages in our form."""

import json
import time

import pytest

from dataset.chat.spellings import read_messages, split_reasoning

CALL = {"name": "get_time", "arguments": {"city": "Oslo"}}
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {}}}


def user(text="?"):
    return {"role": "user", "content": text}


def answer(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def result(text):
    return {"role": "tool", "content": text}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, user(), answer("a")],
        [user(), answer("", tool_calls=[CALL]), result("19:02"), answer("a")],
        [user(), answer("a", reasoning_content=""), user(), answer("b", reasoning_content="r")],
        [user(), answer("The tag </think> ends it.")],
        [user("<tool_response> is a tag"), answer("<tool_call> is no JSON </tool_call>")],
        [user("Action: f\nAction Input: {}"), answer("Action: none")],
        [user(), answer("a", tool_calls=[CALL]), user("Observe: this"), answer("b")],
        [answer("a"), answer("", tool_calls=[CALL], reasoning_content="r")],
        [answer("a"), answer("", tool_calls="not JSON")],
    ],
)
def test_messages_in_our_form_stay_as_they_are(messages):
    assert read_messages(messages) == messages


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>\nr\n</think>\n\na", "\nr\n", "a"),
        ("\n <think>r</think>a", "r", "a"),
        ("r\n</think>\n\na", "r\n", "a"),
        ("</think>\n\na", "", "a"),
        ("<think>r</think>\n<think>s</think>\na", "r\n\ns", "a"),
        ("<think>r</think>\na\n<think>s</think>\nb", "r\n\ns", "a\nb"),
        ("<thinking>r</thinking>a", "r", "a"),
        ("<thought>r</thought>a", "r", "a"),
        ("<reasoning>\nr\n</reasoning>\na", "\nr\n", "a"),
        ("<|begin_of_thought|>r<|end_of_thought|>a", "r", "a"),
        ("◁think▷r◁/think▷a", "r", "a"),
        ("<think>never closed", None, "<think>never closed"),
        ("</think>", None, "</think>"),
        ("a", None, "a"),
    ],
)
def test_reasoning_in_every_spelling(content, reasoning, rest):
    assert split_reasoning(content) == (reasoning, rest)
    read = answer(rest) if reasoning is None else answer(rest, reasoning_content=reasoning)
    assert read_messages([user(), answer(content)]) == [user(), read]


@pytest.mark.parametrize(
    "message",
    [
        answer("<think>r</think>\n<answer>\na\n</answer>"),
        answer(
            "<|begin_of_thought|>r<|end_of_thought|>\n<|begin_of_solution|>a<|end_of_solution|>"
        ),
        answer("a", reasoning="r"),
        answer("a", thinking="r"),
        answer("<answer>a</answer>", reasoning_content="r"),
        answer("<think>r</think>a", reasoning_content="r"),
    ],
)
def test_an_answer_after_its_reasoning(message):
    assert read_messages([message]) == [answer("a", reasoning_content="r")]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "<tool_call>{'name': 'get_time', 'arguments': {'city': 'Oslo'}}</tool_call>",
        '<tool_call>[{"name": "get_time", "parameters": {"city": "Oslo"}}]</tool_call>',
        '<tool_call>{"function": {"name": "get_time", "arguments": {"city": "Oslo"}}}</tool_call>',
        '<functioncall> {"name": "get_time", "arguments": {"city": "Oslo"}}',
    ],
)
def test_a_call_in_every_spelling(text):
    assert read_messages([answer(text)]) == [answer("", tool_calls=[CALL])]
    assert read_messages([answer(f"Let me see.\n{text}")]) == [
        answer("Let me see.", tool_calls=[CALL])
    ]


def test_arguments_as_json_in_single_quotes():
    text = """<functioncall> {"name": "say", "arguments": '{"text": "it\\'s"}'}"""
    call = {"name": "say", "arguments": {"text": "it's"}}
    assert read_messages([answer(text)]) == [answer("", tool_calls=[call])]


def test_several_calls_and_their_results():
    call = '<tool_call>{"name": "get_time", "arguments": {"city": "Oslo"}}</tool_call>'
    results = "<tool_response>\n19:02\n</tool_response>\n<tool_response>\n20:02\n</tool_response>"
    read = [user(), answer("", tool_calls=[CALL, CALL]), result("19:02"), result("20:02")]
    for role in ("user", "tool"):
        messages = [user(), answer(f"{call}\n{call}"), {"role": role, "content": results}]
        assert read_messages(messages) == read


def test_a_call_in_a_message_of_its_own_joins_the_answer_before_it():
    calls = [answer("", tool_calls=[CALL]), answer("", tool_calls=[CALL])]
    assert read_messages([user(), answer("Let me see."), *calls]) == [
        user(),
        answer("Let me see.", tool_calls=[CALL, CALL]),
    ]
    thoughts = [answer("", tool_calls=[CALL], reasoning_content=text) for text in "rs"]
    assert read_messages(thoughts) == [
        answer("", tool_calls=[CALL, CALL], reasoning_content="r\n\ns")
    ]
    unlearned = [answer("Let me see."), answer("", tool_calls=[CALL], weight=0)]
    assert len(read_messages(unlearned)) == 2


CALL_TEXT = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL_TEXT}\nDone.",
        f"Write `{CALL_TEXT}`",
        f"Write\n```\n{CALL_TEXT}\n```",
        f"```\n{CALL_TEXT}",
        "Put the JSON within <tool_call></tool_call> tags.",
        "<tool_call>[]</tool_call>",
        *(
            f"<tool_call>{call}</tool_call>"
            for call in (
                '{"name": "Bob"}',
                '{"name": "f", "args": {"x": 1}}',
                '{"name": "", "arguments": {}}',
                '{"name": "f", "arguments": "x=1"}',
                '{"name": "f", "arguments": [1]}',
                '{"name": "f", "arguments": {"x": NaN}}',
                '{"name": "f", "arguments": {"x": 1e999}}',
                '{"name": "f", "arguments": {"x": "\\ud800"}}',
                "{'name': 'f', 'arguments': {'x': {1, 2}}}",
                "{'name': 'f', 'arguments': {'x': b'1'}}",
            )
        ),
        "The model stops at\n\n```\n</think>\n```\nand then answers.",
        'Here is XML:\n<thought id="1">\nfoo\n</thought>\nDone.',
        "```xml\n<note>\n  <reasoning level='2'>x\n  </reasoning>\n</note>\n```",
        "<reasoning>\n  <step>1</step>\n</reasoning>",
        "It thinks in `<think>`\nand `\n</think>\nends it.",
        "Observation: it turned red.\nThought: acid.\nFinal Answer: HCl",
        "Action: think\nThen go on.",
        "Action: f\nAction: g\nAction Input: {}",
        "Action: get_time\nAction Input: weather in Oslo",
        "Action: the tool\nAction Input: the input to the tool",
        "```\nAction: f\nAction Input: {}\n```",
        "Final Answer: 4",
    ],
)
def test_prose_code_and_what_is_no_call_stay_text(text):
    assert read_messages([user(), answer(text)]) == [user(), answer(text)]


def test_code_behind_reasoning_stays_whole():
    code = "```\n<think>\nyour reasoning\n</think>\nyour answer\n```\n    indented"
    assert split_reasoning(f"<think>\nr\n</think>\n\n{code}") == ("\nr\n", code)
    assert split_reasoning("<think>r</think>\n<think>s</think>\n    indented") == (
        "r\n\ns",
        "    indented",
    )
    review = "<review>\n<reasoning>Good plot</reasoning>\n</review>"
    assert split_reasoning(f"<think>r</think>\n{review}") == ("r", review)


def test_reading_takes_no_time_on_long_texts():
    long = 100_000
    texts = [
        " " * long,
        "<think>\n" * long,
        "<think>a</think>" + "<think>\n" * long,
        "<tool_call>" * long,
        "<tool_call>" * long + "</tool_call>",
        "<think>a</think><answer>" + " " * long,
        "Thought: a\n" * long,
        "Action Input: " + "[" * long,
        "<tool_call>" + "[" * long + "</tool_call>",
    ]
    start = time.process_time()
    for text in texts:
        read_messages([answer(text)])
    for role in ("user", "tool", "system"):
        for text in ("<tool_response>" * long, "<tools>[" * long, " " * long):
            read_messages([{"role": role, "content": text}])
    assert time.process_time() - start < 20  # quadratic: minutes


def test_results_that_are_objects():
    assert read_messages([{"role": "tool", "content": {"a": [1, "二"]}}]) == [
        result('{"a": [1, "二"]}')
    ]


REACT = """I look it up.
Thought: I need the time.
Action: get_time
Action Input: {"city": "Oslo"}
Observation: 19:02
Thought: I know it.
Final Answer: It is 19:02."""


def test_a_react_trace_in_one_message_or_in_several():
    called = answer("", tool_calls=[CALL], reasoning_content="I look it up.\nI need the time.")
    read = [user(), called, result("19:02"), answer("It is 19:02.", reasoning_content="I know it.")]
    assert read_messages([user(), answer(REACT)]) == read
    first, last = REACT.split(" 19:02\n")
    messages = [user(), answer(first), user("Observation: 19:02"), answer(last)]
    assert read_messages(messages) == read
    (thought,) = read_messages([answer("Thought: b\nFinal Answer: c", reasoning_content="a")])
    assert thought == answer("c", reasoning_content="a\nb")


def test_words_of_the_user_after_a_result_stay_the_users():
    talk = [answer("", tool_calls=[CALL]), result("1"), user("Observation: my cat is sick.")]
    assert read_messages(talk) == talk


QWEN = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>"
    "\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
HERMES = (
    "You call functions. Here are the available tools: <tools> {} </tools> Use the following "
    'pydantic model json schema for each tool call you will make: {"title": "Call"} For each '
    "function call return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags as follows:\n<tool_call>\n{'name': <name>}\n</tool_call>"
)


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        (HERMES, "You call functions."),
        (f"Be brief.\n\n{QWEN}", "Be brief."),
        (f"{QWEN}\n\nAnswer in French.", "Answer in French."),
        ("You are Bob with these tools:\n<tools>{}</tools>", "You are Bob with these tools:"),
        ("# Rules\nUse French.\n<tools>{}</tools>", "# Rules\nUse French."),
        ("<tools>{}</tools> To call a taxi, wave.", "To call a taxi, wave."),
    ],
)
def test_tools_inside_a_system_prompt(content, rest):
    for text in (f"[{TOOL}]", f"{TOOL}"):
        (system,) = read_messages([{"role": "system", "content": content.replace("{}", text)}])
        assert system["content"] == rest
        assert system["tools"] == str([TOOL]).replace("'", '"')
    given = {"role": "system", "content": content.replace("{}", f"[{TOOL}]"), "tools": [TOOL]}
    assert read_messages([given]) == [{"role": "system", "content": rest, "tools": [TOOL]}]
    for no_tools in ("[]", "{}", "[1]", '[{"a": 1}]'):
        empty = {"role": "system", "content": f"<tools>{no_tools}</tools>"}
        assert read_messages([empty]) == [empty]
    others = {**given, "tools": [{"name": "other"}]}
    assert read_messages([others]) == [others]


@pytest.mark.parametrize(
    ("key", "value", "is_trained"),
    [
        *(("weight", 0, False), ("weight", 1, True), ("weight", 0.0, False)),
        *(("train", False, False), ("train", True, True), ("loss", False, False)),
        *(("mask", True, False), ("mask", 0, True), ("weight", None, True)),
    ],
)
def test_an_answer_that_is_not_to_be_learned(key, value, is_trained):
    expected = answer("a") if is_trained else answer("a", train=False)
    (read,) = read_messages([answer("a", **{key: value})])
    assert {name: one for name, one in read.items() if one is not None} == expected


def test_weights_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"message 1: weight is 0\.5\. Give 0 or 1"):
        read_messages([user(), answer("a", weight=0.5)])
    with pytest.raises(ValueError, match="message 0: train on role user"):
        read_messages([{**user(), "train": True}])
    assert read_messages([{**user(), "weight": 0}]) == [user()]


def test_json_is_spelled_as_the_template_spells_it():
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]
    found = read_messages(
        [
            {"role": "user", "content": '{"a":1}'},
            {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)},
            {"role": "tool", "content": '{"b":[1,2]}'},
            {"role": "assistant", "content": '{"c":3}'},
        ]
    )
    assert [message["content"] for message in found] == ['{"a":1}', "", '{"b": [1, 2]}', '{"c":3}']
    assert found[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert read_messages(found) == found
