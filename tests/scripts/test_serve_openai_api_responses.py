"""The Responses API as OpenAI's own client sees it: text, reasoning, JSON, calls, conversations."""

import asyncio
import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from scripts.openai_api.application import build_app
from tests.helpers.served import HI, chat, refused

THINK, THINK_END, CALL = "7", "8", "3"  # ids of special tokens, for logit_bias
CITY = {
    "type": "object",
    "required": ["city", "days"],
    "properties": {
        "city": {"enum": ["Rome", "罗马"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": True}
IN_CHAT = {"name": "get_weather", "parameters": CITY, "strict": True}


class Lamp(BaseModel):
    """Switch the lamp."""

    is_on: bool


def respond(client, extra=None, **options):
    """The server's response, or its stream with stream=True; extra: extensions."""
    body = {"model": "chat", "input": "Hello there", "max_output_tokens": 12, **options}
    return client.responses.create(**body, extra_body={"seed": 1, **(extra or {})})


def last_event(stream):
    """(all text of the deltas, the last event) of a stream."""
    events = list(stream)
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    return text, events[-1]


def test_the_text_is_that_of_chat(client):
    for extra in ({}, {"temperature": 0.3}, {"top_p": 0.4}, {"top_k": 3}, {"stop": "e"}):
        expected = chat(client, extra_body=extra)
        response = respond(client, extra)
        choice = expected.choices[0]
        assert response.output_text == choice.message.content
        status = {"stop": "completed", "length": "incomplete"}[choice.finish_reason]
        text, last = last_event(respond(client, extra, stream=True))
        assert text == choice.message.content
        assert response.status == status and last.type == f"response.{status}"
        counted = (response.usage.input_tokens, response.usage.output_tokens)
        assert counted == (expected.usage.prompt_tokens, expected.usage.completion_tokens)
        assert last.response.usage.output_tokens == counted[1]


def test_a_response_tells_what_was_asked(client):
    asked = dict(
        instructions="Be brief.",
        metadata={"a": "b"},
        temperature=0.5,
        top_p=0.9,
        tools=[WEATHER],
        tool_choice="auto",
        parallel_tool_calls=False,
        truncation="auto",
        store=False,
        reasoning={"effort": "low"},
        text={"verbosity": "low"},
        user="me",
    )
    response = respond(client, **asked)
    got = response.to_dict()
    assert response.id.startswith("resp_") and response.object == "response"
    assert response.model == "chat" and response.error is None and response.background is False
    for name in ("instructions", "metadata", "temperature", "top_p", "truncation", "store", "user"):
        assert got[name] == asked[name]
    assert got["tool_choice"] == "auto" and got["parallel_tool_calls"] is False
    assert got["reasoning"]["effort"] == "low" and got["max_output_tokens"] == 12
    assert got["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert got["tools"] == [{"description": None, **WEATHER}]


def test_a_cut_response_says_so(client):
    cut = respond(client, {"ignore_eos": True})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete" and cut.completed_at is None
    ended = respond(client, {"logit_bias": {"2": 100}})
    assert ended.status == "completed" and ended.incomplete_details is None
    assert [item.type for item in ended.output] == ["message"] and ended.output_text == ""
    assert ended.output[0].status == "completed" and ended.completed_at


def test_reasoning_is_an_item_of_its_own(client):
    expected = chat(client, reasoning_effort="high").choices[0].message
    for extra, options in (
        ({}, {"reasoning": {"effort": "high", "summary": "auto"}}),
        ({}, {"reasoning": {"effort": "max"}}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {}),
    ):
        response = respond(client, extra, **options)
        item = response.output[0]
        assert item.type == "reasoning" and item.summary == []
        assert item.content[0].text == expected.reasoning_content
        assert response.output_text == expected.content
        assert response.usage.output_tokens_details.reasoning_tokens > 0
    both = respond(
        client, {"logit_bias": {THINK_END: 7}}, reasoning={"effort": "low"}, max_output_tokens=60
    )
    assert [item.type for item in both.output] == ["reasoning", "message"]
    assert both.output[0].status == "completed"
    plain = chat(client, reasoning_effort="none").choices[0].message.content
    assert respond(client, reasoning={"effort": "none"}).output_text == plain


def test_json_by_a_schema(client):
    form = {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}
    response = respond(client, text={"format": form}, max_output_tokens=200)
    assert set(json.loads(response.output_text)) == {"city", "days"}
    assert response.text.format.name == "place" and response.text.format.schema_ == CITY
    loose = respond(client, text={"format": {"type": "json_object"}})
    assert loose.output_text.startswith("{") and loose.text.format.type == "json_object"


def test_pydantic_models_are_parsed(client):
    parsed = client.responses.parse(model="chat", input="x", text_format=Lamp)
    assert isinstance(parsed.output_parsed, Lamp)
    with client.responses.stream(model="chat", input="x", text_format=Lamp) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Lamp) and kinds[-1] == "response.completed"
    tool = openai.pydantic_function_tool(Lamp)["function"] | {"type": "function"}
    called = client.responses.parse(model="chat", input="x", tools=[tool], tool_choice="required")
    assert set(called.output[0].parsed_arguments) == {"is_on"}
    again = [{"role": "user", "content": "x"}, *called.output, output_of(called.output[0])]
    assert client.responses.create(model="chat", input=again, max_output_tokens=3).output


def output_of(call, text="7"):
    """The item that returns the result of a call."""
    return {"type": "function_call_output", "call_id": call.call_id, "output": text}


def test_calls_are_those_of_chat(client):
    choices = ("required", {"type": "function", "name": "get_weather"})
    for choice in choices:
        in_chat = choice if choice == "required" else {"type": "function", "function": choice}
        tools = [{"type": "function", "function": IN_CHAT}]
        message = chat(client, tools=tools, tool_choice=in_chat, max_tokens=300).choices[0].message
        response = respond(client, tools=[WEATHER], tool_choice=choice, max_output_tokens=300)
        calls = [item for item in response.output if item.type == "function_call"]
        assert [call.arguments for call in calls] == [
            call.function.arguments for call in message.tool_calls
        ]
        assert {call.name for call in calls} == {"get_weather"}
        assert calls[0].call_id.startswith("call_") and calls[0].id.startswith("fc_")
        got = response.to_dict()["tool_choice"]
        assert got == choice


def test_only_allowed_tools_are_called(client):
    clock = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
    allowed = {"type": "allowed_tools", "mode": "required"}
    for name in ("get_time", "get_weather"):
        choice = allowed | {"tools": [{"type": "function", "name": name}]}
        one = respond(client, tools=[WEATHER, clock], tool_choice=choice, max_output_tokens=300)
        assert {item.name for item in one.output} == {name}
    named = [{"type": "function", "name": "get_date"}]
    with pytest.raises(openai.BadRequestError, match="'get_date', which is not among"):
        respond(client, tools=[WEATHER], tool_choice=allowed | {"tools": named})


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tool_loop(client, is_stored):
    """Call, result, text: with the server's memory and without."""
    options = dict(tools=[WEATHER], store=is_stored, max_output_tokens=200)
    extra = {"logit_bias": {CALL: 100}}
    first = respond(client, extra, input="Rome?", parallel_tool_calls=False, **options)
    call = first.output[-1]
    assert call.type == "function_call" and first.status == "completed"
    options["max_output_tokens"] = 8
    if is_stored:
        items, options["previous_response_id"] = [output_of(call)], first.id
    else:
        items = [{"role": "user", "content": "Rome?"}, *first.output, output_of(call)]
    second = respond(client, {"logit_bias": {CALL: -100}}, input=items, **options)
    asked = {"role": "user", "content": "Rome?"}
    function = {"name": call.name, "arguments": call.arguments}
    made = {"id": "a", "type": "function", "function": function}
    messages = [asked, {"role": "assistant", "content": None, "tool_calls": [made]}]
    messages.append({"role": "tool", "tool_call_id": "a", "content": "7"})
    tools = [{"type": "function", "function": IN_CHAT}]
    expected = chat(client, messages=messages, tools=tools, max_tokens=8, logit_bias={CALL: -100})
    assert second.output_text == expected.choices[0].message.content
    assert second.usage.input_tokens == expected.usage.prompt_tokens


def test_items_of_every_kind_are_the_messages_of_chat(client):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be x."}]},
        {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("Hel", "lo")]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "2"}],
        },
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "abc"},
        {"role": "assistant", "content": "B"},
    ]
    calls = [
        {"id": name, "type": "function", "function": {"name": f, "arguments": text}}
        for name, f, text in (("a", "f", "{}"), ("b", "g", '{"x": 1}'))
    ]
    messages = [
        {"role": "system", "content": "Be kind.\n\nBe brief.\n\nBe x."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "A", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "assistant", "content": "B"},
    ]
    response = respond(client, input=items, instructions="Be kind.")
    expected = chat(client, messages=messages)
    assert response.output_text == expected.choices[0].message.content
    assert response.usage.input_tokens == expected.usage.prompt_tokens


