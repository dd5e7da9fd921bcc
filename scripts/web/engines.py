"""Checkpoints that are loaded to be talked to: one engine each, shared by all who look at the page."""

import os
import threading
from dataclasses import dataclass

import streamlit as st
import torch
from transformers import AutoTokenizer

from dataset.chat_format import encode_prompt
from model.engine import Engine
from model.engine_thread import EngineThread
from model.model_lora import merge_adapter
from model.model_minimind import MiniMindForCausalLM
from trainer.run import choose_device, choose_dtype
from trainer.weights import check_vocabulary, take_template

MOST_LOADED = 3  # the one that was used longest ago makes room
TOGETHER = 4  # answers that an engine writes side by side; others wait
if "OMP_NUM_THREADS" not in os.environ:  # a core for the page and the browser: threads that wait for a busy core cost most
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))


@dataclass
class Loaded:
    """A checkpoint in memory; `engine` (an EngineThread) writes."""

    name: str
    engine: EngineThread
    tokenizer: object
    chats: bool

    @property
    def max_len(self):
        """Tokens of prompt and answer together, at most."""
        return self.engine.engine.max_len

    def encode(self, messages, tools, thinking):
        """Token ids of a conversation; a checkpoint that does not chat sees the last message as the beginning of a text."""
        if self.chats:
            return encode_prompt(self.tokenizer, messages, tools, thinking)
        text = messages[-1]["content"]
        return [self.tokenizer.pad_token_id, *self.tokenizer(text).input_ids]  # <|endoftext|> begins a document


def get(run, base, args):
    """The Loaded checkpoint of a RunFolder; `base` is the checkpoint folder an adapter is for, None otherwise.

    ValueError or OSError if it cannot be read.
    """
    folder, adapter = (base, run.path) if run.kind == "adapter" else (run.path, None)
    return _load(run.name, str(folder), adapter and str(adapter), run.stamp, args.device, args.dtype, args.int8, args.max_len)


def _close(loaded):
    """Let the answers under way end, without making anyone wait for that."""
    threading.Thread(target=loaded.engine.close, args=(60,), daemon=True).start()


@st.cache_resource(max_entries=MOST_LOADED, show_spinner=False, on_release=_close)
def _load(name, folder, adapter, stamp, device, dtype, int8, max_len):
    model = MiniMindForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_vocabulary(model, tokenizer, folder)
    if adapter:
        merge_adapter(model, adapter)
        take_template(tokenizer, [adapter])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    device = choose_device(device)
    engine = Engine(model.to(device).eval(), tokenizer, TOGETHER, max_len, choose_dtype(dtype, device), int8)
    return Loaded(name, EngineThread(engine), tokenizer, bool(tokenizer.chat_template))
