"""Prompts for reinforcement learning: conversations that the model continues, and the values that
check its completion.

A row is {"conversations": [..., {"role": "user", ...}], "answer": "42"} or with "gt": [...]; other
keys stay in the row, for the rewards. Tools stand on the system message. {"question": "...",
"answer": "42"} is a conversation of one message. A last message of the assistant, in some public
files a placeholder, is left out: the model writes it. Numbers in "gt" become texts.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.chat.format import check_conversation, encode_prompt
from dataset.chat.spellings import read_messages
from dataset.files.hashes import fingerprint
from dataset.files.jsonl import find_shards, in_fraction, iter_lines, parse_row
from dataset.token_dataset import check_no_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataset:
    """Rows and their prompts as token ids, in memory: `rows[i]` a dict, `prompts[i]` a list of ids.

    max_prompt_len: rows with longer prompts are left out, and counted. enable_thinking: see
    `encode_prompt`. check(row): a ValueError "what is wrong. fix" for other faults of a row.
    `report` counts the rows by their fate, `fingerprint` names the content. ValueError
    `path:line: what is wrong. fix` at a faulty row, unless bad_rows is "skip"; and if nothing is
    left.
    """

    def __init__(
        self,
        data_path: str | Path | list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_len: int,
        *,
        bad_rows: str = "stop",
        enable_thinking: bool | None = None,
        check: Callable[[dict], None] = lambda row: None,
    ):
        self.rows, self.prompts, self.max_prompt_len = [], [], max_prompt_len
        num_read, num_answered, left_out = 0, 0, {"skipped": [], "too long": []}
        for path, fraction in find_shards(data_path):
            for line_no, line in iter_lines(path):
                if not in_fraction(line_no, fraction):
                    continue
                num_read, where = num_read + 1, f"{path}:{line_no}"
                try:
                    row, is_answered = prompt_row(parse_row(line))
                    check(row)
                except ValueError as error:
                    if bad_rows == "stop":
                        raise ValueError(f"{where}: {error}") from error
                    left_out["skipped"].append(where)
                    continue
                messages = row["conversations"]
                ids = encode_prompt(tokenizer, messages, enable_thinking=enable_thinking)
                if len(ids) > max_prompt_len:
                    left_out["too long"].append(where)
                    continue
                num_answered += is_answered
                self.rows.append(row)
                self.prompts.append(ids)
        self.report = (
            f"rows: {num_read:,} read, {len(self.rows):,} used, {len(left_out['skipped']):,} "
            f"skipped, {len(left_out['too long']):,} with a prompt above {max_prompt_len} tokens"
        )
        if num_answered:
            self.report += f"\nwithout their last answer, which the model writes: {num_answered:,}"
        for kind, places in left_out.items():
            if places:
                more = f"; and {len(places) - 3:,} more" if len(places) > 3 else ""
                self.report += f"\n{kind}: {'; '.join(places[:3])}{more}"
        if not self.rows:
            raise ValueError(
                f"no prompt is left.\n{self.report}\nGive other rows, or more room for the prompt."
            )
        self.fingerprint = fingerprint(
            rows=self.rows, prompts=hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        )

    def __len__(self) -> int:
        return len(self.rows)

    def held_out_split(
        self, ratio: float, seed: int = 0, max_rows: int | None = None
    ) -> tuple[PromptDataset, PromptDataset]:
        """(training view, held-out view): `ratio` of the prompts, at most `max_rows`, by hash."""
        draws = [hashlib.sha256(f"{seed}:{ids}".encode()).digest() for ids in self.prompts]
        unique = sorted(set(draws))
        if len(unique) < 2:
            raise ValueError(
                "one prompt cannot be split. Give more rows, a validation file of its own, or "
                "--val_ratio 0."
            )
        count = min(max(1, round(ratio * len(unique))), len(unique) - 1, max_rows or len(unique))
        held_out = np.array([draw <= unique[count - 1] for draw in draws])
        name = f"{ratio}:{seed}:{max_rows}"
        return self.view(~held_out, f"train:{name}"), self.view(held_out, f"held_out:{name}")

    def view(self, keep: np.ndarray, name: str) -> PromptDataset:
        """The rows where a bool array is true, as a dataset of that name."""
        view = copy.copy(self)
        view.rows, view.prompts = (
            list(compress(self.rows, keep)),
            list(compress(self.prompts, keep)),
        )
        view.fingerprint = fingerprint(whole=self.fingerprint, view=name)
        return view


def prompt_row(row: dict) -> tuple[dict, bool]:
    """(the row with its conversation up to where the model writes, whether it had a last answer).

    ValueError "what is wrong. fix" unless the assistant can continue the conversation.
    """
    if "conversations" not in row and isinstance(row.get("question"), str):
        row = {"conversations": [{"role": "user", "content": row["question"]}], **row}
    if "conversations" not in row:
        raise ValueError(
            f'no "conversations" and no "question" among the keys {list(row)}. A row is '
            '{"question": "...", "answer": "..."} or {"conversations": [{"role": "user", '
            '"content": "..."}], "answer": "..."}.'
        )
    check_no_tools(row)
    messages = row["conversations"]
    is_answered = has_answer(messages)
    messages = read_messages(messages[:-1] if is_answered else messages)
    if messages or not is_answered:
        check_conversation(messages)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("no question at the end. End with one of the user.")
    row = {**row, "conversations": messages}
    if isinstance(row.get("gt"), str):
        row["gt"] = [row["gt"]]
    if isinstance(row.get("gt"), list):
        row["gt"] = [number_text(x) if type(x) in (int, float) else x for x in row["gt"]]
    return row, is_answered


def number_text(number: float) -> str:
    """A number as texts have it, without an exponent."""
    return format(Decimal(repr(number)), "f")


def has_answer(messages: Any) -> bool:
    """Whether the last message is the assistant's, be its content a text, empty or null."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


class PromptSteps:
    """The steps of a run: item `step` is the list of the numbers of its prompts, the same on every
    rank.

    `epochs` passes over the prompts, each in an order from (seed, epoch) alone; a step may hold the
    end of one and the beginning of the next. max_steps: so many steps instead.
    """

    def __init__(
        self, num_rows: int, num_prompts: int, seed: int, epochs: int, max_steps: int | None = None
    ):
        self.num_rows, self.num_prompts, self.seed = num_rows, num_prompts, seed
        self.num_steps = (
            max(1, num_rows * epochs // num_prompts) if max_steps is None else max_steps
        )

    def __len__(self) -> int:
        return self.num_steps

    def describe(self) -> str:
        """The size of a step, for the user."""
        return f"{self.num_prompts} prompts each"

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        places = range(step * self.num_prompts, (step + 1) * self.num_prompts)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            for epoch in {place // self.num_rows for place in places}
        }
        return [int(orders[place // self.num_rows][place % self.num_rows]) for place in places]