def test_log_probs_are_those_of_the_text(client):
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    expected = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    part = respond(client, include=include, top_logprobs=2).output[0].content[0]
    assert [one.token for one in part.logprobs] == [one.token for one in expected]
    assert [one.logprob for one in part.logprobs] == pytest.approx(
        [one.logprob for one in expected], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    streamed = [
        one
        for event in respond(client, include=include, top_logprobs=2, stream=True)
        if event.type == "response.output_text.delta"
        for one in event.logprobs
    ]
    assert [one.token for one in streamed] == [one.token for one in expected]
    thinking = respond(
        client,
        {"logit_bias": {THINK_END: 7}},
        include=include,
        reasoning={"effort": "low"},
        max_output_tokens=60,
    )
    part = thinking.output[-1].content[0]
    assert part.text.startswith(part.logprobs[0].token)  # not with a token of the reasoning
    assert respond(client).output[0].content[0].logprobs == []


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            body = dict(model="chat", input="Hi", max_output_tokens=6, extra_body={"seed": 3})
            whole = await client.responses.create(**body)
            stream = await client.responses.create(**body, stream=True)
            parts = [event.delta async for event in stream if event.type.endswith("text.delta")]
            return whole.output_text, "".join(parts)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


@pytest.mark.parametrize(
    "change, says",
    [
        ({"input": None}, "give a text"),
        ({"input": []}, "give a text"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"type": "computer_call_output"}]}, "not served"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "not served"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "text only"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]},
            "no function_call before",
        ),
        ({"input": "word " * 600}, "512 holds"),
        ({"input": "word " * 100_000}, "500,0"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "only functions"),
        ({"tools": [{"type": "computer_use_preview"}]}, "only functions"),
        ({"tools": [{"type": "function"}]}, "name"),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [WEATHER | {"parameters": {"not": {}}}]}, "Unimplemented"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "not among"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format",
        ),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "left"}, "truncation"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 3}, "needs include"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "stored prompts"),
        ({"context_management": [{"type": "compaction"}]}, "truncation"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"store": "no"}, "store"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_fields(server, change, says):
    body = {"model": "chat", "input": "hi", "max_output_tokens": 4, **change}
    error = refused(httpx.post(f"{server.url}/v1/responses", json=body, timeout=60))
    assert says in error["message"] or says in (error["param"] or "")


