"""A real server in a thread, on a free port of this machine, with small random networks."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import uvicorn
from transformers import PreTrainedTokenizerBase

from model.model_minimind import MiniMindForCausalLM
from scripts.openai_api.application import build_app
from scripts.openai_api.model_pool import ServedModel
from scripts.openai_api.server import Server
from tests.helpers.checkpoints import load_tokenizer, random_network

if TYPE_CHECKING:
    import httpx
    import openai


def small_network(seed: int = 0) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """A network that writes nonsense, of another kind for every seed, and its tokenizer."""
    shape = dict(num_hidden_layers=1, intermediate_size=32, initializer_range=0.5)
    model, tokenizer = random_network(seed, **shape), load_tokenizer()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model.eval(), tokenizer


class Running:
    """A server with a model "chat" and one without template, "base"."""

    def __init__(self, max_batch_size=4, max_queue=300, max_len=512, **options):
        self.models, engine = {}, dict(max_batch_size=max_batch_size, max_len=max_len)
        for seed, name in enumerate(("chat", "base")):
            model, tokenizer = small_network(seed)
            if name == "base":
                tokenizer.chat_template = None
            self.models[name] = ServedModel(name, model, tokenizer, max_queue, **engine)
        self.app = build_app(self.models, **options)
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=0,
            log_level="warning",
            access_log=False,
            lifespan="off",
        )
        self.server = Server(config, self.app.state.gate)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def chat(self) -> ServedModel:
        return self.models["chat"]

    def counts(self) -> tuple[int, int, int]:
        """(running, waiting, in flight) of "chat", as the engine and the server see it."""
        return self.chat.thread.num_running, self.chat.thread.num_waiting, self.chat.in_flight

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        for served in self.models.values():
            served.thread.close(0)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition; an assertion fails if it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this should have come true by now"
        time.sleep(0.005)


HI = [{"role": "user", "content": "Hello there"}]


def chat(client: "openai.OpenAI", **options: object) -> object:
    """The server's completion, or its stream with stream=True."""
    return client.chat.completions.create(
        **{"model": "chat", "messages": HI, "max_tokens": 12, "seed": 1, **options}
    )


def joined(chunks: Iterable) -> tuple[dict[int, dict], object]:
    """The sum of a chat stream, {index: {"content", "reasoning", "calls", "reason", "tokens",
    "roles"}}, and the usage.
    """
    out, usage = {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            empty = dict(content="", reasoning="", calls={}, reason=None, tokens=[], roles=[])
            one = out.setdefault(choice.index, empty)
            delta = choice.delta
            one["content"] += delta.content or ""
            one["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            one["roles"] += [delta.role] if delta.role else []
            one["tokens"] += choice.logprobs.content if choice.logprobs else []
            assert one["reason"] is None, "nothing may follow the finish_reason"
            one["reason"] = choice.finish_reason
            for part in delta.tool_calls or ():
                call = one["calls"].setdefault(
                    part.index,
                    {"id": part.id, "name": part.function.name, "arguments": [], "type": part.type},
                )
                call["arguments"].append(part.function.arguments)
    return out, usage


def refused(response: "httpx.Response", status: int = 400) -> dict:
    """The error object of a response that must have this status."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and isinstance(body["error"]["type"], str)
    return body["error"]
