"""The events of a streamed response: their order, their numbers, and what they add up to."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

from dataset.chat.reply import ReplyParser
from scripts.openai_api.errors import ApiError
from scripts.openai_api.responses_api.output import Output
from tests.helpers.served import wait_until

CALL, THINK_END = "3", "8"  # ids of special tokens, for logit_bias
TOOL = {
    "type": "function",
    "name": "f",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
TEXT = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
THOUGHT = [kind.replace("output_text", "reasoning_text") for kind in TEXT]
CALLED = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
OPENING = ["response.created", "response.in_progress"]


def post(server, **change):
    body = {"model": "chat", "input": "Hello there", "max_output_tokens": 12, "seed": 1}
    return httpx.post(f"{server.url}/v1/responses", json=body | change, timeout=60)


def stream(server, **change):
    """The events of a stream as dicts."""
    reply = post(server, stream=True, **change)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    return read(reply.text)


def read(text):
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    return events


def kinds(events):
    """The types of events, of equal neighbours one."""
    found = [event["type"] for event in events]
    return [one for one, before in zip(found, [None, *found]) if one != before]


def summed(events):
    """The items that the events add up to, with texts from their deltas."""
    items = {}
    for event in events:
        kind, index = event["type"].removeprefix("response."), event.get("output_index")
        if kind == "output_item.added":
            assert index == len(items)
            items[index] = event["item"]
        elif kind == "content_part.added":
            assert event["content_index"] == 0
            items[index]["content"].append(event["part"])
        elif kind == "function_call_arguments.delta":
            items[index]["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            items[index]["content"][0]["text"] += event["delta"]
        elif kind == "output_item.done":
            assert items[index] | {"status": event["item"]["status"]} == event["item"]
            items[index] = event["item"]
        if "item_id" in event:
            assert event["item_id"] == items[index]["id"]
    return list(items.values())


@pytest.mark.parametrize(
    "change, middle",
    [
        ({}, TEXT),
        ({"reasoning": {"effort": "low"}}, THOUGHT),
        (
            {"reasoning": {"effort": "low"}, "logit_bias": {THINK_END: 7}, "max_output_tokens": 60},
            THOUGHT + TEXT,
        ),
        ({"logit_bias": {"2": 100}}, [kind for kind in TEXT if "delta" not in kind]),
        (ONE_CALL | {"max_output_tokens": 60}, CALLED),
        ({"tools": [TOOL], "logit_bias": {CALL: 100}, "max_output_tokens": 100}, CALLED * 2),
    ],
    ids=["text", "cut reasoning", "reasoning and text", "nothing", "call", "calls"],
)
def test_the_order_of_events(server, change, middle):
    events = stream(server, **change)
    got = kinds(events)
    assert got[:2] == OPENING and got[2 : 2 + len(middle)] == middle
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    if CALL not in change.get("logit_bias", {}):
        assert len(got) == 3 + len(middle)
    assert summed(events) == last["response"]["output"]
    assert all(one["response"]["id"] == last["response"]["id"] for one in events[:2])
    assert events[0]["response"]["status"] == "in_progress" and not events[0]["response"]["output"]
    whole = post(server, **change).json()
    for name in ("status", "incomplete_details"):
        assert whole[name] == last["response"][name]
    assert bare(whole["output"]) == bare(last["response"]["output"])
    assert whole["usage"]["output_tokens"] == last["response"]["usage"]["output_tokens"]


def bare(items):
    """Items without their ids."""
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def test_a_cut_call_is_incomplete(server):
    whole = stream(server, **ONE_CALL, max_output_tokens=60)[-1]["response"]
    events = stream(server, **ONE_CALL, max_output_tokens=whole["usage"]["output_tokens"] - 7)
    assert events[-1]["type"] == "response.incomplete"
    item = events[-1]["response"]["output"][-1]
    assert item["type"] == "function_call" and item["status"] == "incomplete"
    assert kinds(events)[-3:-1] == CALLED[-2:]


def all_events(text, tools=True):
    """(events, items) for a whole completion, fed character by character."""
    parser, output, told = ReplyParser(tools=tools, trust_calls=tools), Output(), []
    for char in text:
        told += output.take(parser.feed(char))
    told += output.take(parser.finish())
    told += output.finish(is_whole=True)
    return told, output.items


def test_text_reasoning_and_calls_in_turn():
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
    events, items = all_events(f"<think>\nHm.\n</think>\n\nOne\n{call}\n{call}\nTwo")
    assert [item["type"] for item in items] == [
        *("reasoning", "message", "function_call", "function_call", "message")
    ]
    assert [item["content"][0]["text"] for item in items if "content" in item] == [
        *("Hm.", "One", "Two")
    ]
    assert {item["arguments"] for item in items if "arguments" in item} == {'{"a": "x"}'}
    assert kinds(events) == THOUGHT + TEXT + CALLED * 2 + TEXT
    assert summed(events) == items and len({item["id"] for item in items}) == 5
    assert len({item["call_id"] for item in items if "call_id" in item}) == 2
    assert all(item["status"] == "completed" for item in items)


def test_reasoning_alone_is_followed_by_an_empty_message():
    events, items = all_events("<think>\nHm.\n</think>\n\n")
    assert [item["type"] for item in items] == ["reasoning", "message"]
    assert items[1]["content"][0]["text"] == "" and summed(events) == items


def test_a_stream_that_fails_says_so(server, monkeypatch):
    def broken(generation):
        raise ApiError(400, "the JSON schema is too complex to be followed", "response_format")

    monkeypatch.setattr("scripts.openai_api.responses_api.endpoints.check_constraints", broken)
    events = stream(server)
    failed = events[-1]["response"]
    assert events[-1]["type"] == "response.failed" and failed["status"] == "failed"
    assert failed["error"] == {
        "code": "invalid_prompt",
        "message": "the JSON schema is too complex to be followed",
    }
    assert httpx.get(f"{server.url}/v1/responses/{failed['id']}").status_code == 404
    assert post(server).status_code == 400


def test_a_client_that_hangs_up_frees_its_slot_and_leaves_nothing(server):
    body = {"model": "chat", "input": "Hi", "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body) as reply:
        name = json.loads(next(x for x in reply.iter_lines() if x[:5] == "data:")[5:])
    wait_until(lambda: server.counts() == (0, 0, 0))
    assert httpx.get(f"{server.url}/v1/responses/{name['response']['id']}").status_code == 404


def test_an_engine_that_stops_ends_the_stream(monkeypatch):
    from scripts.openai_api.responses_api import endpoints

    class Broken:
        requests = []

        async def __aiter__(self):
            raise ApiError(500, "the engine has stopped: x")
            yield

    live = SimpleNamespace(begin=lambda: [], fail=lambda error: [{"type": error.message}])
    clock = SimpleNamespace(end=lambda: None)

    async def parts():
        return [part async for part in endpoints.stream(live, Broken(), clock, [], None)]

    assert b"the engine has stopped" in asyncio.run(parts())[-1]
