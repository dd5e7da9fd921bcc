"""The schemas of tools that must be called, as libraries write them: what cannot be enforced is
left out, unless the tool is strict.
"""

import json

import jsonschema
import openai
import pytest

from scripts.openai_api.grammars import without_hard_patterns
from tests.helpers.served import chat


def tool_with(field, **options):
    schema = {"type": "object", "properties": {"value": field}, "required": ["value"]}
    return {"type": "function", "function": {"name": "note", "parameters": schema, **options}}


HARD = [  # field, the keyword that cannot be enforced, the field without it
    (
        {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True},
        "uniqueItems",
        {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    ),
    ({"type": "string", "format": "directory-path", "maxLength": 4}, "directory-path", None),
    ({"type": "string", "format": "binary", "maxLength": 4}, "binary", None),
    ({"type": "string", "maxLength": 3, "not": {"const": "a"}}, "not", None),
    (
        {"type": "object", "propertyNames": {"enum": ["a"]}, "maxProperties": 0},
        "propertyNames",
        {"type": "object"},
    ),
    ({"type": "string", "maxLength": 4, "pattern": "^(?!x)"}, "look-around", None),
]


@pytest.mark.parametrize("field, keyword, left", HARD, ids=lambda x: str(x)[:50])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_what_can_be_enforced_is(client, field, keyword, left, choice):
    left = left or {"type": "string", "maxLength": 4}
    bias = {"3": 100} if choice == "auto" else None  # the token <tool_call>
    options = dict(tool_choice=choice, parallel_tool_calls=False, max_tokens=200, logit_bias=bias)
    for seed in range(3):
        made = chat(client, tools=[tool_with(field)], seed=seed, **options).choices[0]
        arguments = json.loads(made.message.tool_calls[0].function.arguments)
        jsonschema.validate(arguments["value"], left)
        assert set(arguments) == {"value"} and made.finish_reason == "tool_calls"


@pytest.mark.parametrize("field, keyword, left", HARD, ids=lambda x: str(x)[:50])
def test_strict_tools_are_followed_exactly_or_refused(client, field, keyword, left):
    with pytest.raises(openai.BadRequestError, match=keyword) as caught:
        chat(client, tools=[tool_with(field, strict=True)], tool_choice="required")
    assert caught.value.code == "invalid_schema"


def test_what_is_left_out_is_logged_once(client, capfd):
    field = {"type": "string", "maxLength": 1, "format": "a-format-of-nobody"}
    for _ in range(2):
        chat(client, tools=[tool_with(field)], tool_choice="required", max_tokens=2)
    assert capfd.readouterr().err.count("a-format-of-nobody") == 1


def test_a_schema_that_makes_no_sense_stays_an_error(client):
    for field in ({"type": "colour"}, {"$ref": "#/$defs/nowhere"}):
        with pytest.raises(openai.BadRequestError, match="cannot be followed"):
            chat(client, tools=[tool_with(field)], tool_choice="required")


def test_only_patterns_that_cannot_be_enforced_are_left_out():
    hard, easy = "a(?=b)", "^a+$"
    named = {"properties": {"pattern": {"type": "string", "pattern": easy}}}
    assert without_hard_patterns(named) == named
    assert without_hard_patterns({"const": {"pattern": hard}}) == {"const": {"pattern": hard}}
    assert without_hard_patterns({"anyOf": [{"pattern": hard, "minLength": 1}]}) == {
        "anyOf": [{"minLength": 1}]
    }
    several = {"patternProperties": {easy: {}, hard: {}}, "additionalProperties": False}
    assert without_hard_patterns(several | {"minProperties": 1}) == {"minProperties": 1}
    assert without_hard_patterns({"patternProperties": {easy: {"pattern": hard}}}) == {
        "patternProperties": {easy: {}}
    }
