"""Text becomes tokens once: encode with all cores, keep the result on disk, read it through the memory map.

A cache is a folder that `datasets.load_from_disk` opens, plus `report.json`. Its name is the fingerprint of everything
that decides its content, so a stale one is never read. It is built beside its place and renamed when whole: a run that
is killed, or two runs that build at once, cannot leave half a cache under that name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

SERIAL_BLOCKS = 8  # up to here starting processes costs more time than they save
NAMED = 5  # rows that a report names of each kind


@dataclass
class Report:
    """What became of the rows: counts, and of those with a problem the first few by `file:line`."""

    rows_read: int = 0
    rows_used: int = 0
    rows_cut: int = 0  # used, but longer than max_seq_len
    rows_skipped: int = 0  # faulty, with bad_rows="skip"
    rows_no_target: int = 0  # left out: nothing to train on within max_seq_len
    sequences: int = 0
    tokens: int = 0
    targets: int = 0
    target_bytes: int = 0  # of the text that the targets stand for
    named: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, where: str) -> None:
        """Count a row under `rows_<kind>` and name it if it is among the first of its kind."""
        setattr(self, f"rows_{kind}", getattr(self, f"rows_{kind}") + 1)
        names = self.named.setdefault(kind, [])
        if len(names) < NAMED:
            names.append(where)

    def add(self, other: Report) -> None:
        """Add the figures of the rows that follow."""
        for name, value in asdict(other).items():
            if name != "named":
                setattr(self, name, getattr(self, name) + value)
        for kind, names in other.named.items():
            self.named[kind] = (self.named.get(kind, []) + names)[:NAMED]

    def __str__(self) -> str:
        lines = [f"rows: {self.rows_read:,} read, {self.rows_used:,} used, {self.rows_cut:,} cut, "
                 f"{self.rows_skipped:,} skipped, {self.rows_no_target:,} without a target",
                 f"tokens: {self.tokens:,} in {self.sequences:,} sequences, {self.targets:,} trained on, "
                 f"which are {self.target_bytes:,} bytes of text"]
        for kind, names in self.named.items():
            more = getattr(self, f"rows_{kind}") - len(names)
            lines.append(f"{kind.replace('_', ' ')}: {'; '.join(names)}{f'; and {more:,} more' if more else ''}")
        return "\n".join(lines)


class LineBlock(NamedTuple):
    """Some lines of a file: what one process encodes at a time."""

    path: str
    file_index: int
    lines: list[tuple[int, str]]


class EncodedBlock(NamedTuple):
    """The sequences of a LineBlock: each column's values end to end, cut by `lengths`; `documents` one per sequence."""

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    documents: np.ndarray
    report: Report


