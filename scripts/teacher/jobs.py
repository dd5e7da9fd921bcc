"""The completions to ask a teacher for, from rows with prompts."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from dataset.chat.format import check_conversation
from dataset.files.jsonl import find_shards, in_fraction, read_rows


class Job(NamedTuple):
    """One completion to ask for: where its row stands, the row, the messages before the completion,
    its number among the samples.
    """

    where: str
    row: dict
    messages: list[dict]
    sample: int

    @property
    def key(self) -> str:
        """Identifies this completion among all others, also in the next process."""
        return f"{self.sample}:{json.dumps(self.messages, sort_keys=True)}"

    def seed(self, seed: int) -> int:
        """The seed of this completion."""
        digest = hashlib.blake2b(f"{seed}:{self.key}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1


class Completion(NamedTuple):
    """A teacher's message, and how it ended: stop, tool_calls, length, ..., or refused because of
    `why`.
    """

    message: dict
    finish_reason: str
    why: str = ""


def read_jobs(paths: Sequence[str], num_samples: int) -> tuple[list[Job], int]:
    """(all Jobs of the files, how many rows repeat a prompt and are left out); ValueError
    "file:line: fault".
    """
    jobs, seen, repeated = [], set(), 0
    for path, fraction in find_shards(paths):
        for line_no, row in read_rows(path):
            if not in_fraction(line_no, fraction):
                continue
            try:
                messages = prompt_of(row)
            except ValueError as error:
                raise ValueError(f"{path}:{line_no}: {error}") from error
            where = f"{path}:{line_no}"
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
