"""The server as OpenAI's own client sees it: every field, as a whole and as a stream, and what they
mean.
"""

import asyncio
import json

import httpx
import openai
import pytest
import torch

from dataset.chat.format import encode_prompt
from dataset.chat.reply import parse_reply
from model.sampling import SamplingParams
from tests.helpers.served import HI, chat, joined

THINK_END = 8  # the token </think>


def alone(server, name="chat", messages=HI, thinking=None, prompt=None, **params):
    """What the engine of a model gives for a prompt by itself."""
    served = server.models[name]
    ids = prompt or encode_prompt(served.tokenizer, messages, enable_thinking=thinking)
    outputs = list(served.thread.stream(ids, SamplingParams(**params)))
    return outputs[-1].request


def test_a_whole_reply_is_the_engines_text(server, client):
    reply = chat(client, temperature=0, seed=None)
    request = alone(server, temperature=0, max_tokens=12)
    assert (reply.object, reply.model, len(reply.choices)) == ("chat.completion", "chat", 1)
    choice = reply.choices[0]
    message = parse_reply(request.text, tools=False)
    assert choice.message.role == "assistant" and choice.message.content == message["content"]
    assert (
        choice.finish_reason == request.finish_reason
        and choice.logprobs is None
        and choice.message.tool_calls is None
    )
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        len(request.prompt),
        len(request.sampled),
    )
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole(client):
    for options in ({}, {"temperature": 0}, {"n": 3}, {"max_tokens": 60, "top_k": 3}):
        extra = {"extra_body": {"top_k": options.pop("top_k")}} if "top_k" in options else {}
        whole = chat(client, **options, **extra)
        choices, usage = joined(chat(client, stream=True, **options, **extra))
        assert usage is None
        for choice in whole.choices:
            assert choices[choice.index]["content"] == choice.message.content
            assert choices[choice.index]["reason"] == choice.finish_reason and choices[
                choice.index
            ]["roles"] == ["assistant"]


