"""Text becomes tokens once: they are kept on disk and read through the memory map.

A cache holds the sequences of one file, in a folder that `datasets.load_from_disk` opens, plus
`report.json`. Its name is the fingerprint of everything that decides its content, so a stale one is
never read. Of several processes that need it one builds, and the others wait. It is built under
another name and renamed when whole: a killed run cannot leave half a cache.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.files.outputs import locked, whole_folder

BUILDING = "building the token cache"
NAMED = 5  # rows that a report names of each kind
LABELS = {  # of the rows that a report names
    "respelled": "tool calls, reasoning or weights read from another spelling",
    "special": "special tokens spelled in a text, learned as text",
    "lost_thoughts": "reasoning of earlier turns, which the chat template leaves out",
}
DATA = "data-00000-of-00001.arrow"


@dataclass
class Report:
    """Counts of the rows by their fate; the first few with a problem are named by `file:line`."""

    rows_read: int = 0
    rows_used: int = 0
    rows_cut: int = 0  # used, but longer than max_seq_len
    rows_skipped: int = 0  # faulty, with bad_rows="skip"
    rows_no_target: int = 0  # left out: nothing to train on within max_seq_len
    rows_too_long: int = 0  # left out: a pair of which too little is within max_seq_len
    rows_respelled: int = 0  # used, with tool calls, reasoning or weights read from other spellings
    rows_special: int = 0  # used, with texts that spell special tokens, ours or others'
    rows_lost_thoughts: int = 0  # used, without the reasoning of earlier turns
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
        """Add the counts of the rows that follow."""
        for name, value in asdict(other).items():
            if name != "named":
                setattr(self, name, getattr(self, name) + value)
        for kind, names in other.named.items():
            self.named[kind] = (self.named.get(kind, []) + names)[:NAMED]

    def __str__(self) -> str:
        lines = [
            f"rows: {self.rows_read:,} read, {self.rows_used:,} used, {self.rows_cut:,} cut, "
            f"{self.rows_skipped:,} skipped, {self.rows_no_target:,} without a target",
            f"tokens: {self.tokens:,} in {self.sequences:,} sequences, {self.targets:,} trained "
            f"on, which are {self.target_bytes:,} bytes of text",
        ]
        for kind, names in self.named.items():
            more = getattr(self, f"rows_{kind}") - len(names)
            named = "; ".join(names) + (f"; and {more:,} more" if more else "")
            lines.append(f"{LABELS.get(kind, kind.replace('_', ' '))}: {named}")
        return "\n".join(lines)


class LineBlock(NamedTuple):
    """Some lines of a file: one process encodes them at a time."""

    path: str
    lines: list[tuple[int, str]]


class EncodedBlock(NamedTuple):
    """The sequences of a LineBlock: each column's values end to end, cut by `lengths`."""

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    documents: np.ndarray  # one hash per sequence
    report: Report


class TokenTable:
    """The sequences of cache folders, one after the other, memory-mapped: `table[column, i]` is an
    array view, `lengths` int32 [N].

    ValueError or OSError where a folder and its report differ. Memory: 4 bytes a sequence and
    about 1 kB for each thousand of them.
    """

    def __init__(self, *folders: Path):
        self.folders, self.report, self._chunks = folders, Report(), {}
        for folder in folders:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            self.report.add(Report(**report))
            for name, chunks in _read(folder).items():
                self._chunks.setdefault(name, []).extend(chunks)
        self._values, self._offsets = {}, {}
        for name, chunks in self._chunks.items():
            if name != "document":
                self._values[name] = [_to_numpy(chunk.values) for chunk in chunks]
                self._offsets[name] = [_to_numpy(chunk.offsets) for chunk in chunks]
        offsets = self._offsets["input_ids"]
        self.lengths = np.concatenate([np.empty(0, np.int32), *map(np.diff, offsets)])
        self._chunk_ends = np.cumsum([len(part) - 1 for part in offsets])
        tokens = int(self.lengths.sum(dtype=np.int64))
        if (len(self), tokens) != (self.report.sequences, self.report.tokens):
            raise ValueError(
                f"{len(self)} sequences of {tokens} tokens, not {self.report.sequences} of "
                f"{self.report.tokens}"
            )

    def __reduce__(self):  # for processes that load data: they map the files themselves
        return TokenTable, self.folders

    @property
    def documents(self) -> np.ndarray:
        """A hash of the row that each sequence comes from, uint64 [N]; read from disk each time."""
        return np.concatenate([np.empty(0, np.uint64), *map(_to_numpy, self._chunks["document"])])

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


def open_or_build(folder: Path, blocks: Callable[[], Iterable[EncodedBlock]]) -> TokenTable:
    """Open the cache in `folder`; where there is none, or a damaged one, write the blocks there
    first.

    One process builds while the others wait. OSError with the fix where the disk is full; then,
    as after any other error, nothing stays behind.
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
        try:
            with whole_folder(folder) as draft:
                _write(draft, blocks(), folder.name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for the token cache in {folder.parent}. Free some (two to five "
                f"bytes a token are needed), or make {folder.parent} a link to a folder on another "
                "disk",
            ) from error
        return TokenTable(folder)


def _open(folder: Path) -> TokenTable | Exception | None:
    """Return the table, or the error that it is damaged, or None where there is none."""
    try:
        return TokenTable(folder) if folder.exists() else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        return error


def _read(folder: Path) -> dict[str, list]:
    """Map the Arrow files that state.json names: the chunks of each column.

    `datasets` does the same, but its import costs more than a second.
    """
    pa, chunks = _pyarrow(), {}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for file in state["_data_files"]:
        table = pa.ipc.open_stream(pa.memory_map(str(folder / file["filename"]))).read_all()
        for name in table.column_names:
            chunks.setdefault(name, []).extend(table.column(name).chunks)
    return chunks


def _write(folder: Path, blocks: Iterable[EncodedBlock], name: str) -> None:
    """Write the sequences, the two files that `datasets` wants, and last the report."""
    pa, report, writer = _pyarrow(), Report(), None
    try:
        for block in blocks:
            report.add(block.report)
            if not len(block.lengths) and writer:
                continue
            offsets = _to_arrow(np.append(0, np.cumsum(block.lengths)).astype(np.int32))
            columns = {
                name: pa.ListArray.from_arrays(offsets, _to_arrow(values))
                for name, values in block.columns.items()
            }
            batch = pa.record_batch({**columns, "document": _to_arrow(block.documents)})
            writer = writer or pa.ipc.new_stream(str(folder / DATA), batch.schema)
            writer.write_batch(batch)
    finally:
        if writer:
            writer.close()
    state = {"_data_files": [{"filename": DATA}], "_fingerprint": name[:16], "_split": None}
    formats = dict.fromkeys(("_format_type", "_format_columns"))
    formats |= {"_format_kwargs": {}, "_output_all_columns": False}
    contents = {"dataset_info": {}, "state": state | formats, "report": asdict(report)}
    for file, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"{file}.json").write_text(text, encoding="utf-8")


def _to_arrow(values: np.ndarray):
    """An Arrow array of the values' own memory. `pyarrow.array` would import pandas, a second."""
    pa = _pyarrow()
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def _to_numpy(array) -> np.ndarray:
    """A view of an Arrow array of numbers. Its own `to_numpy` would import pandas, a second."""
    dtype = np.dtype(str(array.type))
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _pyarrow():
    try:
        import pyarrow  # only where a cache is opened
    except ImportError as error:
        raise ImportError(
            "the token cache needs the library `pyarrow`. Install it: pip install -r "
            "requirements.txt"
        ) from error
    return pyarrow
