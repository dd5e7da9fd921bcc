"""Datasets for the stages that learn from text: pretraining, supervised fine-tuning, reasoning.

Look at the sequences of a stage as text, with the trained tokens in colour:

    python dataset/lm_dataset.py --inspect my_data.jsonl --rows 3
"""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.chat.format import (
    check_conversation,
    encode_conversation,
    normalize_conversation,
    plain_encoder,
)
from dataset.token_cache import Report
from dataset.token_dataset import RowEncoder, TokenDataset, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPTS = {
    "zh": (
        "你是一个乐于助人的助手。",
        "你是一个可靠的助手，回答准确、简洁。",
        "请认真阅读问题，给出清楚的回答。",
        "你是一名友好的助手，不知道的事情会直接说不知道。",
    ),
    "en": (
        "You are a helpful assistant.",
        "You are a reliable assistant. Answer precisely and briefly.",
        "Read the question with care and give a clear answer.",
        "You are a friendly assistant who says so when something is unknown.",
    ),
}


class PretrainEncoder(RowEncoder):
    """`{"text"}` -> the document between two `<|endoftext|>`, in windows of max_seq_len that share
    one token.

    The shared token is the last target of one window and the first input of the next, so that every
    token of a document is a target exactly once.
    """

    stores_targets = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, bad_rows: str = "stop"
    ):
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.plain = plain_encoder(tokenizer)  # a special token's spelling in a document is text
        self.end_token = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode_row(
        self, row: dict, where: str, draw_key: int, report: Report
    ) -> list[TokenSequence]:
        if "text" not in row:
            raise ValueError(
                f'no "text" among the keys {list(row)}. A pretraining row is {{"text": "..."}}.'
            )
        text = row["text"]
        if not isinstance(text, str):
            raise ValueError(f'"text" is of type {type(text).__name__}. Give a string.')
        if not text.strip():
            raise ValueError('"text" is empty. Leave the row out.')
        # fast: without the characters' offsets
        tokens = self.plain.encode_batch_fast([text])[0].ids
        ids = np.array([self.end_token, *tokens, self.end_token], dtype=self.id_dtype)
        step = self.max_seq_len - 1
        windows = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [(window, np.arange(len(window)) > 0) for window in windows]


class SFTEncoder(RowEncoder):
    """`{"conversations"}` -> the rendered conversation; targets are the assistant's tokens.

    `system_prompt_ratio` of the rows without a system message get one of a short list; in
    `empty_think_ratio` of those whose last answer has no reasoning, an empty think block stands
    before it. Both depend on (seed, row) alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        bad_rows: str = "stop",
        system_prompt_ratio: float = 0.0,
        empty_think_ratio: float = 0.0,
        seed: int = 0,
    ):
        _check_ratios(system_prompt_ratio=system_prompt_ratio, empty_think_ratio=empty_think_ratio)
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.system_prompt_ratio, self.empty_think_ratio = system_prompt_ratio, empty_think_ratio
        self.seed = seed

    def options(self) -> dict:
        return {
            "system_prompt_share": self.system_prompt_ratio,
            "empty_think_share": self.empty_think_ratio,
            "seed": self.seed,
            "prompts": SYSTEM_PROMPTS,
        }

    def encode_row(
        self, row: dict, where: str, draw_key: int, report: Report
    ) -> list[TokenSequence]:
        if "conversations" not in row:
            raise ValueError(
                f'no "conversations" among the keys {list(row)}. An SFT row is {{"conversations": '
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
            )
        check_conversation(row["conversations"])
        input_ids, is_target = encode_conversation(
            self.tokenizer, self.augment(row["conversations"], draw_key)
        )
        cut = len(input_ids) > self.max_seq_len
        input_ids = np.array(input_ids[: self.max_seq_len], dtype=self.id_dtype)
        is_target = np.array(is_target[: self.max_seq_len])
        is_target[0] = False
        if not is_target.any():
            report.note("no_target", where)
            return []
        if cut:
            report.note("cut", where)
        return [(input_ids, is_target)]

    def augment(self, messages: list[dict], draw_key: int) -> list[dict]:
        """Return the messages, some with a system prompt or an empty think block put in."""
        draws = random.Random(f"{self.seed}:{draw_key}")
        system, think, which = draws.random(), draws.random(), draws.random()
        has_system = any(message["role"] == "system" for message in messages)
        if system < self.system_prompt_ratio and not has_system:
            first = messages[0].get("content") or ""
            is_chinese = any("\u4e00" <= char <= "\u9fff" for char in first)
            prompts = SYSTEM_PROMPTS["zh" if is_chinese else "en"]
            prompt = {"role": "system", "content": prompts[int(which * len(prompts))]}
            messages = [prompt, *messages]
        last = _last_answer(messages)
        if (
            think < self.empty_think_ratio
            and last is not None
            and not _has_reasoning(messages[last])
        ):
            messages = list(messages)
            messages[last] = {**messages[last], "reasoning_content": ""}
        return messages


class ReasonEncoder(SFTEncoder):
    """A conversation whose last answer comes after its reasoning, or after the empty think block
    that stands for none.

    The sequence of a row with reasoning begins with the ids of `encode_prompt(...,
    enable_thinking=True)`, that of another one with those of enable_thinking=False. `direct_ratio`
    of the rows with reasoning lose it, decided by (seed, row) alone, and `empty_think_ratio` of the
    rows without reasoning get the empty block.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        bad_rows: str = "stop",
        direct_ratio: float = 0.0,
        empty_think_ratio: float = 1.0,
        seed: int = 0,
    ):
        _check_ratios(direct_ratio=direct_ratio)
        super().__init__(tokenizer, max_seq_len, bad_rows, 0.0, empty_think_ratio, seed)
        self.direct_ratio = direct_ratio

    def options(self) -> dict:
        return {
            "direct_share": self.direct_ratio,
            "empty_think_share": self.empty_think_ratio,
            "seed": self.seed,
        }

    def augment(self, messages: list[dict], draw_key: int) -> list[dict]:
        # think blocks inside content become reasoning_content
        messages, _ = normalize_conversation(messages)
        last = _last_answer(messages)
        thinks = last is not None and bool(messages[last].get("reasoning_content", "").strip())
        if thinks and random.Random(f"{self.seed}:{draw_key}:direct").random() < self.direct_ratio:
            messages = [
                {key: value for key, value in message.items() if key != "reasoning_content"}
                for message in messages
            ]
            messages[last]["reasoning_content"] = ""
        return super().augment(messages, draw_key)


def _check_ratios(**ratios: float) -> None:
    for name, ratio in ratios.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name} is {ratio}. Give a ratio from 0 to 1.")


def _last_answer(messages: list[dict]) -> int | None:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers[-1] if answers else None


def _has_reasoning(message: dict) -> bool:
    content = message.get("content") or ""
    return message.get("reasoning_content") is not None or content.startswith("<think>")


class PretrainDataset(TokenDataset):
    """Documents for next-token prediction (see TokenDataset, PretrainEncoder)."""

    encoder_type = PretrainEncoder


class SFTDataset(TokenDataset):
    """Conversations, trained on the assistant's words (see TokenDataset, SFTEncoder)."""

    encoder_type = SFTEncoder


class ReasonDataset(TokenDataset):
    """Conversations, trained on reasoning and words (see TokenDataset, ReasonEncoder)."""

    encoder_type = ReasonEncoder


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("inspect_rows.py")), run_name="__main__")