def test_models_that_cannot_be_asked(server):
    def post(model):
        return httpx.post(f"{server.url}/v1/responses", json={"model": model, "input": "hi"})

    assert refused(post("gpt"), 404)["code"] == "model_not_found"
    assert "no chat template" in refused(post("base"))["message"]


def test_unknown_fields_are_named_and_refused_when_strict(server, monkeypatch):
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi", "mood": 1}], "page": 2}
    body = {"model": "chat", "input": [item], "max_output_tokens": 2, "min_tokens": 1}
    body |= {"tools": [WEATHER | {"defer_loading": False}], "text": {"colour": "red"}}
    reply = httpx.post(f"{server.url}/v1/responses", json=body)
    names = "min_tokens, input[0].page, input[0].content[0].mood, tools[0].defer_loading"
    assert reply.headers["x-ignored-fields"] == f"{names}, text.colour"
    monkeypatch.setattr(server.app.state.ignored_fields, "is_strict", True)
    assert refused(httpx.post(f"{server.url}/v1/responses", json=body))["param"] == "min_tokens"


def test_the_document_lists_the_fields(server):
    document = build_app(server.models).openapi()
    part = document["components"]["schemas"]["ResponseRequest"]
    assert part["properties"]["model"]["enum"] == ["chat", "base"]
    assert {"input", "previous_response_id", "max_output_tokens"} <= set(part["properties"])
    found = document["paths"]["/v1/responses/{response_id}"]
    assert {"200", "400", "404", "503"} == set(found["get"]["responses"])
    assert (
        "text/event-stream"
        in (document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"])
    )


def test_instructions_are_the_system_message(client):
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    assert (
        respond(client, instructions="Be brief.").output_text
        == chat(client, messages=messages).choices[0].message.content
    )
