"""Rows of .jsonl, .jsonl.gz and .jsonl.xz files, with errors that name the file and the line."""

import glob
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz")
OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
BAD_ARCHIVE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
FOREIGN_BYTES = "surrogateescape"  # byte 0xff becomes U+DCFF, which no UTF-8 text can hold


def iter_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of every line that is not blank.

    Only "\\n" ends a line: U+2028, U+0085 and other characters that str.splitlines() cuts at are
    ordinary text. Bytes that are not UTF-8 are kept as lone surrogates, for `parse_row` to refuse.
    ValueError: no such file, unknown ending, damaged archive, or not a single row.
    """
    path = Path(path)
    _check_file(path)
    return _lines(path)


def check_exists(path: Path) -> None:
    """ValueError unless there is such a file."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. Check the path, or make or download the data first."
        )


def _check_file(path: Path) -> None:
    check_exists(path)
    if path.suffix not in OPENERS:
        raise ValueError(
            f"{path}: unknown file type. Give a file that ends in .jsonl, .jsonl.gz or .jsonl.xz; "
            f"make one: python dataset/prepare_data.py convert {path} --out rows.jsonl"
        )


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if it ends in .gz or .xz."""
    return OPENERS.get(path.suffix, open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    empty = True
    for line_no, line in utf8_lines(path):
        if line.strip():
            empty = False
            yield line_no, line.rstrip("\r\n")
    if empty:
        raise ValueError(f"{path}: the file is empty. Give a file with one JSON object per line.")


def utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end); other bytes than UTF-8 as lone surrogates.

    ValueError: damaged archive.
    """
    line_no = 0
    try:
        with open_binary(path) as file:
            # a binary file is cut at b"\n" and nowhere else
            for line_no, raw in enumerate(file, start=1):
                yield line_no, raw.decode("utf-8-sig" if line_no == 1 else "utf-8", FOREIGN_BYTES)
    except BAD_ARCHIVE as error:
        raise ValueError(
            f"{path}:{line_no + 1}: damaged archive ({error}). Fetch or compress it again."
        ) from error


def parse_row(line: str) -> dict:
    """Return the JSON object in one line, NaN and infinities as null.

    ValueError "what is wrong. fix" without the place.
    """
    check_utf8(line)
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON ({error.msg}, column {error.colno}). Put one JSON object on each line."
        ) from error
    except RecursionError as error:
        raise ValueError("lists or objects nested too deeply. Leave the row out.") from error
    if not isinstance(row, dict):
        fix = "Each line must be a JSON object in braces."
        if isinstance(row, list):
            fix = "`python dataset/prepare_data.py convert` makes lines of its objects."
        raise ValueError(f"a {type(row).__name__}, not an object. {fix}")
    if "\\ud" in line or "\\uD" in line:
        dump_row(row)
    return row


def check_utf8(text: str) -> None:
    """ValueError if UTF-8 cannot hold a text: a byte kept by `utf8_lines`, or half a pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        if 0x80 <= byte <= 0xFF:
            raise ValueError(
                f"not UTF-8 (byte 0x{byte:02x}, column {error.start + 1}). Repair the line, or "
                "convert the file to UTF-8."
            ) from error
        raise ValueError(  # legal in JSON's escapes
            "half of a surrogate pair (\\ud800-\\udfff). Remove or repair that character."
        ) from error


def dump_row(row: dict) -> str:
    """Return a row as a line of JSON, with its end; ValueError if part of it cannot be written."""
    try:
        line = json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise ValueError(f"{error}. Give text, numbers, lists and objects.") from error
    check_utf8(line)
    return line


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row); ValueError "path:line: what is wrong. fix" at the first bad row."""
    return _rows(path, iter_lines(path))


def _rows(path: str | Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict]]:
    for line_no, line in lines:
        try:
            row = parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}:{line_no}: {error}") from error
        yield line_no, row


def split_fraction(path: str | Path) -> tuple[str, float]:
    """Split "rows.jsonl@0.4" into the path and the fraction of its rows to use (default: 1.0)."""
    match = re.fullmatch(r"(.+)@([-+.\deE]+)", str(path))
    if not match:
        return str(path), 1.0
    try:
        fraction = float(match[2])
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{path}: {match[2]} is no fraction of rows. Give a number above 0 and at most 1, as "
            f"in {match[1]}@0.4."
        )
    return match[1], fraction


def find_shards(data_path: str | Path | Iterable[str | Path]) -> list[tuple[str, float]]:
    """Return (file, fraction of its rows) for a path or several: files, folders, globs, each maybe
    with "@0.4".

    A folder stands for the files in it that end in .jsonl, .jsonl.gz or .jsonl.xz, a glob for all
    files that it matches, both sorted by name. ValueError: nothing found, no such file, unknown
    ending, an impossible fraction.
    """
    entries = [data_path] if isinstance(data_path, str | Path) else list(data_path)
    if not entries:
        raise ValueError("data_path is empty. Give at least one .jsonl file.")
    found = []
    for path, fraction in map(split_fraction, entries):
        files = _matches(path)
        for file in files:
            _check_file(Path(file))
        found += [(file, fraction) for file in files]
    return found


def _matches(path: str) -> list[str]:
    if Path(path).is_dir():
        files = sorted(
            str(file)
            for file in Path(path).iterdir()
            if file.name.endswith(ENDINGS) and file.name[0] != "." and file.is_file()
        )
        if not files:
            raise ValueError(
                f"{path}: a folder without .jsonl, .jsonl.gz or .jsonl.xz files. Give the folder "
                f"that the files are in, or a glob such as '{path}/*/*.jsonl'."
            )
    elif glob.has_magic(path) and not Path(path).exists():
        files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise ValueError(
                f"{path}: no file matches. Check the pattern, or make or download the data first."
            )
    else:
        files = [path]
    return files


def in_fraction(line_no: int, fraction: float) -> bool:
    """Whether a line belongs to a sample of that fraction: always the same lines, spread evenly.

    Multiples of the golden ratio fall evenly into [0, 1) without a period that an "every 50th row"
    rule could hit.
    """
    return (line_no * 2654435769 & 0xFFFFFFFF) < fraction * 2**32
