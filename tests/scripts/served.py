"""A real server on a free port of this machine, in a thread, with small networks of random weights."""

import asyncio
import threading
import time
from pathlib import Path

import torch
import uvicorn
from transformers import AutoTokenizer

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.openai_api.application import build_app
from scripts.openai_api.model_pool import Limits, ServedModel
from scripts.serve_openai_api import Server

ROOT = Path(__file__).resolve().parents[2]


def small_network(seed=0):
    """(model, tokenizer): it writes nonsense, and another one for every seed."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                               intermediate_size=32, initializer_range=0.5))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model.eval(), tokenizer


class Running:
    """A server with a model "chat" and one without template, "base"."""

    def __init__(self, max_batch_size=4, max_queue=300, max_len=512, **options):
        limits = Limits(max_batch_size, max_queue)
        self.models = {}
        for seed, name in enumerate(("chat", "base")):
            model, tokenizer = small_network(seed)
            if name == "base":
                tokenizer.chat_template = None
            self.models[name] = ServedModel(name, model, tokenizer, limits, max_len=max_len)
        self.app = build_app(self.models, **options)
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")
        self.server = Server(config, self.app.state.gate)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def chat(self):
        return self.models["chat"]

    def counts(self):
        """(running, waiting, in flight) of "chat", as the engine and the server see it."""
        return self.chat.thread.num_running, self.chat.thread.num_waiting, self.chat.in_flight

    def close(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        for served in self.models.values():
            served.thread.close(0)


def wait_until(condition, seconds=10):
    """Wait for a condition; an assertion fails if it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this should have come true by now"
        time.sleep(0.005)
