"""Text becomes tokens once: they are kept on disk and read through the memory map.

A cache is a folder that `datasets.load_from_disk` opens, plus `report.json`, and holds one file's sequences. Its name
is the fingerprint of everything that decides its content, so a stale one is never read. Of several processes that need
it one builds, and the others wait. It is built beside its place and renamed when whole: a run that is killed cannot
leave half a cache under that name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.outputs import locked

BUILDING = "building the token cache"
NAMED = 5  # rows that a report names of each kind
SETTLED = 2e9  # nanoseconds after which a file is no longer being written: clocks of file systems are coarse


@dataclass
class Report:
    """What became of the rows: counts, and of those with a problem the first few by `file:line`."""

    rows_read: int = 0
    rows_used: int = 0
    rows_cut: int = 0  # used, but longer than max_seq_len
    rows_skipped: int = 0  # faulty, with bad_rows="skip"
    rows_no_target: int = 0  # left out: nothing to train on within max_seq_len
    rows_too_long: int = 0  # left out: a pair with too little of its answers within max_seq_len, or not whole
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
    lines: list[tuple[int, str]]


class EncodedBlock(NamedTuple):
    """The sequences of a LineBlock: each column's values end to end, cut by `lengths`; `documents` one per sequence."""

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    documents: np.ndarray
    report: Report


class TokenTable:
    """The sequences of a cache folder, memory-mapped: `table[column, i]` is an array view, `lengths` int32 [N].

    ValueError or OSError where the folder does not hold what its report says. What stays in memory is 4 bytes a sequence
    and about 1 kB for each thousand of them.
    """

    def __init__(self, folder: Path):
        self.folders = [folder]
        self.report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
        data = _datasets().load_from_disk(str(folder)).data
        self._chunks = {name: data.column(name).chunks for name in data.column_names}
        self._index()
        tokens = int(self.lengths.sum(dtype=np.int64))
        if (len(self), tokens) != (self.report.sequences, self.report.tokens):
            raise ValueError(f"{len(self)} sequences of {tokens} tokens, not {self.report.sequences} of {self.report.tokens}")

    @classmethod
    def join(cls, tables: list[TokenTable]) -> TokenTable:
        """Return one table of all the sequences of several, in that order."""
        whole = cls.__new__(cls)
        whole.folders = [folder for table in tables for folder in table.folders]
        whole.report = Report()
        for table in tables:
            whole.report.add(table.report)
        whole._chunks = {name: [chunk for table in tables for chunk in table._chunks[name]] for name in tables[0]._chunks}
        whole._index()
        return whole

    def _index(self) -> None:
        lists = {name: chunks for name, chunks in self._chunks.items() if name != "document"}
        self._values = {name: [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
                        for name, chunks in lists.items()}
        self._offsets = {name: [chunk.offsets.to_numpy() for chunk in chunks] for name, chunks in lists.items()}
        offsets = self._offsets["input_ids"]
        self.lengths = np.concatenate([np.empty(0, np.int32), *map(np.diff, offsets)])
        self._chunk_ends = np.cumsum([len(part) - 1 for part in offsets])

    def __reduce__(self):  # for processes that load data: they map the files themselves
        return _open_tables, (self.folders,)

    @property
    def documents(self) -> np.ndarray:
        """A hash of the row that each sequence comes from, uint64 [N]; read from the disk each time."""
        return np.concatenate([np.empty(0, np.uint64), *(chunk.to_numpy() for chunk in self._chunks["document"])])

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, column: str) -> bool:
        return column in self._values

    def __getitem__(self, key: tuple[str, int]) -> np.ndarray:
        column, index = key
        chunk = int(np.searchsorted(self._chunk_ends, index, side="right"))
        offsets = self._offsets[column][chunk]
        local = int(index) - (int(self._chunk_ends[chunk - 1]) if chunk else 0)
        return self._values[column][chunk][offsets[local] : offsets[local + 1]]


def _open_tables(folders: list[Path]) -> TokenTable:
    return TokenTable.join([TokenTable(folder) for folder in folders])


def open_or_build(folder: Path, blocks: Callable[[], Iterable[EncodedBlock]]) -> TokenTable:
    """Open the cache in `folder`; where there is none, or a damaged one, write the blocks there first.

    One process builds while the others wait. OSError with the way out where the disk is full; then, as after any other
    error, nothing stays behind.
    """
    table = _open(folder)
    if isinstance(table, TokenTable):
        return table
    with locked(folder, BUILDING):
        table = _open(folder)  # again: another process may have built it meanwhile
        if isinstance(table, TokenTable):
            return table
        if table is not None:
            print(f"{folder}: damaged token cache ({table}). Building it again.")
            shutil.rmtree(folder)
        _build(folder, blocks)
        return TokenTable(folder)


def _open(folder: Path) -> TokenTable | Exception | None:
    """Return the table, or what is wrong with it, or None where there is none."""
    try:
        return TokenTable(folder) if folder.exists() else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        return error


def _build(folder: Path, blocks: Callable[[], Iterable[EncodedBlock]]) -> None:
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        building.mkdir()
        _write(building, blocks())
        (building / "whole").rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no space left for the token cache in {folder.parent}. Free some (two to five "
                          f"bytes a token are needed), or make {folder.parent} a link to a folder on another disk") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


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
    _datasets().disable_progress_bars()
    _datasets().Dataset.from_file(str(raw)).save_to_disk(str(whole), num_shards=1)  # 1: by default none without a sequence
    (whole / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False, indent=1), encoding="utf-8")


def _datasets():
    try:
        import datasets  # takes a second or two: only where a cache is opened
    except ImportError as error:
        raise ImportError("the token cache needs the library `datasets`. Install it: pip install -r "
                          "requirements.txt") from error
    return datasets


def fingerprint(**parts) -> str:
    """SHA-256, in hex, of named values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path, memory: Path | None = None) -> str:
    """SHA-256, in hex, of a file's bytes; ValueError if there is no such file.

    It is remembered in the folder `memory` for as long as the file has its path, size and times.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. Check the path, or make or download the data first.")
    state = Path(path).stat()
    remembered = memory and memory / fingerprint(path=str(Path(path).resolve()), size=state.st_size,
                                                 times=[state.st_mtime_ns, state.st_ctime_ns])
    if remembered and remembered.exists():
        return remembered.read_text(encoding="ascii")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if remembered and time.time_ns() - state.st_ctime_ns > SETTLED:
        memory.mkdir(parents=True, exist_ok=True)
        unfinished = remembered.with_name(f"{remembered.name}.{os.getpid()}")
        unfinished.write_text(digest.hexdigest(), encoding="ascii")
        unfinished.replace(remembered)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer) -> str:
    """SHA-256, in hex, of all that decides the ids of a text or a conversation: the tokenizer and its template."""
    return fingerprint(tokenizer=tokenizer.backend_tokenizer.to_str(), template=tokenizer.chat_template)
