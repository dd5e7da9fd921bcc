"""Replies that must have a form: JSON by a schema, tool calls, with and without thinking. The
networks write nonsense, so whatever comes out right is the grammar's doing."""

import json

import jsonschema
import openai
import pytest

from scripts.openai_api.grammars import Grammars, completion_grammar
from scripts.openai_api.requests import Function
from tests.helpers.served import HI, chat, joined

CITY = {
    "type": "object",
    "required": ["city", "days"],
    "properties": {
        "city": {"enum": ["Rome", "罗马"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
}
NOTHING = {"type": "object", "maxProperties": 0}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMAS = [
    CITY,
    {"enum": ["a", "b"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {"s": {"type": "string", "maxLength": 5}, "n": {"type": "null"}},
        "required": ["s", "n"],
    },
    {
        "$defs": {"x": {"enum": [1, 2]}},
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/x"}},
        "required": ["p"],
        "additionalProperties": False,
    },
    {
        "anyOf": [
            {"const": "only"},
            {
                "type": "object",
                "properties": {"k": {"const": 1}},
                "required": ["k"],
                "additionalProperties": False,
            },
        ]
    },
    {
        "type": "object",
        "properties": {"t": {"type": "string", "pattern": "^[a-c]{2,4}$"}},
        "required": ["t"],
    },
]


def by_schema(schema):
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_content_follows_its_schema(client, schema):
    for seed in range(3):
        whole = chat(client, response_format=by_schema(schema), max_tokens=200, seed=seed).choices[
            0
        ]
        assert whole.finish_reason == "stop"
        jsonschema.validate(json.loads(whole.message.content), schema)
        streamed = joined(
            chat(client, response_format=by_schema(schema), max_tokens=200, seed=seed, stream=True)
        )[0][0]
        assert streamed["content"] == whole.message.content


def test_json_objects_and_what_max_tokens_cuts(server, client):
    ended, closing = (
        0,
        {
            str(token): 12
            for text in ('"}', '":')
            for token in server.chat.tokenizer(text).input_ids
        },
    )
    for seed in range(4):
        choice = chat(
            client,
            response_format={"type": "json_object"},
            max_tokens=150,
            seed=seed,
            logit_bias=closing,
        ).choices[0]
        assert choice.message.content.startswith("{") and choice.finish_reason in ("stop", "length")
        if choice.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(choice.message.content), dict)
    assert ended
    cut = chat(client, response_format=by_schema(CITY), max_tokens=3).choices[0]
    assert (
        cut.finish_reason == "length"
        and CITY["properties"]["city"]["enum"][0] not in cut.message.content
    )
    assert (
        chat(client, response_format={"type": "text"}).choices[0].message.content
        == chat(client).choices[0].message.content
    )


def test_a_pydantic_model_can_be_asked_for(client):
    from typing import Literal

    from pydantic import BaseModel

    class Answer(BaseModel):
        colour: Literal["red", "green"]
        sure: bool

    reply = client.chat.completions.parse(
        model="chat", messages=HI, response_format=Answer, max_tokens=100
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_that_must_be_made_follow_their_schema(client, choice):
    for seed in range(4):
        options = dict(tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=500, seed=seed)
        whole = chat(client, **options).choices[0]
        assert whole.finish_reason in ("tool_calls", "length") and whole.message.content is None
        calls = whole.message.tool_calls
        done = calls if whole.finish_reason == "tool_calls" else calls[:-1]
        for call in done:
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, CITY if call.function.name == "get_weather" else NOTHING)
        if choice is NAMED:
            assert [call.function.name for call in calls] == [
                "get_weather"
            ] and whole.finish_reason == "tool_calls"
        assert len({call.id for call in calls}) == len(calls) and all(
            call.type == "function" for call in calls
        )
        streamed = joined(chat(client, **options, stream=True))[0][0]
        assert [(one["name"], "".join(one["arguments"])) for one in streamed["calls"].values()] == [
            (call.function.name, call.function.arguments) for call in calls
        ]
        assert streamed["reason"] == whole.finish_reason and streamed["content"] == ""
        weather = [one for one in streamed["calls"].values() if one["name"] == "get_weather"]
        assert all(
            one["id"] and one["type"] == "function" and len(one["arguments"]) > 3 for one in weather
        )


def test_one_call_or_several(client):
    for seed in range(6):
        one = chat(
            client,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=500,
            seed=seed,
        )
        assert (
            len(one.choices[0].message.tool_calls) == 1
            and one.choices[0].finish_reason == "tool_calls"
        )
    many = [
        len(
            chat(
                client,
                tools=[WEATHER],
                tool_choice="required",
                max_tokens=500,
                seed=seed,
                logit_bias={"3": 100},
            )
            .choices[0]
            .message.tool_calls
        )
        for seed in range(2)
    ]
    assert max(many) > 1


def test_calls_that_may_be_made(client):
    """A bias towards the token <tool_call> makes the model call; then the call is well-formed all
    the same.
    """
    options = dict(tools=[WEATHER], parallel_tool_calls=False, max_tokens=300, temperature=0)
    made = chat(client, **options, logit_bias={"3": 100}).choices[0]
    assert made.finish_reason == "tool_calls" and made.message.content is None
    jsonschema.validate(json.loads(made.message.tool_calls[0].function.arguments), CITY)
    streamed = joined(chat(client, **options, logit_bias={"3": 100}, stream=True))[0][0]
    assert (
        "".join(streamed["calls"][0]["arguments"]) == made.message.tool_calls[0].function.arguments
    )
    assert chat(client, **options, logit_bias={"3": -100}).choices[0].message.tool_calls is None
    cannot = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "not": {}}},
    }
    loose = chat(
        client,
        tools=[cannot],
        logit_bias={"3": 100},
        max_tokens=40,
        parallel_tool_calls=False,
        seed=2,
    ).choices[0]
    assert loose.message.tool_calls[0].function.name == "f"
    with pytest.raises(openai.BadRequestError, match="Unimplemented"):
        cannot["function"]["strict"] = True
        chat(client, tools=[cannot])


