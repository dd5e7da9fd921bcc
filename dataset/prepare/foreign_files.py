"""Rows of files that are not ours: .json (one list), .parquet, .csv, .tsv and .txt, and .jsonl."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from dataset.files.jsonl import check_exists, iter_lines, utf8_lines

SPLITS = ("paragraphs", "file", "lines")


def read_any(path: str | Path, split: str = "paragraphs") -> Iterator[tuple[int, dict | str]]:
    """Yield (line number; in .json and .parquet: row number, from 1; row) of a file.

    A row of .jsonl is the line as it stands, for `parse_row`, so that a broken one can be skipped.
    split: one of SPLITS, a row of a .txt file.
    """
    path = Path(path)
    check_exists(path)
    reader = READERS.get(path.suffix.lower())
    return reader(path, split) if reader else iter_lines(path)


def _read_json(path: Path, split: str):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON in UTF-8 ({error}). If it has an object on each line, name it "
            ".jsonl."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no list of objects. Give [{{...}}, {{...}}].")
    return enumerate(rows, start=1)


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
    """Return a value without null fields: Parquet gives every struct the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_table(path: Path, split: str):
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in utf8_lines(path))
    table = csv.DictReader(
        lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
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
    ".parquet": _read_parquet,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
