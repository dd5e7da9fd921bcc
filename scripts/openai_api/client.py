"""The other end of the API: what scripts that ask a server have in common.

Messages are ours (dataset/chat/format.py); `openai` is imported where a connection is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from dataset.chat.format import normalize_conversation

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT_URL = "http://127.0.0.1:8000/v1"  # of scripts/serve_openai_api.py


class Reply(NamedTuple):
    """A server's message. calls: [{"id", "type", "function": {"name", "arguments": JSON text}}];
    num_tokens: of the completion, None if the server does not say.
    """

    content: str
    reasoning: str
    calls: list[dict]
    num_tokens: int | None

    def as_text(self) -> str:
        """The completion as our chat template writes it; unreadable arguments stay unreadable."""
        reasoning = f"<think>\n{self.reasoning}\n</think>\n\n" if self.reasoning else ""
        blocks = [self.content] if self.content else []
        for call in self.calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            spelled = f'{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}'
            blocks.append(f"<tool_call>\n{spelled}\n</tool_call>")
        return reasoning + "\n".join(blocks)


@contextmanager
def connected(base_url: str, api_key: str = "") -> Iterator[OpenAI]:
    """A client of the server; api_key: by default that in OPENAI_API_KEY.

    OSError if nobody answers there, ValueError for whatever the server refuses.
    """
    import openai

    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    try:
        with openai.OpenAI(base_url=base_url, api_key=key) as client:
            yield client
    except openai.APIConnectionError as error:
        raise OSError(
            f"no server answers at {base_url}: start one with scripts/serve_openai_api.py"
        ) from error
    except openai.APIError as error:  # of a status, or in the middle of a stream
        raise ValueError(f"{base_url}: {error.message}") from error


def first_model(client: OpenAI) -> str:
    """The name of the first model that the server serves. ValueError if there is none."""
    models = client.models.list().data
    if not models:
        raise ValueError(f"{client.base_url} serves no model")
    return models[0].id


def thinking_options(think: bool | None) -> dict[str, Any]:
    """Options of a request that open or close the reasoning; None leaves it to the model."""
    if think is None:
        return {}
    return {"extra_body": {"chat_template_kwargs": {"enable_thinking": think}}}


def read_whole(completion: Any) -> Reply:
    """The Reply of a completion that came as a whole. ValueError if it has no choices."""
    if not completion.choices:
        raise ValueError("the server gave a response without choices")
    message, calls = completion.choices[0].message, {}
    for i, call in enumerate(message.tool_calls or ()):
        add_part(calls, i, call.id, call.function)
    tokens = completion.usage.completion_tokens if completion.usage else None
    return Reply(message.content or "", reasoning_of(message), list(calls.values()), tokens)


def read_stream(chunks: Iterable[Any], show: bool = True) -> Reply:
    """The Reply that the chunks add up to; show: print it as it comes, reasoning in brackets."""
    content, reasoning, calls, tokens, thinks = "", "", {}, None, False
    for chunk in chunks:
        if getattr(chunk, "usage", None):
            tokens = chunk.usage.completion_tokens
        if not chunk.choices:  # the last chunk, with the usage alone
            continue
        delta = chunk.choices[0].delta
        thought, text = reasoning_of(delta), delta.content or ""
        if show and bool(thought) != thinks and (thought or text):
            print("]\n" if thinks else "[", end="")
            thinks = not thinks
        if show:
            print(thought or text, end="", flush=True)
        content, reasoning = content + text, reasoning + thought
        for part in delta.tool_calls or ():
            index = part.index
            if index is None:  # some servers count nothing: an id begins a call
                index = len(calls) if part.id else max(calls, default=0)
            add_part(calls, index, part.id, part.function)
    if show:
        print("]" if thinks else "")
    return Reply(content, reasoning, [calls[i] for i in sorted(calls)], tokens)


def reasoning_of(message: Any) -> str:
    """The reasoning of a message or delta: an extension of the API, under two names."""
    found = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return found or ""


def add_part(calls: dict[int, dict], index: int, name: str | None, function: Any) -> None:
    """Add a piece of call number `index`, whose id is `name`, to the calls so far."""
    empty = {"id": name or f"call_{index}", "type": "function"}
    call = calls.setdefault(index, {**empty, "function": {"name": "", "arguments": ""}})
    call["function"]["name"] += function.name or ""
    call["function"]["arguments"] += function.arguments or ""


def as_request(messages: list[dict]) -> dict[str, list]:
    """Our messages for the API: {"messages", "tools" if any}; calls and results get ids."""
    messages, _ = normalize_conversation(messages)
    sent, tools, waiting = [], [], []
    for i, message in enumerate(messages):
        one = {"role": message["role"], "content": message.get("content", "")}
        if message.get("tools"):
            tools = as_tools(message["tools"])
        if message.get("tool_calls"):
            calls = [as_call(call.get("function", call)) for call in message["tool_calls"]]
            waiting = [f"call_{i}_{n}" for n in range(len(calls))]
            one["tool_calls"] = [{"id": name, **call} for name, call in zip(waiting, calls)]
        if message["role"] == "tool":
            one["tool_call_id"] = waiting.pop(0) if waiting else "call"
        if one["content"] or message["role"] != "system":
            sent.append(one)
    return {"messages": sent, "tools": tools} if tools else {"messages": sent}


def as_tools(schemas: list[dict | str]) -> list[dict]:
    """Schemas, also as JSON text or without their wrapper, in the API's form."""
    schemas = [json.loads(one) if isinstance(one, str) else one for one in schemas]
    return [one if "function" in one else {"type": "function", "function": one} for one in schemas]


def as_call(function: dict) -> dict:
    """A call in the API's form, without its id; the arguments become JSON text."""
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