def test_no_tools_are_offered_with_none(client):
    without = chat(client)
    none = chat(client, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message == without.choices[0].message
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    assert chat(client, tools=[WEATHER]).usage.prompt_tokens > without.usage.prompt_tokens + 20
    text = chat(
        client, tools=[WEATHER], tool_choice="none", logit_bias={"3": 100}, max_tokens=2
    ).choices[0]
    assert text.message.tool_calls is None and text.message.content == "<tool_call>" * 2


def test_form_after_thinking(client):
    options = dict(reasoning_effort="low", max_tokens=400, logit_bias={"8": 5}, seed=3)
    reply = chat(client, response_format=by_schema(CITY), **options).choices[0]
    jsonschema.validate(json.loads(reply.message.content), CITY)
    called = chat(
        client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **options
    ).choices[0]
    jsonschema.validate(json.loads(called.message.tool_calls[0].function.arguments), CITY)
    assert called.message.content is None
    assert reply.message.reasoning_content and called.message.reasoning_content
    freely = dict(
        tools=[WEATHER],
        max_tokens=100,
        logit_bias={"7": 100, "8": 90, "3": 80},
        parallel_tool_calls=False,
    )
    thought = (
        chat(client, **freely).choices[0].message
    )  # <think> comes first, then nothing but </think>, then <tool_call>
    assert thought.tool_calls and not thought.content


def test_json_or_calls(client):
    options = dict(
        tools=[WEATHER], response_format=by_schema(CITY), max_tokens=300, parallel_tool_calls=False
    )
    jsonschema.validate(
        json.loads(chat(client, **options, logit_bias={"3": -100}).choices[0].message.content), CITY
    )
    assert chat(client, **options, logit_bias={"3": 100}).choices[0].message.tool_calls


def test_results_belong_to_a_call(client):
    result = {"role": "tool", "tool_call_id": "call_1", "content": "7"}
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert chat(client, messages=[*HI, made, result]).choices
    for messages in (
        [*HI, result],
        [*HI, result, made],
        [*HI, made, {**result, "tool_call_id": "call_2"}],
    ):
        with pytest.raises(openai.BadRequestError, match="tool_call_id: no call before it"):
            chat(client, messages=messages)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"response_format": by_schema({"type": "nothing"})}, "cannot be followed: Invalid type"),
        ({"response_format": by_schema({"not": {}})}, "Unimplemented"),
        ({"response_format": by_schema({"$ref": "http://elsewhere/schema"})}, "cannot be followed"),
        ({"response_format": by_schema({"type": "string", "pattern": "("})}, r"\( error: unclosed"),
        (
            {"response_format": by_schema({"type": "string", "pattern": "^(?=x)"})},
            r"parse error: \^\(\?=x\) error: look-around",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "string"}},
                    }
                ],
                "tool_choice": "required",
            },
            "arguments are an object",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"not": {}}, "strict": True},
                    }
                ],
                "tool_choice": "required",
            },
            "Unimplemented",
        ),
    ],
)
def test_schemas_that_cannot_be_followed(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **options)


def test_a_constraint_never_raises(server):
    grammars = Grammars(server.chat.tokenizer, server.chat.engine.end_ids)
    constraint = grammars.constraint(completion_grammar({"const": "x"}, thinking=False))
    assert constraint.mask().sum() > 0 and not constraint.mask()[2]
    constraint.accept(5000)  # not allowed here
    assert constraint.failure and constraint.mask().nonzero()[:, 0].tolist() == sorted(
        server.chat.engine.end_ids
    )
    fresh = grammars.constraint(completion_grammar({"const": "x"}, thinking=False))
    assert not fresh.failure
    for token in server.chat.tokenizer('"x"').input_ids:
        assert fresh.mask()[token]
        fresh.accept(token)
    assert fresh.mask().nonzero()[:, 0].tolist() == sorted(server.chat.engine.end_ids)


def test_free_text_may_not_spell_the_marks(server):
    grammars = Grammars(server.chat.tokenizer, server.chat.engine.end_ids)
    constraint = grammars.constraint(
        completion_grammar(functions=[Function(name="f")], thinking=False)
    )
    encode = server.chat.grammars.tokenizer.tokenize_str
    for part in ("see <", "tool", "_call"):
        for token in encode(part):
            assert constraint.mask()[token]
            constraint.accept(token)
    assert (
        not constraint.mask()[encode(">")[0]]
        and constraint.mask()[3]
        and constraint.mask()[encode("x")[0]]
    )
