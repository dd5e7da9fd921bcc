"""Stop texts beside reasoning, tool calls and JSON: only free text is searched for them."""

import json

import jsonschema
import pytest

from tests.helpers.served import chat, joined

SHAPE = {
    "type": "object",
    "required": ["colour", "size"],
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"enum": [1, 2]}},
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": SHAPE}}
NAMED = {"type": "function", "function": {"name": "paint"}}
THINK, END_THINK, CALL = 7, 8, 3  # the tokens <think>, </think>, <tool_call>


def both(client, **options):
    """A choice as a whole, and the sum of its stream."""
    return chat(client, **options).choices[0], joined(chat(client, **options, stream=True))[0][0]


@pytest.mark.parametrize(
    "form",
    [
        {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [PAINT], "tool_choice": NAMED},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SHAPE}}},
    ],
    ids=["required", "named", "schema"],
)
def test_arguments_and_json_are_not_cut(client, form):
    for stop in (["Observation:", "Calling tools:"], ["colour", '"', "e", "\n"]):
        whole, streamed = both(client, stop=stop, max_tokens=200, **form)
        without = chat(client, max_tokens=200, **form).choices[0]
        assert whole.finish_reason == without.finish_reason == streamed["reason"]
        if "tools" in form:
            text = whole.message.tool_calls[0].function.arguments
            assert "".join(streamed["calls"][0]["arguments"]) == text
        else:
            text = whole.message.content
            assert streamed["content"] == text == without.message.content
        jsonschema.validate(json.loads(text), SHAPE)


def test_any_json_object_is_not_cut(client):
    options = dict(response_format={"type": "json_object"}, max_tokens=40)
    without = chat(client, **options).choices[0]
    for choice in both(client, stop=["{", "\n\n"], **options):
        content = choice["content"] if isinstance(choice, dict) else choice.message.content
        assert content == without.message.content


def test_an_optional_call_is_not_cut_but_the_text_around_it_is(client):
    options = dict(tools=[PAINT], max_tokens=200, temperature=0)
    called = dict(options, logit_bias={str(CALL): 100}, parallel_tool_calls=False)
    whole, streamed = both(client, **called, stop=["size", "colour"])
    assert whole.finish_reason == streamed["reason"] == "tool_calls"
    jsonschema.validate(json.loads(whole.message.tool_calls[0].function.arguments), SHAPE)
    free = dict(options, logit_bias={str(CALL): -100}, max_tokens=30)
    text = chat(client, **free).choices[0].message.content
    whole, streamed = both(client, **free, stop=text[8:10])
    assert whole.message.content == streamed["content"] == text[: text.index(text[8:10])]
    assert whole.finish_reason == streamed["reason"] == "stop"


def test_reasoning_is_not_cut(client):
    options = dict(max_tokens=30, temperature=0, reasoning_effort="high")
    options["logit_bias"] = {str(END_THINK): -100}
    thought = chat(client, **options).choices[0].message.reasoning_content
    whole, streamed = both(client, **options, stop=thought[6:8])
    assert whole.message.reasoning_content == thought == streamed["reasoning"]
    assert whole.finish_reason == "length"


def test_reasoning_that_the_model_begins_itself_is_not_cut(client):
    options = dict(max_tokens=5, logit_bias={str(THINK): 100})
    whole, streamed = both(client, **options, stop=["think", "<"])
    assert whole.message.reasoning_content == streamed["reasoning"] == "<think>" * 4
