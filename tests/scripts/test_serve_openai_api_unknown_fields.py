"""Requests as programs of others write them: every field of their types, null where it is unset,
and fields that only their own server knows.
"""

import re

import httpx
import openai
import pytest
from pydantic import BaseModel

from scripts.openai_api.ignored_fields import HEADER, LONGEST_HEADER, MOST_NAMES
from tests.helpers.served import HI, Running, chat, refused

LAMP = {"type": "function", "function": {"name": "set_lamp", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "set_lamp", "arguments": "{}"}}
TURN = [
    *HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "on"},
]


@pytest.fixture(scope="module")
def strict():
    running = Running(strict=True)
    yield running
    running.close()


def ask(server, path="/v1/chat/completions", **change):
    base = {"prompt": "Once"} if path == "/v1/completions" else {"messages": HI}
    body = {"model": "chat", "max_tokens": 4, "temperature": 0, **base, **change}
    return httpx.post(server.url + path, json=body, timeout=60)


def with_message(**fields):
    return {"messages": [HI[0] | fields]}


def with_call(**fields):
    return {"messages": [*HI, TURN[1] | {"tool_calls": [CALL | fields]}, TURN[2]]}


NULLS = [
    with_message(name=None, tool_calls=None, tool_call_id=None, refusal=None, audio=None),
    with_message(function_call=None, images=None, reasoning_content=None, note=None),
    with_message(
        content=[{"type": "text", "text": "Hello there", "image_url": None, "file": None}]
    ),
    {"temperature": None, "top_p": None, "max_completion_tokens": None, "stop": None, "seed": None},
    {"suffix": None, "functions": None, "function_call": None, "audio": None, "prediction": None},
    {"web_search_options": None, "modalities": None, "verbosity": None, "own_option": None},
    {"chat_template_kwargs": {"enable_thinking": None, "x": None}, "response_format": None},
    {"stream_options": None, "tools": None, "tool_choice": None, "add_generation_prompt": None},
    {"metadata": {"a": None}, "user": None, "logit_bias": None, "verbosity": "low"},
    {"response_format": {"type": "text", "json_schema": None}, "continue_final_message": None},
]
UNKNOWN = [  # the fields, what they are called
    ({"": 1}, '""'),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"min_tokens": 1, "skip_special_tokens": True}, "min_tokens, skip_special_tokens"),
    ({"cache_prompt": True, "id_slot": -1}, "cache_prompt, id_slot"),
    ({"samplers": ["top_k", "min_p"], "mirostat": 0}, "samplers, mirostat"),
    ({"chat_template_kwargs": {"thinking_budget": 9}}, "chat_template_kwargs.thinking_budget"),
    (with_message(type="message", id="m1"), "messages[0].type, messages[0].id"),
    (with_message(tool_calls=[]), "messages[0].tool_calls"),
    (
        with_message(
            content=[
                {"type": "text", "text": "Hello there", "cache_control": {"type": "ephemeral"}}
            ]
        ),
        "messages[0].content[0].cache_control",
    ),
    (
        {"messages": [*HI, {"role": "assistant", "content": "a", "mood": {}}, *HI]},
        "messages[1].mood",
    ),
    (with_call(index=0, extra={}), "messages[1].tool_calls[0].extra"),
    ({"tools": [LAMP | {"cache_control": {}}], "tool_choice": "none"}, "tools[0].cache_control"),
    (
        {"a b\r\nX-Evil: 1": 1, "naïve": 2, "长": 3},
        "a%20b%0D%0AX-Evil%3A%201, na%C3%AFve, %E9%95%BF",
    ),
]


@pytest.mark.parametrize("change", NULLS, ids=lambda x: str(x)[:60])
def test_null_is_not_given(server, strict, change):
    for one in (server, strict):
        reply = ask(one, max_tokens=4, **change)
        assert reply.status_code == 200, reply.text
        assert HEADER not in reply.headers
        assert reply.json()["choices"] == ask(one).json()["choices"] or "temperature" in change


@pytest.mark.parametrize("change, names", UNKNOWN, ids=lambda x: str(x)[:60])
def test_unknown_fields_are_named_and_change_nothing(server, strict, change, names):
    reply = ask(server, **change)
    assert reply.status_code == 200, reply.text
    assert reply.headers[HEADER] == names
    known = [key for key in change if key in ("messages", "tools", "tool_choice")]
    if not known:
        assert reply.json()["choices"] == ask(server).json()["choices"]
    error = refused(ask(strict, **change))
    assert error["code"] == "unsupported_parameter" and "no such field" in error["message"]
    assert error["param"] == names.partition(",")[0]


def test_an_answer_that_ended_in_its_reasoning_can_be_handed_back(server):
    cut = {"role": "assistant", "content": "", "reasoning_content": "They greet me."}
    lengths = []
    for content in (None, ""):
        reply = ask(server, messages=[*HI, cut | {"content": content}, *HI])
        assert reply.status_code == 200, reply.text
        lengths.append(reply.json()["usage"]["prompt_tokens"])
    assert lengths[0] == lengths[1]


