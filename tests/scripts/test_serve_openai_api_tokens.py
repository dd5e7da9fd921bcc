"""/tokenize, /detokenize and /apply-template, as vLLM's and llama.cpp's clients call them."""

import httpx
import pytest

from dataset.chat.format import encode_prompt
from tests.helpers.served import HI, Running, chat, refused

TEXT = "Hello 世界 <|im_end|> \U0001f600"
LAMP = {"type": "function", "function": {"name": "set_lamp", "parameters": {"type": "object"}}}


def post(server, path, **body):
    return httpx.post(server.url + path, json=body, timeout=60)


def ask(server, path, **body):
    reply = post(server, path, **body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_texts_as_vllm_asks(server, client):
    own = server.chat.tokenizer(TEXT).input_ids
    got = ask(server, "/tokenize", model="base", prompt=TEXT)
    assert got == {
        "count": len(own) + 1,
        "max_model_len": 512,
        "tokens": [0, *own],
        "token_strs": None,
    }
    usage = client.completions.create(model="base", prompt=TEXT, max_tokens=1).usage
    assert usage.prompt_tokens == got["count"]
    bare = ask(server, "/tokenize", prompt=TEXT, add_special_tokens=False, return_token_strs=True)
    assert bare["tokens"] == own
    assert bare["token_strs"] == server.chat.tokenizer.convert_ids_to_tokens(own)
    assert ask(server, "/tokenize", prompt="<|im_end|>x")["tokens"][0] == 2


def test_texts_as_llama_cpp_asks(server):
    own = server.chat.tokenizer(TEXT).input_ids
    assert ask(server, "/tokenize", content=TEXT)["tokens"] == own
    assert ask(server, "/tokenize", content=TEXT, add_special=True)["tokens"] == [0, *own]
    plain = ask(server, "/tokenize", content=TEXT, parse_special=False)["tokens"]
    assert 2 in own and 2 not in plain
    pieces = ask(server, "/tokenize", content=TEXT, with_pieces=True)["tokens"]
    assert [one["id"] for one in pieces] == own
    spelled = b"".join(
        bytes(one["piece"]) if isinstance(one["piece"], list) else one["piece"].encode()
        for one in pieces
    )
    assert spelled.decode() == TEXT
    assert ask(server, "/tokenize", content="")["tokens"] == []


def test_tokens_back_to_text(server):
    for ids in (server.chat.tokenizer(TEXT).input_ids, [0, 1, 2], []):
        text = server.chat.tokenizer.decode(ids)
        got = ask(server, "/detokenize", model="chat", tokens=ids)
        assert got == {"prompt": text, "content": text}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tools": [LAMP]},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"add_generation_prompt": False},
        {"messages": [*HI, {"role": "assistant", "content": "On"}], "continue_final_message": True},
    ],
    ids=str,
)
def test_messages_have_the_prompt_of_chat(server, client, change):
    got = ask(server, "/tokenize", **{"model": "chat", "messages": HI, **change})
    usage = chat(client, messages=change.get("messages", HI), extra_body=change).usage
    assert got["count"] == usage.prompt_tokens
    text = ask(server, "/apply-template", **{"messages": HI, **change})
    assert text == {"prompt": server.chat.tokenizer.decode(got["tokens"])}


def test_a_prompt_too_long_for_the_model_is_counted(server):
    long = [{"role": "user", "content": "word " * 3000}]
    expected = encode_prompt(server.chat.tokenizer, long)
    assert ask(server, "/tokenize", messages=long)["tokens"] == expected
    assert len(ask(server, "/apply-template", messages=long)["prompt"]) > 15_000


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("/tokenize", {}, "one of prompt"),
        ("/tokenize", {"prompt": "x", "content": "x"}, "one of prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "chat template decides"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "text only"),
        ("/tokenize", {"model": "base", "messages": HI}, "no chat template"),
        ("/detokenize", {"tokens": [6400]}, "no token 6400"),
        ("/detokenize", {"tokens": ["x"]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": HI, "temperature": 9}, "temperature"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_wrong_fields(server, path, body, says):
    error = refused(post(server, path, **body))
    assert says in error["message"] or says in (error["param"] or "")


def test_unknown_models_and_fields(server):
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert refused(post(server, path, model="gpt", **body), 404)["code"] == "model_not_found"
        assert post(server, path, **body, note=1).headers["x-ignored-fields"] == "note"


def test_they_need_the_key():
    running = Running(api_key="secret", max_len=64)
    try:
        for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/responses"):
            refused(post(running, path, prompt="x"), 401)
        key = {"Authorization": "Bearer secret"}
        reply = httpx.post(f"{running.url}/tokenize", json={"prompt": "x"}, headers=key)
        assert reply.status_code == 200
    finally:
        running.close()
