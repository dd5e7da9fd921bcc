"""What clients get wrong: each is an error of the API's shape that says what to do, or is served
with the meaning documented.
"""

import json

import httpx
import openai
import pytest

from tests.helpers.served import refused

HI = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "word " * 600}]


def post(server, path="/v1/chat/completions", **request):
    return httpx.post(server.url + path, timeout=60, **request)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_comp"),
        ({"n": 0}, "n:"),
        ({"n": 129}, "n:"),
        ({"n": None, "top_logprobs": 3}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"presence_penalty": 3}, "presence"),
        ({"frequency_penalty": -3}, "frequency"),
        ({"repetition_penalty": 0}, "repetition"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999999999999999999": 1}}, "no token"),
        ({"logit_bias": {"-1": 1}}, "no token"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_op"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "same name"),
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"functions": []}, "use tools"),
        ({"prediction": {"type": "content", "content": "x"}}, "predicted outputs"),
        ({"web_search_options": {}}, "offer a tool"),
        ({"function_call": "auto"}, "use tool_choice"),
        ({"audio": {"voice": "a"}}, "text only"),
        ({"suffix": "x"}, "suffix"),
        ({"reasoning_effort": "huge"}, "reasoning"),
        ({"chat_template_kwargs": {"enable_thinking": "x"}}, "chat_template_kwargs"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "contradict",
        ),
        ({"modalities": ["audio"]}, "modalities"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": None}]}, "content"),
        ({"messages": [{"role": "assistant"}]}, "tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": LONG}, "512 holds"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, "500,0"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
            "tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "text only"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "text only"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "file": 1}]}]},
            "text only",
        ),
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_chat_fields(server, change, says):
    body = {"model": "chat", "messages": HI, "max_tokens": 4, **change}
    error = refused(post(server, json=body))
    assert says in error["message"] or says in (error["param"] or "")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [6400]}, "no token 6400"),
        ({"prompt": [-1]}, "no token"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [5] * 600}, "600 tokens"),
        ({"prompt": "word " * 600}, "context of 512"),
        ({"prompt": "word " * 100_000}, "500,000 characters"),
        ({"max_tokens": 0}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"prompt": ["x"] * 500}, "500 completions"),
        ({"prompt": ["x"] * 100, "n": 100}, "10000 completions"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_completion_fields(server, change, says):
    error = refused(
        post(
            server,
            "/v1/completions",
            json={"model": "base", "prompt": "x", "max_tokens": 4, **change},
        )
    )
    assert says in error["message"]
    assert error["param"] == "prompt" or error["code"] != "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "chat", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 5000,
        b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b"model=chat",
        b"\x00",
    ],
    ids=lambda body: repr(body[:60]),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bodies_that_are_no_request(server, path, body):
    refused(post(server, path, content=body, headers={"Content-Type": "application/json"}))


def test_bodies_that_are_not_declared_as_json(server):
    text = json.dumps({"model": "chat", "messages": HI})
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        assert "application/json" in refused(post(server, content=text, headers=headers))["message"]
    assert (
        post(
            server, content=text, headers={"Content-Type": "application/json; charset=utf-8"}
        ).status_code
        == 200
    )


def test_unusual_requests_that_have_a_meaning(server):
    for change in (
        {"max_tokens": 10**30, "stop": ["e", "a", "o", "i"]},
        {"seed": -(10**30)},
        {"top_k": 10**30},
        {"top_k": -1},
        {"temperature": 1e-300},
        {"temperature": 2},
        {"min_p": 1},
        {"top_p": 1e-300},
        {"tools": []},
        {"stop": []},
        {"stop": None},
        {"n": None},
        {"user": "me", "metadata": {"a": "b"}, "store": False},
        {"logit_bias": {}},
        {"repetition_penalty": 100},
        {"messages": [{"role": "user", "content": ""}]},
        {"response_format": None},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": "\u0000\U0001f600\uffff e\u0301"}]},
        {"temperature": 0, "seed": 5},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [*HI, {"role": "system", "content": "late"}]},
    ):
        response = post(server, json={"model": "chat", "messages": HI, "max_tokens": 4, **change})
        assert response.status_code == 200, (change, response.text)


def test_paths_and_names_that_are_not_there(server):
    assert (
        refused(post(server, json={"model": "gpt", "messages": HI}), 404)["code"]
        == "model_not_found"
    )
    error = refused(post(server, "/v1/completions", json={"model": "gpt", "prompt": "x"}), 404)
    assert "served are chat, base" in error["message"]
    assert refused(httpx.get(f"{server.url}/v1/models/gpt"), 404)["code"] == "model_not_found"
    refused(httpx.get(f"{server.url}/v2"), 404)
    refused(httpx.get(f"{server.url}/v1/chat/completions"), 405)
    refused(httpx.delete(f"{server.url}/v1/models"), 405)
    assert (
        "no chat template"
        in refused(post(server, json={"model": "base", "messages": HI}))["message"]
    )


def test_the_official_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="gpt", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="chat", messages=HI, temperature=9)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="chat", messages=LONG, stream=True)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_a_bug_is_an_error_of_the_same_shape(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr("scripts.openai_api.endpoints.plan_chat", broken)
    error = refused(post(server, json={"model": "chat", "messages": HI}), 500)
    assert error["type"] == "server_error" and "secret" not in error["message"]
