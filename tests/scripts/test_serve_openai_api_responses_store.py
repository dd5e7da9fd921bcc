"""Responses that are kept: asked for, continued, forgotten, and the conversations cut to fit."""

import httpx
import openai
import pytest

from scripts.openai_api.responses_api import store as store_module
from scripts.openai_api.responses_api.store import Store, page_of
from scripts.serve_openai_api import ServeArgs
from tests.helpers.served import Running, chat, refused
from trainer.runtime.arguments import parse_args


def respond(client, **options):
    body = {"model": "chat", "input": "Hello there", "max_output_tokens": 8, **options}
    return client.responses.create(**body, extra_body={"seed": 1})


def test_a_kept_response_is_returned_and_deleted(client):
    for stream in (False, True):
        made = respond(client, stream=stream, metadata={"a": "b"})
        made = list(made)[-1].response if stream else made
        assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
        client.responses.delete(made.id)
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                ask(made.id)


def test_what_is_not_to_be_stored_is_not(client):
    made = respond(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match="store: false") as caught:
        respond(client, previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    assert caught.value.code == "previous_response_not_found"


def test_a_conversation_is_continued_without_its_instructions(client):
    first = respond(client, instructions="Be brief.")
    second = respond(client, input="And?", previous_response_id=first.id)
    third = respond(client, input=[], previous_response_id=second.id, instructions="Be kind.")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": second.output_text},
    ]
    for response, number in ((second, 4), (third, 5)):
        sent = messages[:number] if response is third else messages[1:number]
        expected = chat(client, messages=sent, max_tokens=8)
        assert response.output_text == expected.choices[0].message.content
        assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert third.previous_response_id == second.id
    client.responses.delete(first.id)  # the others hold the conversation themselves
    assert respond(client, input="x", previous_response_id=second.id).output_text


def test_input_items_come_in_pages(client):
    items = [{"role": "user", "content": f"Number {i}"} for i in range(5)]
    items[1]["id"] = "msg_mine"
    first = respond(client, input=items)
    second = respond(client, input="Last", previous_response_id=first.id)
    found = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    texts = [item.content[0].text for item in found]
    assert texts == [*(f"Number {i}" for i in range(5)), first.output_text, "Last"]
    assert found[1].id == "msg_mine" and all(item.id.startswith("msg_") for item in found)
    newest = client.responses.input_items.list(second.id, limit=1)
    assert newest.data[0].content[0].text == "Last" and newest.has_more
    after = client.responses.input_items.list(second.id, order="asc", after="msg_mine", limit=1)
    assert after.data[0].content[0].text == "Number 2"


def test_wrong_questions_about_kept_responses(server, client):
    url = f"{server.url}/v1/responses"
    kept = f"{url}/{respond(client).id}"
    for query, says in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        assert says in refused(httpx.get(f"{kept}/input_items?{query}"))["message"]
    assert refused(httpx.get(f"{kept}/input_items?after=nobody"))["param"] == "after"
    assert "streamed again" in refused(httpx.get(f"{kept}?stream=true"))["message"]
    assert httpx.get(f"{kept}?stream=false&include=x").status_code == 200
    refused(httpx.get(f"{url}/nobody/input_items"), 404)
    refused(httpx.get(url), 405)
    refused(httpx.post(kept, json={}), 405)


def test_items_are_named_by_their_ids(client):
    first = respond(client, input=[{"role": "user", "content": "One", "id": "msg_one"}])
    reference = {"type": "item_reference", "id": first.output[0].id}
    named = [{"id": "msg_one"}, reference, {"role": "user", "content": "Two"}]
    by_name = respond(client, input=named, store=False)
    by_id = respond(client, input="Two", previous_response_id=first.id)
    assert by_name.output_text == by_id.output_text
    with pytest.raises(openai.NotFoundError, match="no item 'msg_nobody'"):
        respond(client, input=[{"type": "item_reference", "id": "msg_nobody"}])


def test_the_oldest_is_forgotten_first(monkeypatch):
    store = Store(2)
    for name in "abc":
        store.keep({"id": name, "output": []}, [])
    assert list(store.kept) == ["b", "c"]
    item = {"id": "msg", "text": "x" * 100}
    size = store.kept["b"].size
    monkeypatch.setattr(store_module, "MOST_BYTES", size + 140)
    store.keep({"id": "d", "output": []}, [item])
    assert list(store.kept) == ["d"] and store.size == store.kept["d"].size
    store.keep({"id": "e", "output": []}, [item, item])  # too long by itself
    assert list(store.kept) == ["d"]
    store.delete("d")
    assert store.size == 0


def test_a_server_may_keep_nothing():
    assert parse_args(ServeArgs, ["--max_stored_responses", "0"]).max_stored_responses == 0
    with pytest.raises(SystemExit):
        parse_args(ServeArgs, ["--max_stored_responses", "-1"])
    running = Running(max_stored_responses=0, max_len=64)
    try:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            made = respond(client)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(made.id)
    finally:
        running.close()


def test_pages_end_even_if_ids_repeat():
    items = [{"id": name} for name in "abab"]
    page = page_of(items, 1, "asc", "a")
    assert page["data"] == [{"id": "b"}] and not page["has_more"]
    assert page_of([], 20, "desc", None)["first_id"] is None


def test_the_oldest_turns_are_left_out(server, client):
    turns = [
        message
        for i in range(40)
        for message in (
            {"role": "user", "content": f"Question number {i}, with some words."},
            {"role": "assistant", "content": f"Answer {i}."},
        )
    ]
    last = {"role": "user", "content": "And now?"}
    options = dict(input=[*turns, last], instructions="Be brief.")
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **options)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"
    cut = respond(client, truncation="auto", **options)
    assert cut.usage.input_tokens <= server.chat.max_len - 8
    system = {"role": "system", "content": "Be brief."}
    lengths = [
        chat(client, messages=[system, *turns[start:], last], max_tokens=1).usage.prompt_tokens
        for start in range(60, 80, 2)
    ]
    assert cut.usage.input_tokens >= max(lengths)  # no more than has to go
    short = respond(client, truncation="auto")
    assert short.usage.input_tokens == respond(client).usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="512 holds"):
        respond(client, truncation="auto", input="word " * 600)
