"""Where the prompt of a chat ends: in a new message of the assistant, in the last, or after it."""

import httpx
import openai
import pytest

from dataset.chat.format import encode_prompt
from dataset.chat.reply import parse_reply
from model.sampling import SamplingParams
from tests.helpers.served import HI, chat, joined, refused

BEGUN = [*HI, {"role": "assistant", "content": "Hello, I counted 3 + 4 = "}]
CONTINUE = {"continue_final_message": True}
COUNT = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "count", "arguments": "{}"}}
END_THINK, CALL_TOKEN = 8, 3


def rendered(server, messages, tools=None, **options):
    """The prompt as transformers makes it."""
    tokenizer = server.chat.tokenizer
    return tokenizer.apply_chat_template(messages, tools, return_dict=False, **options)


def engine_text(server, ids, **params):
    """What the engine writes after a prompt by itself."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **params})
    return list(server.chat.thread.stream(ids, params))[-1].request.text


def ask(client, messages=BEGUN, extra=CONTINUE, **options):
    """A choice as a whole, after its stream was the same."""
    options = dict(messages=messages, temperature=0, seed=None, extra_body=extra, **options)
    whole = chat(client, **options)
    choice, (streamed, _) = whole.choices[0], joined(chat(client, stream=True, **options))
    assert streamed[0]["content"] == choice.message.content
    assert streamed[0]["reason"] == choice.finish_reason
    return choice, whole.usage


@pytest.mark.parametrize("extra", [{}, {"add_generation_prompt": False}], ids=str)
def test_the_text_of_the_last_message_is_continued(server, client, extra):
    ids = rendered(server, BEGUN, continue_final_message=True)
    choice, usage = ask(client, extra=CONTINUE | extra)
    assert choice.message.content == engine_text(server, ids)
    assert usage.prompt_tokens == len(ids) and choice.message.role == "assistant"
    parts = [{"type": "text", "text": "Hello, I counted "}, {"type": "text", "text": "3 + 4 = "}]
    in_parts = [*HI, {"role": "assistant", "content": parts}]
    assert ask(client, in_parts)[0] == choice
    assert ask(client, reasoning_effort="high")[0] == choice  # no new message that would think


def test_without_it_a_new_message_begins(server, client):
    ids = encode_prompt(server.chat.tokenizer, BEGUN)
    for extra in ({}, {"continue_final_message": False}, {"add_generation_prompt": True}):
        choice, usage = ask(client, extra=extra)
        assert usage.prompt_tokens == len(ids)
        assert choice.message.content == parse_reply(engine_text(server, ids))["content"]


def test_a_prompt_without_generation_prompt_ends_after_the_last_message(server, client):
    for messages in (HI, BEGUN):
        ids = rendered(server, messages, add_generation_prompt=False)
        choice, usage = ask(client, messages, {"add_generation_prompt": False})
        assert usage.prompt_tokens == len(ids)
        assert choice.message.content == parse_reply(engine_text(server, ids))["content"]


def test_line_breaks_and_marks_of_a_continuation_are_text(server, client):
    for token, text in ((230, "\n"), (7, "<think>")):
        bias = {str(token): 100}
        choice, _ = ask(client, logit_bias=bias, max_tokens=3)
        assert choice.message.content == text * 3
        assert not hasattr(choice.message, "reasoning_content")


def test_reasoning_that_has_begun_is_continued(client):
    begun = [*HI, {"role": "assistant", "content": "<think>\nThey said"}]
    options = dict(messages=begun, extra_body=CONTINUE, max_tokens=2, temperature=0)
    thought = chat(client, **options, logit_bias={str(END_THINK): -100}).choices[0].message
    assert thought.reasoning_content and thought.content == ""
    ended = chat(client, **options, logit_bias={str(END_THINK): 100}).choices[0].message
    assert not hasattr(ended, "reasoning_content")
    assert ended.content == "</think>"  # the first ended the block, the second is text
    reasoned = [*HI, {"role": "assistant", "content": "", "reasoning_content": "They said hi."}]
    usage = chat(client, **{**options, "messages": reasoned}).usage
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_an_optional_call_may_follow_the_text(server, client):
    bias = {str(CALL_TOKEN): 100}
    options = dict(messages=BEGUN, tools=[COUNT], extra_body=CONTINUE, logit_bias=bias)
    reply = chat(client, **options, max_tokens=60, parallel_tool_calls=False, seed=2)
    assert reply.choices[0].message.tool_calls[0].function.name == "count"
    ids = rendered(server, BEGUN, [COUNT], continue_final_message=True)
    assert reply.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"add_generation_prompt": True}, "set one of them to false"),
        ({"messages": HI}, "role 'user'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role 'system'"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "x", "tool_calls": [CALL]}]},
            "ends with tool_calls",
        ),
        ({"tools": [COUNT], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [COUNT], "tool_choice": {"type": "function", "function": {"name": "count"}}},
            "tool_choice",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"continue_final_message": "content"}, "boolean"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_contradictions(server, change, says):
    body = {"model": "chat", "messages": BEGUN, "max_tokens": 3, **CONTINUE, **change}
    error = refused(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60))
    assert says in error["message"]


def test_the_official_client_raises_its_error(client):
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        chat(client, extra_body=CONTINUE)
