"""Datasets for the stages that learn from text: pretraining, supervised fine-tuning, reasoning.

Look at the sequences of a stage as text, with the trained tokens in colour:

    python dataset/lm_dataset.py --inspect my_data.jsonl --rows 3
"""

from __future__ import annotations

import random
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.chat.format import encode_conversation, normalize_conversation, plain_encoder
from dataset.token_cache import Report
from dataset.token_dataset import RowEncoder, TokenDataset, TokenSequence, check_no_tools

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
        self.note_special(text)
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

    The template leaves out the reasoning of all turns but the last (in the report: lost thoughts).
    With keep_thoughts a row that has such becomes a sequence for each turn, with that turn's
    reasoning, as the model meets it. last_turn_only: earlier answers are not learned.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        bad_rows: str = "stop",
        system_prompt_ratio: float = 0.0,
        empty_think_ratio: float = 0.0,
        seed: int = 0,
        keep_thoughts: bool = False,
        last_turn_only: bool = False,
    ):
        """Many arguments: all but the first three are the dataset's options, given by name."""
        _check_ratios(system_prompt_ratio=system_prompt_ratio, empty_think_ratio=empty_think_ratio)
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.system_prompt_ratio, self.empty_think_ratio = system_prompt_ratio, empty_think_ratio
        self.seed = seed
        self.keep_thoughts, self.last_turn_only = keep_thoughts, last_turn_only

    def options(self) -> dict:
        return {
            "system_prompt_share": self.system_prompt_ratio,
            "empty_think_share": self.empty_think_ratio,
            "seed": self.seed,
            "prompts": SYSTEM_PROMPTS,
            **self.turn_options(),
        }

    def turn_options(self) -> dict:
        """The options about turns, if they are set: older caches do not name them."""
        both = {"keep_thoughts": self.keep_thoughts, "last_turn_only": self.last_turn_only}
        return {name: True for name, value in both.items() if value}

    def encode_row(
        self, row: dict, where: str, draw_key: int, report: Report
    ) -> list[TokenSequence]:
        if "conversations" not in row:
            raise ValueError(
                f'no "conversations" among the keys {list(row)}. An SFT row is {{"conversations": '
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
                "`python dataset/prepare_data.py convert` makes it of other formats."
            )
        check_no_tools(row)
        messages = self.augment(self.read(row["conversations"]), draw_key)
        conversations = self.conversations(messages)
        if len(conversations) == 1 and any(map(_thinks, messages[: _last_question(messages)])):
            self.notes["lost_thoughts"] = ""
        sequences, cut = [], False
        for conversation in conversations:
            input_ids, is_target = encode_conversation(self.tokenizer, conversation)
            cut |= len(input_ids) > self.max_seq_len
            input_ids = np.array(input_ids[: self.max_seq_len], dtype=self.id_dtype)
            is_target = np.array(is_target[: self.max_seq_len])
            is_target[0] = False
            if is_target.any():
                sequences.append((input_ids, is_target))
        if not sequences:
            report.note("no_target", where)
        elif cut:
            report.note("cut", where)
        return sequences

    def conversations(self, messages: list[dict]) -> list[list[dict]]:
        """The conversations to encode of one row: one, or with keep_thoughts one for each turn."""
        last = _last_question(messages)
        if self.last_turn_only:
            return [[*map(_untrained, messages[:last]), *messages[last:]]]
        if not self.keep_thoughts or not any(map(_thinks, messages[:last])):
            return [messages]
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        # what stands before the first question is learned with the first turn
        return [
            [*map(_untrained, messages[:start]), *messages[start:end]]
            for start, end in pairwise([0, *questions[1:], len(messages)])
        ]

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
        **turns: bool,
    ):
        """Many arguments: all but the first three are the dataset's options, given by name."""
        _check_ratios(direct_ratio=direct_ratio)
        super().__init__(
            tokenizer,
            max_seq_len,
            bad_rows,
            empty_think_ratio=empty_think_ratio,
            seed=seed,
            **turns,
        )
        self.direct_ratio = direct_ratio

    def options(self) -> dict:
        return {
            "direct_share": self.direct_ratio,
            "empty_think_share": self.empty_think_ratio,
            "seed": self.seed,
            **self.turn_options(),
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


def _last_question(messages: list[dict]) -> int:
    return max((i for i, one in enumerate(messages) if one["role"] == "user"), default=0)


def _untrained(message: dict) -> dict:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _thinks(message: dict) -> bool:
    return bool((message.get("reasoning_content") or "").strip())


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
