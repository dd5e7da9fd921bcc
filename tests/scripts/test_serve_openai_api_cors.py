"""Web pages of other origins: closed by default, open to those that --allow_origin names."""

import httpx
import pytest

from scripts.openai_api.ignored_fields import HEADER
from scripts.serve_openai_api import ServeArgs
from tests.helpers.served import HI, Running
from trainer.runtime.arguments import parse_args

PAGE, OTHER = "http://localhost:3000", "https://elsewhere.example"
BODY = {"model": "chat", "messages": HI, "max_tokens": 3}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def opened():
    running = Running(allow_origin=[PAGE, "null"], api_key="secret", max_len=64)
    yield running
    running.close()


def preflight(server, origin, path="/v1/chat/completions", method="POST", **more):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(server.url + path, headers=headers | more)


def post(server, origin=PAGE, key="secret", **change):
    headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=BODY | change, headers=headers, timeout=60)


def test_it_is_closed_by_default(server):
    assert preflight(server, PAGE).status_code == 405
    for reply in (preflight(server, PAGE), post(server), post(server, temperature=9)):
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_preflight_needs_no_key(opened):
    for path, method in (
        ("/v1/responses", "POST"),
        ("/v1/models", "GET"),
        ("/v1/responses/x", "DELETE"),
    ):
        reply = preflight(opened, PAGE, path, method)
        assert reply.status_code == 200 and reply.headers[ALLOWED] == PAGE
        assert method in reply.headers["access-control-allow-methods"]
        assert "authorization" in reply.headers["access-control-allow-headers"]
        assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
    local = preflight(opened, PAGE, **{"Access-Control-Request-Private-Network": "true"})
    assert local.headers["access-control-allow-private-network"] == "true"
    refused = preflight(opened, OTHER)
    assert refused.status_code == 400 and ALLOWED not in refused.headers
    assert preflight(opened, PAGE, method="PUT").status_code == 400


def test_responses_streams_and_files_are_open_to_the_page(opened):
    for change in ({}, {"stream": True}):
        reply = post(opened, **change, own_note=1)
        assert reply.status_code == 200 and reply.headers[ALLOWED] == PAGE
        assert HEADER in reply.headers["access-control-expose-headers"]
        assert reply.headers[HEADER] == "own_note"
    assert post(opened, "null").headers[ALLOWED] == "null"
    assert ALLOWED not in post(opened, OTHER).headers
    key = {"Authorization": "Bearer secret"}
    models = httpx.get(f"{opened.url}/v1/models", headers=key | {"Origin": PAGE})
    assert models.headers[ALLOWED] == PAGE and "origin" in models.headers["vary"].lower()
    assert "access-control-allow-credentials" not in models.headers


def test_errors_are_open_to_the_page_too(opened, monkeypatch):
    for reply, status in (
        (post(opened, temperature=9), 400),
        (post(opened, key="wrong"), 401),
        (post(opened, model="nobody"), 404),
    ):
        assert reply.status_code == status and reply.headers[ALLOWED] == PAGE
        assert reply.json()["error"]["message"]

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("scripts.openai_api.endpoints.plan_chat", broken)
    crash = post(opened)
    assert crash.status_code == 500 and crash.headers[ALLOWED] == PAGE
    monkeypatch.setattr(opened.app.state.gate, "num_active", 1)  # so that it does not end yet
    monkeypatch.setattr(opened.app.state.gate, "is_draining", True)
    closing = post(opened)
    assert closing.status_code == 503 and closing.headers[ALLOWED] == PAGE
    assert "Retry-After" in closing.headers["access-control-expose-headers"]


def test_a_star_opens_it_to_all_pages():
    running = Running(allow_origin=["*"], max_len=64)
    try:
        for origin in (PAGE, OTHER, "null"):
            assert preflight(running, origin).status_code == 200
            assert post(running, origin).headers[ALLOWED] == "*"
    finally:
        running.close()


def test_origins_are_written_as_browsers_send_them(capsys):
    good = ["*", "null", PAGE, "https://a.example", "tauri://localhost", "chrome-extension://abc"]
    assert parse_args(ServeArgs, ["--allow_origin", *good]).allow_origin == good
    assert parse_args(ServeArgs, []).allow_origin == []
    for bad in ("localhost:3000", f"{PAGE}/", f"{PAGE}/chat", "http://Localhost", ""):
        with pytest.raises(SystemExit):
            parse_args(ServeArgs, ["--allow_origin", bad])
        assert f"--allow_origin {bad}" in capsys.readouterr().err
