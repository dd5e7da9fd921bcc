"""Rows of other people's files: .json, .jsonl, .parquet, .csv, .tsv and .txt.

All but .parquet may be packed (.gz, .xz). A file of JSON holds a list, an object with a list under
one key, or an object on each line, whatever its ending.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from dataset.files.jsonl import BAD_ARCHIVE, FOREIGN_BYTES, check_exists, open_binary, utf8_lines

WRAPPERS = (
    "data",
    "rows",
    "train",
    "test",
    "validation",
    "examples",
    "items",
    "instances",
    "samples",
    "records",
)
ROW_KEYS = {"text", "conversations", "messages", "chosen", "instruction", "prompt", "question"}
SPLITS = ("paragraphs", "file", "lines")


def read_any(path: str | Path, split: str = "paragraphs") -> Iterator[tuple[int, dict | str]]:
    """Yield (line number; in .json and .parquet: row number, from 1; row) of a file.

    A row of .jsonl is the line as it stands, for `parse_row`, so that a broken one can be skipped.
    split: one of SPLITS, a row of a .txt file.
    """
    path = Path(path)
    check_exists(path)
    reader = READERS.get(kind_of(path))
    if reader is None:
        raise ValueError(f"{path}: unknown file type. Known are {', '.join(READERS)}.")
    return reader(path, split)


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, without the one that says how it is packed."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] in ([".gz"], [".xz"]):
        endings = endings[:-1] or [".jsonl"]
    return endings[-1] if endings else ""


def _read_json(path: Path, split: str):
    try:
        with open_binary(path) as file:
            is_list = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        rows = _whole_json(path) if is_list or kind_of(path) == ".json" else None
    except BAD_ARCHIVE as error:
        raise ValueError(
            f"{path}: damaged archive ({error}). Fetch or compress it again."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: lists or objects nested too deeply. Repair it.") from error
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{path}: not JSON ({error}). Repair it.") from error
        rows = None
    if rows is None:
        lines = ((line_no, line.rstrip("\r\n")) for line_no, line in utf8_lines(path))
        return ((line_no, line) for line_no, line in lines if line.strip())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no list of objects. Give [{{...}}, {{...}}].")
    return enumerate(rows, start=1)


def _whole_json(path: Path):
    with open_binary(path) as file:
        text = file.read().decode("utf-8-sig", FOREIGN_BYTES)
    value = json.loads(text, parse_constant=lambda name: None)
    if not isinstance(value, dict):
        return value
    lists = [key for key in WRAPPERS if isinstance(value.get(key), list)]
    if not lists or value.keys() & ROW_KEYS:
        return [value]
    if len(lists) > 1:
        raise ValueError(
            f"{path}: several lists, {', '.join(lists)}. Give a file with one of them."
        )
    return value[lists[0]]


def _read_parquet(path: Path, split: str):
    try:  # heavy, and only for these files
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            "reading .parquet needs pyarrow. Install it: pip install -r requirements.txt"
        ) from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from enumerate(
            (_without_nulls(row) for batch in batches for row in batch.to_pylist()), start=1
        )
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise ValueError(f"{path}: damaged Parquet file ({error}). Fetch it again.") from error


def _without_nulls(value):
    """Return a value without null fields: Parquet gives every struct the fields of all others.

    pandas writes NaN for a missing cell.
    """
    if isinstance(value, dict):
        present = {key: item for key, item in value.items() if item is not None and item == item}
        return {key: _without_nulls(item) for key, item in present.items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_table(path: Path, split: str):
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in utf8_lines(path))
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    table = csv.DictReader(lines, delimiter=delimiter, strict=True)
    line_no = 0
    try:
        for row in table:
            yield table.line_num, {key: value for key, value in row.items() if value is not None}
            line_no = table.line_num
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line_no + 1}: no row of a table ({error}). Repair its quotes."
        ) from error


def _read_text(path: Path, split: str):
    if split == "file":
        yield 1, {"text": "".join(line for _, line in utf8_lines(path)).replace("\r\n", "\n")}
        return
    lines, first = [], 1
    for line_no, line in chain(utf8_lines(path), [(0, "")]):
        line = line.rstrip("\r\n")
        if lines and (split == "lines" or not line.strip()):
            yield first, {"text": "\n".join(lines)}
            lines = []
        if line.strip():
            first = first if lines else line_no
            lines.append(line)


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
