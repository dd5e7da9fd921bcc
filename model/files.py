"""Files on disk: replaced in one move, flushed, hashed. Imports nothing heavy."""

import errno
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Terminal(io.FileIO):
    """Output to a terminal; once that is closed it goes nowhere, instead of ending the program."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def forgive_text() -> None:
    """Let a program survive its terminal: its encoding, strange bytes, and that it is closed.

    Characters that the terminal cannot spell, such as Chinese ones, are shown as `?`, and so are
    bytes of the input that are no text.
    """
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream and stream.isatty():
            raw = io.BufferedWriter(Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, line_buffering=True))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's may lack it
            stream.reconfigure(errors="replace")


def as_typed(text: str | None) -> str | None:
    """A text of the command line; bytes that the locale cannot read are read as UTF-8."""
    if not text or not any("\udc80" <= char <= "\udcff" for char in text):
        return text
    return os.fsencode(text).decode("utf-8", "replace")


@contextmanager
def writing(path: str | Path, then: str = "") -> Iterator[None]:
    """Around code that writes to `path`: an OSError becomes one that names the file and the fix."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error.strerror or error}): make room on the disk, or give "
            f"back the right to write there{then}"
        ) from error


def replace_file(
    path: str | Path, write: Callable[[Path], object], then: str = "; the old file is untouched"
) -> None:
    """Call `write(temporary path)`, then put the result in place of `path` in one move.

    Nobody ever sees a half-written file. If that fails (a full disk, a missing right), OSError that
    names the path and ends with `then`; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, then):
            try:
                write(temporary)
            except (OSError, TypeError, ValueError):
                raise
            except Exception as error:  # a library's own, as SafetensorError for a full disk
                raise OSError(str(error)) from error
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """`replace_file` with JSON; the folder is made if it is missing."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Bring a file, or a folder's names, onto the disk: a rename must not overtake the data."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