class TokenTable:
    """The sequences of a cache folder, memory-mapped: `table[column, i]` is an array view, `lengths` int64 [N].

    ValueError or OSError where the folder does not hold what its report says.
    """

    def __init__(self, folder: Path):
        data = _datasets().load_from_disk(str(folder)).data
        self.report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
        self.documents = data.column("document").to_numpy()
        self._values, self._offsets = {}, {}
        for name in data.column_names:
            if name != "document":
                chunks = data.column(name).chunks
                self._values[name] = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
                self._offsets[name] = [chunk.offsets.to_numpy() for chunk in chunks]
        offsets = self._offsets["input_ids"]
        self.lengths = np.concatenate([np.diff(part) for part in offsets]).astype(np.int64)
        self._chunk_ends = np.cumsum([len(part) - 1 for part in offsets])
        if (len(self.lengths), int(self.lengths.sum())) != (self.report.sequences, self.report.tokens):
            raise ValueError(f"{len(self.lengths)} sequences instead of {self.report.sequences}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, column: str) -> bool:
        return column in self._values

    def __getitem__(self, key: tuple[str, int]) -> np.ndarray:
        column, index = key
        chunk = int(np.searchsorted(self._chunk_ends, index, side="right"))
        offsets = self._offsets[column][chunk]
        local = index - (int(self._chunk_ends[chunk - 1]) if chunk else 0)
        return self._values[column][chunk][offsets[local] : offsets[local + 1]]


def open_or_build(folder: Path, blocks: Callable[[], Iterable[EncodedBlock]]) -> TokenTable:
    """Open the cache in `folder`; where there is none, or a damaged one, write the blocks there first.

    OSError with the way out where the disk is full; then, as after any other error, nothing stays behind.
    """
    if folder.exists():
        try:
            return TokenTable(folder)
        except (OSError, ValueError, TypeError, LookupError) as error:
            print(f"{folder}: damaged token cache ({error}). Building it again.")
            shutil.rmtree(folder)
    building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.building")
    try:
        building.mkdir(parents=True)
        _write(building, blocks())
        try:
            (building / "whole").rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster. Its cache has the same fingerprint, hence the same content.
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no space left for the token cache in {folder.parent}. Free some (two to five "
                          f"bytes a token are needed), or make {folder.parent} a link to a folder on another disk") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return TokenTable(folder)


def _write(folder: Path, blocks: Iterable[EncodedBlock]) -> None:
    """Write `folder`/whole: the dataset and, last, its report."""
    import pyarrow as pa  # here and not above: it comes with `datasets`, whose absence gets a message of its own

    report, writer = Report(), None
    raw, whole = folder / "raw.arrow", folder / "whole"
    try:
        for block in blocks:
            report.add(block.report)
            if not len(block.lengths) and writer:
                continue
            offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]), type=pa.int32())
            columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values))
                       for name, values in block.columns.items()}
            batch = pa.record_batch({**columns, "document": pa.array(block.documents)})
            writer = writer or pa.ipc.new_stream(str(raw), batch.schema)
            writer.write_batch(batch)
    finally:
        if writer:
            writer.close()
    if not report.sequences:
        raise ValueError(f"no sequence to train on.\n{report}\nGive data with targets, or a larger max_seq_len.")
    _datasets().disable_progress_bars()
    _datasets().Dataset.from_file(str(raw)).save_to_disk(str(whole))
    (whole / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False, indent=1), encoding="utf-8")


def _datasets():
    try:
        import datasets  # takes a second or two: only where a cache is opened
    except ImportError as error:
        raise ImportError("the token cache needs the library `datasets`. Install it: pip install -r "
                          "requirements.txt") from error
    return datasets


def encode_blocks(encoder: Callable[[LineBlock], EncodedBlock], blocks: Iterable[LineBlock],
                  num_proc: int | None = None, total_rows: int | None = None) -> Iterator[EncodedBlock]:
    """Encode blocks in their order, with `num_proc` processes (all cores by default) unless there are only a few.

    The processes are spawned, so `encoder` must pickle. A progress bar appears on a terminal when there is much to do.
    """
    blocks = iter(blocks)
    first = list(islice(blocks, SERIAL_BLOCKS + 1))
    small = len(first) <= SERIAL_BLOCKS
    num_proc = num_proc or num_cores()
    everything = chain(first, blocks)
    encoded = map(encoder, everything) if small or num_proc == 1 else _in_parallel(encoder, everything, num_proc)
    with tqdm(total=total_rows, unit=" rows", desc="text to tokens", disable=small or None) as bar:  # None: no tty
        for block in encoded:
            bar.update(block.report.rows_read)
            yield block


def num_cores() -> int:
    """Cores that this process may use: fewer than all in a container."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_parallel(encoder, blocks, num_proc: int) -> Iterator[EncodedBlock]:
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch or a tokenizer has started threads
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    try:
        pending = deque()
        for block in blocks:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) > 4 * num_proc:  # a bound: the reader must not load the whole file ahead of the encoders
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: Callable[[LineBlock], EncodedBlock]


def _start_worker(encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = encoder


def _encode_in_worker(block: LineBlock) -> EncodedBlock:
    return _worker_encoder(block)


def fingerprint(**parts) -> str:
    """SHA-256, in hex, of named values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256, in hex, of a file's bytes; ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. Check the path, or make or download the data first.")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer) -> str:
    """SHA-256, in hex, of all that decides the ids of a text or a conversation: the tokenizer and its template."""
    return fingerprint(tokenizer=tokenizer.backend_tokenizer.to_str(), template=tokenizer.chat_template)
