"""Rows of .jsonl, .jsonl.gz and .jsonl.xz files, with errors that name the file and the line."""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


def iter_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of every line that is not blank.

    Only "\\n" ends a line: U+2028, U+0085 and other characters that str.splitlines() cuts at are ordinary text.
    ValueError: no such file, unknown ending, damaged archive, bytes that are not UTF-8, or not a single row.
    """
    path = Path(path)
    if path.suffix not in OPENERS:
        raise ValueError(f"{path}: unknown file type. Give a file that ends in .jsonl, .jsonl.gz or .jsonl.xz.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Check the path, or make or download the data first.")
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    line_no, empty = 0, True
    try:
        with OPENERS[path.suffix](path, "rb") as file:
            for line_no, raw in enumerate(file, start=1):  # a binary file is cut at b"\n" and nowhere else
                line = raw.decode("utf-8-sig" if line_no == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    empty = False
                    yield line_no, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line_no}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}:{line_no + 1}: damaged archive ({error}). Fetch or compress it again.") from error
    if empty:
        raise ValueError(f"{path}: the file is empty. Give a file with one JSON object per line.")


def parse_row(line: str) -> dict:
    """Return the JSON object in one line; ValueError says what is wrong with it (the caller knows where)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}). Put one JSON object on each line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object. Each line must be a JSON object in braces.")
    if "\\ud" in line or "\\uD" in line:  # half of a surrogate pair is legal JSON, but UTF-8 cannot hold it
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair (\\ud800-\\udfff). Remove or repair that character.") from error
    return row


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row) of a file; ValueError "path:line: what is wrong. way out" at the first bad row."""
    return _rows(path, iter_lines(path))


def _rows(path: str | Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict]]:
    for line_no, line in lines:
        try:
            row = parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}:{line_no}: {error}") from error
        yield line_no, row


def split_share(path: str | Path) -> tuple[str, float]:
    """Split "rows.jsonl@0.4" into the path and the share of its rows to use, 1.0 where none is given."""
    match = re.fullmatch(r"(.+)@([-+.\deE]+)", str(path))
    if not match:
        return str(path), 1.0
    try:
        share = float(match[2])
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{path}: {match[2]} is not a share. Give one above 0 and at most 1, as in {match[1]}@0.4.")
    return match[1], share


def in_share(line_no: int, share: float) -> bool:
    """Tell whether a line belongs to a sample of that share: always the same lines, spread evenly over the file.

    Multiples of the golden ratio fall evenly into [0, 1) without a period that an "every 50th row" rule could hit.
    """
    return (line_no * 2654435769 & 0xFFFFFFFF) < share * 2**32
