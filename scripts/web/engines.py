"""The checkpoints that are loaded: one engine each, shared by all visitors of the page."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat.format import document_start, encode_prompt
from model.engine import Engine
from model.engine_thread import EngineThread
from scripts.checkpoint import ShapeArgs, load_checkpoint
from scripts.web.run_folders import RunFolder
from trainer.runtime.process import choose_device, choose_dtype

MOST_LOADED = 3  # the one that was used longest ago makes room
MAX_BATCH_SIZE = 4  # completions that an engine decodes at once; others wait
# a core for the page and the browser: threads that wait for a busy core cost most
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))


@dataclass
class Loaded:
    """A checkpoint in memory, with the thread of its engine."""

    name: str
    engine: EngineThread
    tokenizer: PreTrainedTokenizerBase
    chats: bool

    @property
    def max_len(self) -> int:
        """Tokens of prompt and completion together, at most."""
        return self.engine.engine.max_len

    def encode(self, messages: list[dict], tools: list | None, thinking: bool | None) -> list[int]:
        """Token ids of a conversation; without a chat template, of its last message alone."""
        if self.chats:
            return encode_prompt(self.tokenizer, messages, tools, thinking)
        ids = self.tokenizer(messages[-1]["content"]).input_ids
        return [*document_start(self.tokenizer), *ids]


def get(run: RunFolder, base: Path | None, args: Any) -> Loaded:
    """The Loaded checkpoint of a RunFolder; `base` is an adapter's checkpoint folder, else None.

    ValueError or OSError if it cannot be read.
    """
    folder, adapter = (base, run.path) if run.kind == "adapter" else (run.path, None)
    settings = (args.device, args.dtype, args.int8, args.max_len)
    return load_cached(run.name, str(folder), adapter and str(adapter), run.stamp, settings, args)


def _close(loaded: Loaded) -> None:
    """Let running completions end, without making anyone wait for that."""
    threading.Thread(target=loaded.engine.close, args=(60,), daemon=True).start()


@st.cache_resource(max_entries=MOST_LOADED, show_spinner=False, on_release=_close)
def load_cached(
    name: str, folder: str, adapter: str | None, stamp: tuple, settings: tuple, _args: Any
) -> Loaded:
    """The Loaded checkpoint; read anew if its `stamp` or the settings have changed."""
    device = choose_device(_args.device)
    model, tokenizer = load_checkpoint(folder, ShapeArgs(), device, [adapter] if adapter else [])
    dtype = choose_dtype(_args.dtype, device)
    engine = Engine(model, tokenizer, MAX_BATCH_SIZE, _args.max_len, dtype, _args.int8)
    return Loaded(name, EngineThread(engine), tokenizer, bool(tokenizer.chat_template))