def test_usage_of_a_stream_comes_last(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            options = dict(model="chat", messages=HI, max_tokens=8, seed=3)
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            chunks = [chunk async for chunk in stream]
            texts = [
                part
                async for part in await client.completions.create(
                    model="base", prompt="x", max_tokens=4, seed=1, stream=True
                )
            ]
            many = await asyncio.gather(
                *(client.chat.completions.create(**options) for _ in range(12))
            )
            return whole, chunks, texts, many

    whole, chunks, texts, many = asyncio.run(ask())
    assert joined(chunks)[0][0]["content"] == whole.choices[0].message.content
    assert {one.choices[0].message.content for one in many} == {
        whole.choices[0].message.content
    }  # whoever is beside it
    assert texts[-1].choices[0].finish_reason


def test_seeds_and_several_choices(server, client):
    texts = [choice.message.content for choice in chat(client, n=3, seed=7).choices]
    assert (
        texts == [chat(client, seed=7 + i).choices[0].message.content for i in range(3)]
        and len(set(texts)) == 3
    )
    assert (
        chat(client, seed=None).choices[0].message.content
        != chat(client, seed=None).choices[0].message.content
    )
    assert (
        texts[0] == parse_reply(alone(server, seed=7, max_tokens=12).text, tools=False)["content"]
    )
    usage = chat(client, n=3, max_tokens=5).usage
    assert (
        usage.prompt_tokens == chat(client).usage.prompt_tokens
        and 3 <= usage.completion_tokens <= 15
    )


@pytest.mark.parametrize(
    "options, params",
    [
        ({"top_p": 0.3}, {"top_p": 0.3}),
        ({"temperature": 0.2}, {"temperature": 0.2}),
        (
            {"presence_penalty": 2, "frequency_penalty": -1.5},
            {"presence_penalty": 2.0, "frequency_penalty": -1.5},
        ),
        ({"extra_body": {"top_k": 2}}, {"top_k": 2}),
        ({"extra_body": {"min_p": 0.5}}, {"min_p": 0.5}),
        ({"extra_body": {"repetition_penalty": 3}}, {"repetition_penalty": 3.0}),
        ({"logit_bias": {"300": 100, "301": 99.5}}, {"logit_bias": {300: 100.0, 301: 99.5}}),
        (
            {"extra_body": {"ignore_eos": True}, "logit_bias": {"2": 100}},
            {"ignore_eos": True, "logit_bias": {2: 100.0}},
        ),
    ],
)
def test_sampling_fields_reach_the_engine(server, client, options, params):
    reply = chat(client, **options)
    request = alone(server, **{"seed": 1, "max_tokens": 12, **params})
    assert reply.choices[0].message.content == parse_reply(request.text, tools=False)["content"]
    assert reply.usage.completion_tokens == len(request.sampled)


def test_stop_texts_end_a_reply_and_are_not_in_it(client):
    text = chat(client, max_tokens=30).choices[0].message.content
    for stop in (text[5:7], [text[9:11], text[5:7]]):
        choice = chat(client, max_tokens=30, stop=stop).choices[0]
        assert text[5:7] not in choice.message.content and text.startswith(choice.message.content)
        assert choice.finish_reason == "stop"
        assert (
            joined(chat(client, max_tokens=30, stop=stop, stream=True))[0][0]["content"]
            == choice.message.content
        )


def test_lengths(server, client):
    assert chat(client, max_tokens=3, extra_body={"ignore_eos": True}).usage.completion_tokens == 3
    assert (
        chat(
            client, max_tokens=9, max_completion_tokens=2, extra_body={"ignore_eos": True}
        ).usage.completion_tokens
        == 2
    )
    reply = chat(client, max_tokens=10**9, extra_body={"ignore_eos": True})
    assert (
        reply.usage.total_tokens == server.chat.max_len
        and reply.choices[0].finish_reason == "length"
    )
    ended = chat(client, logit_bias={"2": 100})
    assert (ended.choices[0].finish_reason, ended.choices[0].message.content) == ("stop", "")


def test_log_probs_of_chat(server, client):
    reply = chat(client, logprobs=True, top_logprobs=3, temperature=0.5)
    tokens = reply.choices[0].logprobs.content
    request = alone(server, seed=1, max_tokens=12, temperature=0.5, logprobs=3)
    assert [one.logprob for one in tokens] == pytest.approx(
        [top[0] for top in request.top][: len(tokens)], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 3 for one in tokens)
    assert b"".join(bytes(one.bytes) for one in tokens).decode("utf-8", "replace") == request.text
    best = tokens[0].top_logprobs
    assert (
        best[0].logprob >= best[1].logprob >= best[2].logprob
        and best[0].logprob >= tokens[0].logprob
    )
    streamed = joined(chat(client, logprobs=True, top_logprobs=3, temperature=0.5, stream=True))[0][
        0
    ]["tokens"]
    assert [one.token for one in streamed] == [one.token for one in tokens]
    assert [one.logprob for one in streamed] == pytest.approx(
        [one.logprob for one in tokens], abs=1e-4
    )
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_thinking_is_switched_and_told_apart(server, client):
    for extra in (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"open_thinking": True}},
        {"reasoning_effort": "high"},
    ):
        reply = chat(client, extra_body=extra)
        request = alone(server, seed=1, max_tokens=12, thinking=True)
        message = parse_reply(request.text, in_reasoning=True, tools=False)
        assert reply.choices[0].message.reasoning_content == message["reasoning_content"]
        assert reply.choices[0].message.content == message["content"]
        assert 0 < reply.usage.completion_tokens_details.reasoning_tokens <= 12
        streamed = joined(chat(client, extra_body=extra, stream=True))[0][0]
        assert (streamed["reasoning"], streamed["content"]) == (
            message["reasoning_content"],
            message["content"],
        )
    for effort in ("none", "minimal"):
        reply = chat(client, reasoning_effort=effort)
        text = alone(server, seed=1, max_tokens=12, thinking=False).text
        assert reply.choices[0].message.content == text and not hasattr(
            reply.choices[0].message, "reasoning_content"
        )
    ended = chat(client, reasoning_effort="low", logit_bias={str(THINK_END): 100}, max_tokens=2)
    assert (
        ended.choices[0].message.content == "</think>"
    )  # the first ended the block, the second is text
    assert ended.usage.completion_tokens_details.reasoning_tokens == 1


def test_messages_of_every_kind(server, client):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        {"role": "user", "content": "And?", "name": "Ann"},
    ]
    reply = chat(client, messages=messages)
    expected = encode_prompt(
        server.chat.tokenizer,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "f", "arguments": {"a": 1}}],
            },
            {"role": "tool", "content": "7"},
            {"role": "user", "content": "And?"},
        ],
    )
    assert reply.usage.prompt_tokens == len(expected)
    compact = json.loads(
        json.dumps(messages).replace('\\"a\\": 1', '\\"a\\":1')
    )  # as from JavaScript
    assert compact != messages
    assert chat(client, messages=compact).usage.prompt_tokens == len(expected)
    again = [*messages, reply.choices[0].message, {"role": "user", "content": "Go on"}]
    assert (
        chat(client, messages=again).choices[0].message.role == "assistant"
    )  # the client's own object can be sent back
    marks = chat(client, messages=[{"role": "user", "content": "<|im_end|>"}]).usage.prompt_tokens
    assert (
        marks > chat(client, messages=[{"role": "user", "content": ""}]).usage.prompt_tokens + 3
    )  # text, not the end of a turn


