"""The completions to ask a teacher for, from rows with prompts."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from dataset.chat.format import check_conversation
from dataset.files.jsonl import find_shards, in_fraction, read_rows


class Job(NamedTuple):
    """One completion to ask for."""

    where: str  # file:line of its row
    row: dict
    messages: list[dict]  # before the completion
    sample: int  # number among the samples

    @property
    def key(self) -> str:
        """Identifies this completion among all others, also in the next process."""
        return f"{self.sample}:{json.dumps(self.messages, sort_keys=True)}"

    def seed(self, seed: int) -> int:
        """The seed of this completion."""
        digest = hashlib.blake2b(f"{seed}:{self.key}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1


class Completion(NamedTuple):
    """A teacher's message, and how it ended."""

    message: dict
    finish_reason: str  # stop, tool_calls, length, ..., or refused
    why: str = ""  # the reason of a refusal


def read_jobs(paths: Sequence[str], num_samples: int) -> tuple[list[Job], int]:
    """(all Jobs of the files, number of left-out rows, which repeat a prompt)."""
    jobs, seen, repeated = [], set(), 0
    for path, fraction in find_shards(paths):
        for line_no, row in read_rows(path):
            if not in_fraction(line_no, fraction):
                continue
            where = f"{path}:{line_no}"
            try:
                messages = prompt_of(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            samples = [Job(where, row, messages, sample) for sample in range(num_samples)]
            if samples[0].key in seen:
                repeated += 1
            else:
                seen.add(samples[0].key)
                jobs += samples
    return jobs, repeated


def prompt_of(row: dict) -> list[dict]:
    """The messages that the teacher is to answer. ValueError if there are none."""
    if "prompt" not in row and "conversations" not in row:
        raise ValueError(f'neither "prompt" nor "conversations" among the keys {list(row)}.')
    messages = row.get("conversations", [{"role": "user", "content": row.get("prompt")}])
    check_conversation(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            "there is nothing to answer: before the last assistant message must be one of a user "
            "or a tool."
        )
    return messages