def test_a_schema_without_a_name_is_followed(server):
    schema = {"name": None, "description": None, "strict": None, "schema": {"const": 7}}
    form = {"type": "json_schema", "json_schema": schema}
    assert ask(server, response_format=form).json()["choices"][0]["message"]["content"] == "7"


def test_fields_of_tools_do_not_reach_the_prompt(server):
    plain = ask(server, tools=[LAMP]).json()["usage"]["prompt_tokens"]
    noted = {"type": "function", "function": LAMP["function"] | {"note": "x" * 50, "strict": None}}
    for tool in (LAMP | {"cache_control": {"type": "ephemeral"}}, noted):
        assert ask(server, tools=[tool]).json()["usage"]["prompt_tokens"] == plain


def test_streams_and_completions_name_them_too(server):
    assert ask(server, stream=True, mirostat=1).headers[HEADER] == "mirostat"
    reply = ask(server, "/v1/completions", n_probs=1, suffix=None, stream_options=None)
    assert reply.status_code == 200 and reply.headers[HEADER] == "n_probs"


def test_each_name_is_logged_once_and_counted(server, capfd):
    def counts():
        text = httpx.get(f"{server.url}/metrics").text
        found = re.findall(r'minimind_ignored_fields_total{field="(.+)",model="chat"} (.+)', text)
        return {name: float(value) for name, value in found}

    noted = [one | {"page": 1} for one in (HI[0], HI[0])]
    for _ in range(2):
        ask(server, messages=noted, **{"bell\x07": 1})
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "messages[].page" in line]) == 1
    assert len([line for line in lines if "bell%07" in line]) == 1
    assert counts()["messages[].page"] == 4 and counts()["bell%07"] == 2


def test_many_names_do_not_grow_header_log_or_metrics(capfd):
    running = Running(max_len=64)
    try:
        many = {f"field_{i}_{'x' * 100}": i for i in range(1000)}
        header = ask(running, **many).headers[HEADER]
        assert len(header) < LONGEST_HEADER + 100 and header.endswith(", ...")
        metrics = httpx.get(f"{running.url}/metrics").text
        assert metrics.count('minimind_ignored_fields_total{field="field_') == MOST_NAMES
        assert f'{{field="other",model="chat"}} {1000 - MOST_NAMES}.0' in metrics
        assert capfd.readouterr().err.count("ignored: ") == MOST_NAMES
    finally:
        running.close()


def test_the_document_says_whether_unknown_fields_pass(server, strict):
    for one, expected in ((server, True), (strict, False)):
        parts = httpx.get(f"{one.url}/openapi.json").json()["components"]["schemas"]
        for name in ("ChatRequest", "PlainMessage", "TextPart", "ToolCall", "CompletionRequest"):
            assert parts[name]["additionalProperties"] is expected
        assert parts["ChatRequest"]["properties"]["functions"]["type"] == "null"


def test_minus_one_token_is_all_the_room(server, client):
    room = server.chat.max_len
    endless = {"ignore_eos": True}
    for options in ({"max_tokens": -1}, {"max_tokens": 3, "max_completion_tokens": -1}):
        usage = chat(client, extra_body=endless, **options).usage
        assert usage.total_tokens == room
    reply = ask(server, "/v1/completions", max_tokens=-1, **endless)
    assert reply.json()["usage"]["total_tokens"] == room


def test_top_p_0_is_greedy(server, client):
    greedy = chat(client, temperature=0).choices
    for seed in range(3):
        assert chat(client, temperature=2, top_p=0, seed=seed).choices == greedy
    texts = [ask(server, "/v1/completions", **one).json()["choices"] for one in ({}, {"top_p": 0})]
    assert texts[0] == texts[1]


class Lamp(BaseModel):
    """Switch the lamp."""

    is_on: bool


def test_parsed_messages_of_the_official_client_can_be_handed_back(client, strict):
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as careful:
        for one in (client, careful):
            options = dict(model="chat", messages=HI, max_tokens=60, seed=1, response_format=Lamp)
            parsed = one.chat.completions.parse(**options).choices[0].message
            with one.chat.completions.stream(**options) as stream:
                streamed = stream.get_final_completion().choices[0].message
            assert isinstance(parsed.parsed, Lamp) and streamed.parsed == parsed.parsed
            for message in (parsed, streamed):
                again = chat(one, messages=[*HI, message, *HI], max_tokens=3)
                assert again.choices[0].finish_reason


def test_parsed_calls_of_the_official_client_can_be_handed_back(client, strict):
    tool = openai.pydantic_function_tool(Lamp)
    options = dict(model="chat", messages=HI, tools=[tool], tool_choice="required", seed=1)
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as careful:
        for one in (client, careful):
            message = one.chat.completions.parse(
                **options, parallel_tool_calls=False, max_tokens=60
            )
            message = message.choices[0].message
            call = message.tool_calls[0]
            assert isinstance(call.function.parsed_arguments, Lamp)
            result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
            assert chat(one, messages=[*HI, message, result], tools=[tool], max_tokens=3).choices
