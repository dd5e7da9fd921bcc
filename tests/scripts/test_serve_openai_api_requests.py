"""Every request has an id and an answer of the API's shape, whatever its path and method."""

import httpx
import pytest

from tests.helpers.served import HI, Running, refused

KEY = "x-request-id"
ASK = {"model": "chat", "messages": HI, "max_tokens": 3}


@pytest.mark.parametrize("name", ["abc", "req_1", "A-b.c:d/e+f=g@h", "x" * 128])
def test_a_good_id_of_the_client_is_returned(server, name):
    for path in ("/v1/models", "/nothing"):
        assert httpx.get(server.url + path, headers={KEY: name}).headers.get_list(KEY) == [name]
    for change in ({}, {"stream": True}, {"temperature": 9}):
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", json=ASK | change, headers={KEY: name}
        )
        assert reply.headers[KEY] == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "<script>", "é".encode()])
def test_other_ids_are_replaced(server, name):
    found = {httpx.get(f"{server.url}/health", headers={KEY: name}).headers[KEY] for _ in range(2)}
    assert len(found) == 2 and all(one.startswith("req_") for one in found)


def test_the_official_client_reads_it(client):
    assert client.chat.completions.create(**ASK)._request_id.startswith("req_")
    assert client.models.with_raw_response.list().request_id.startswith("req_")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/chat", "/health", "/docs", "/metrics"])
def test_head_is_get_without_the_body(server, path):
    head, get = httpx.head(server.url + path), httpx.get(server.url + path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers[KEY] and head.headers["content-length"]


def test_head_of_what_is_not_there(server):
    for path, status in (("/v1/models/gpt", 404), ("/nothing", 404), ("/v1/completions", 405)):
        reply = httpx.head(server.url + path)
        assert reply.status_code == status and reply.content == b""


def test_unknown_paths_and_methods(server):
    for path in ("/", "/v1", "/v1/embeddings", "/v1/chat", "/v1/responses/a/b"):
        for method in ("GET", "POST", "DELETE"):
            reply = httpx.request(method, server.url + path, follow_redirects=True)
            error = refused(reply, reply.status_code)
            assert reply.status_code in (404, 405) and reply.headers[KEY] and error["message"]
    for path, methods in (
        ("/v1/chat/completions", "POST"),
        ("/v1/models/chat", "GET, HEAD"),
        ("/v1/responses/x", "DELETE, GET, HEAD"),
    ):
        reply = httpx.put(server.url + path, json={})
        assert refused(reply, 405) and reply.headers["allow"] == methods


def test_refusals_and_crashes_have_an_id_too(monkeypatch):
    running = Running(api_key="secret", allow_origin=["http://page.example"], max_len=64)

    def broken(*_):
        raise RuntimeError("a bug")

    try:
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        monkeypatch.setattr("scripts.openai_api.endpoints.plan_chat", broken)
        headers = {"Authorization": "Bearer secret", "Origin": "http://page.example", KEY: "mine"}
        url = f"{running.url}/v1/chat/completions"
        crash = httpx.post(url, json=ASK, headers=headers)
        assert crash.status_code == 500 and crash.headers[KEY] == "mine"
        assert "X-Request-Id" in crash.headers["access-control-expose-headers"]
        assert httpx.get(f"{running.url}/v1/models").headers[KEY]
        asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(url, headers=asked).headers[KEY]
    finally:
        running.close()
