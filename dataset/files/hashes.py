"""Hashes that name contents: of values, files, tokenizers, and of many numbers at once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.files.jsonl import check_exists
from model.files import file_sha256, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# nanoseconds after which a file is no longer being written: clocks of file systems are coarse
SETTLED = 2e9


def fingerprint(**parts: object) -> str:
    """SHA-256, in hex, of named values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash64(data: bytes) -> int:
    """The first 64 bits of a BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def scramble(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values one to one (finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def remembered_sha256(path: str | Path, memory: Path | None) -> str:
    """SHA-256, in hex, of a file's bytes, remembered in the folder `memory` for as long as the file
    has its path, size and times. ValueError if there is no such file.
    """
    path = Path(path)
    check_exists(path)
    state = path.stat()
    times = [state.st_mtime_ns, state.st_ctime_ns]
    record = memory and memory / fingerprint(
        path=str(path.resolve()), size=state.st_size, times=times
    )
    if record and record.exists():
        return record.read_text(encoding="ascii")
    digest = file_sha256(path)
    if record and time.time_ns() - state.st_ctime_ns > SETTLED:
        memory.mkdir(parents=True, exist_ok=True)
        replace_file(record, lambda temporary: temporary.write_text(digest, encoding="ascii"))
    return digest


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hex, of all that decides a text's ids: the tokenizer and its chat template."""
    return fingerprint(
        tokenizer=tokenizer.backend_tokenizer.to_str(), template=tokenizer.chat_template
    )