def test_repeated_beginnings_are_not_computed_again(client):
    messages = [
        {"role": "user", "content": "A beginning that is long enough to be worth keeping. " * 3}
    ]
    first = chat(client, messages=messages)
    second = chat(client, messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    fresh = [{"role": "system", "content": f"Nobody has begun so before. {'word ' * 60}"}, *HI]
    first, second = (chat(client, messages=fresh, n=3).usage for _ in range(2))
    assert (
        first.prompt_tokens_details.cached_tokens < 20
    )  # what all prompts begin with; the first answer's prompt is computed
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1


def test_completions_of_texts_and_of_tokens(server, client):
    tokenizer = server.models["base"].tokenizer
    ids = tokenizer("Once upon").input_ids
    for prompt, own in (
        ("Once upon", [0, *ids]),
        (ids, ids),
        ([ids], ids),
        (["Once upon"], [0, *ids]),
        ("", [0]),
    ):
        reply = client.completions.create(model="base", prompt=prompt, seed=1, max_tokens=6)
        request = alone(server, "base", prompt=own, seed=1, max_tokens=6)
        assert reply.object == "text_completion" and reply.choices[0].text == request.text
        assert reply.usage.prompt_tokens == len(own)
    assert (
        client.completions.create(
            model="base", prompt="x", extra_body={"ignore_eos": True}
        ).usage.completion_tokens
        == 16
    )
    many = client.completions.create(model="base", prompt=["a", "b"], n=2, max_tokens=4, seed=5)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert (
        many.choices[3].text
        == client.completions.create(model="base", prompt="b", max_tokens=4, seed=6).choices[0].text
    )
    parts = {}
    for chunk in client.completions.create(
        model="base", prompt=["a", "b"], n=2, max_tokens=4, seed=5, stream=True
    ):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
    assert parts == {choice.index: choice.text for choice in many.choices}


def test_a_prompt_is_echoed_and_scored(server, client):
    served, text = server.models["base"], "Once upon a time 从前"
    own = served.tokenizer(text).input_ids
    logits = served.engine.model(torch.tensor([[0, *own]])).logits[0].log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(own)]
    for prompt, known in ((text, expected), (own, None)):
        for max_tokens in (0, 1):
            for stream in (False, True):
                got = client.completions.create(
                    model="base",
                    prompt=prompt,
                    echo=True,
                    logprobs=2,
                    max_tokens=max_tokens,
                    temperature=0,
                    stream=stream,
                )
                choice = (list(got) if stream else [got])[0].choices[0]
                scores = choice.logprobs.token_logprobs[: len(own)]
                assert choice.text.startswith(text) and len(choice.logprobs.tokens) >= len(own)
                if known:
                    assert scores == pytest.approx(known, abs=1e-3)
                else:  # nothing stands before the first of the given tokens
                    plain = served.engine.model(torch.tensor([own])).logits[0].log_softmax(-1)
                    assert scores[0] is None and choice.logprobs.top_logprobs[0] is None
                    assert scores[1:] == pytest.approx(
                        [plain[i, token].item() for i, token in enumerate(own[1:])], abs=1e-3
                    )
                places = choice.logprobs.text_offset
                assert places[:2] == [0, len(choice.logprobs.tokens[0])] and places == sorted(
                    places
                )
    reply = client.completions.create(model="base", prompt="Once", echo=True, max_tokens=2, seed=1)
    assert reply.choices[0].logprobs is None and reply.choices[0].text.startswith("Once")


def test_completion_log_probs(server, client):
    reply = client.completions.create(model="base", prompt="Once", logprobs=4, max_tokens=5, seed=2)
    prompt = [0, *server.models["base"].tokenizer("Once").input_ids]
    request = alone(server, "base", prompt=prompt, seed=2, max_tokens=5, logprobs=4)
    probs = reply.choices[0].logprobs
    assert probs.token_logprobs == pytest.approx(
        [top[0] for top in request.top][: len(probs.tokens)], abs=1e-4
    )
    assert all(
        4 <= len(best) <= 5 and token in best
        for token, best in zip(probs.tokens, probs.top_logprobs)
    )


def test_models_health_metrics_and_documents(server, client):
    assert [model.id for model in client.models.list()] == ["chat", "base"]
    assert client.models.retrieve("base").max_model_len == 512
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "failed": []}
    chat(client)
    text = httpx.get(f"{server.url}/metrics").text
    assert (
        'minimind_running{model="chat"} 0.0' in text
        and 'minimind_first_token_seconds_count{model="chat"}' in text
    )
    generated = next(
        line
        for line in text.splitlines()
        if line.startswith('minimind_generated_tokens_total{model="chat"}')
    )
    assert float(generated.split()[-1]) > 0
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == [
        "chat",
        "base",
    ]
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "408", "413", "429", "500", "503"}
    assert httpx.get(f"{server.url}/docs").status_code == 200


def test_json_of_a_stream_is_one_event_per_line(server):
    body = {
        "model": "chat",
        "messages": HI,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert (
        first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        and first["usage"] is None
    )
