"""Prompts for reinforcement learning: rows with a conversation that the model is to go on with, and what checks its answer.

A row is {"conversations": [..., {"role": "user", ...}], "answer": "42"} or with "gt": [...]; what a reward needs beside these
stays in the row. Tools stand on the system message. {"question": "...", "answer": "42"} is a conversation of one message.
"""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np

from dataset.chat_format import check_conversation, encode_prompt
from dataset.jsonl import find_shards, in_share, iter_lines, parse_row
from dataset.lm_dataset import BAD_ROWS
from dataset.token_cache import fingerprint


class PromptDataset:
    """Rows and their prompts as token ids, in memory: `rows[i]` a dict, `prompts[i]` a list of ids.

    max_prompt_len: rows with longer prompts are left out, and counted. enable_thinking: see `encode_prompt`. check(row): a
    ValueError "what is wrong. way out" for what else makes a row faulty. `report` says what became of the rows, `fingerprint`
    names the content. ValueError `path:line: what is wrong. way out` at a faulty row, unless bad_rows is "skip"; and if nothing
    is left.
    """

    def __init__(self, data_path, tokenizer, max_prompt_len: int, *, bad_rows: str = "stop",
                 enable_thinking: bool | None = None, check=None):
        assert bad_rows in BAD_ROWS
        self.rows, self.prompts, self.max_prompt_len = [], [], max_prompt_len
        num_read, skipped, too_long = 0, [], []
        for path, share in find_shards(data_path):
            for line_no, line in iter_lines(path):
                if not in_share(line_no, share):
                    continue
                num_read, where = num_read + 1, f"{path}:{line_no}"
                try:
                    row = with_conversation(parse_row(line))
                    check_prompt_row(row)
                    if check:
                        check(row)
                except ValueError as error:
                    if bad_rows == "stop":
                        raise ValueError(f"{where}: {error}") from error
                    skipped.append(where)
                    continue
                ids = encode_prompt(tokenizer, row["conversations"], enable_thinking=enable_thinking)
                if len(ids) > max_prompt_len:
                    too_long.append(where)
                    continue
                self.rows.append(row)
                self.prompts.append(ids)
        named = "".join(f"\n{kind}: {'; '.join(places[:3])}{f'; and {len(places) - 3:,} more' if len(places) > 3 else ''}"
                        for kind, places in (("skipped", skipped), ("too long", too_long)) if places)
        self.report = (f"rows: {num_read:,} read, {len(self.rows):,} used, {len(skipped):,} skipped, {len(too_long):,} with a "
                       f"prompt above {max_prompt_len} tokens{named}")
        if not self.rows:
            raise ValueError(f"no prompt is left.\n{self.report}\nGive other rows, or more room for the prompt.")
        self.fingerprint = fingerprint(rows=self.rows, prompts=hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def held_out_split(self, share: float, seed: int = 0, max_rows: int | None = None):
        """(training view, held-out view): `share` of the different prompts, at most `max_rows`, by a hash of each."""
        draws = [hashlib.sha256(f"{seed}:{ids}".encode()).digest() for ids in self.prompts]
        unique = sorted(set(draws))
        if len(unique) < 2:
            raise ValueError("one prompt cannot be split. Give more rows, or a validation file of its own.")
        count = min(max(1, round(share * len(unique))), len(unique) - 1, max_rows or len(unique))
        held_out = np.array([draw <= unique[count - 1] for draw in draws])
        name = f"{share}:{seed}:{max_rows}"
        return self.view(~held_out, f"train:{name}"), self.view(held_out, f"held_out:{name}")

    def view(self, keep: np.ndarray, name: str):
        """The rows that a bool array marks, as a dataset of that name."""
        view = copy.copy(self)
        view.rows, view.prompts = ([x for x, kept in zip(column, keep) if kept] for column in (self.rows, self.prompts))
        view.fingerprint = fingerprint(whole=self.fingerprint, view=name)
        return view


def with_conversation(row: dict) -> dict:
    """The row with the conversation that a bare question stands for."""
    if "conversations" in row or not isinstance(row.get("question"), str):
        return row
    return {"conversations": [{"role": "user", "content": row["question"]}], **row}


def check_prompt_row(row: dict) -> None:
    """ValueError "what is wrong. way out" unless the row has a conversation that the assistant is to go on with."""
    if "conversations" not in row:
        raise ValueError(f'no "conversations" and no "question" among the keys {list(row)}. A row is {{"question": "...", '
                         '"answer": "..."} or {"conversations": [{"role": "user", "content": "..."}], "answer": "..."}.')
    check_conversation(row["conversations"])
    last = row["conversations"][-1]["role"]
    if last not in ("user", "tool"):
        raise ValueError(f"the last message is of role {last}. End with the user's question: the model writes the answer.")


class PromptSteps:
    """The steps of a run: item `step` is the list of the numbers of its prompts, the same on every rank.

    `epochs` passes over the prompts, each in an order from (seed, epoch) alone; a step may hold the end of one and the
    beginning of the next. max_steps: so many steps instead.
    """

    def __init__(self, num_rows: int, num_prompts: int, seed: int, epochs: int, max_steps: int | None = None):
        self.num_rows, self.num_prompts, self.seed = num_rows, num_prompts, seed
        self.num_steps = max(1, num_rows * epochs // num_prompts) if max_steps is None else max_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        places = range(step * self.num_prompts, (step + 1) * self.num_prompts)
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
                  for epoch in {place // self.num_rows for place in places}}
        return [int(orders[place // self.num_rows][place % self.num_rows]) for place in places]
