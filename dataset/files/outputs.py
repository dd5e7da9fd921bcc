"""Output that appears whole or not at all: locks, files and folders that a killed process cannot
spoil.

The system releases a lock when its process ends, however it ends. So whatever lies under a free
lock is a left-over, and the next process removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from dataset.files.jsonl import ENDINGS, OPENERS


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock next to `path`; print, while waiting for it, what its owner is doing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is {doing} {path} ...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def why_unwritable(folder: Path) -> str:
    """Return "", or "... cannot be written (reason)" if no files can be made in a folder, or where
    it would be made.

    It is tried: root may write to all folders, but not on read-only disks, nor in /proc.
    """
    there = folder
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryDirectory(prefix=".probe-", dir=there).cleanup()
    except OSError as error:
        return f"{there} cannot be written ({error.strerror or error})"
    return ""


def check_outputs(inputs: Iterable[str | Path], outputs: dict[str, str]) -> None:
    """ValueError if an output (flag: path, or "") is misnamed, an input, or another output too."""
    taken = {Path(path).resolve(): "is one of the files to read" for path in inputs}
    for flag, path in outputs.items():
        if path:
            _check_name(path)
            if Path(path).resolve() in taken:
                raise ValueError(f"{flag} {path} {taken[Path(path).resolve()]}. Give another name.")
            taken[Path(path).resolve()] = f"is the file of {flag}"


def _check_name(path: str | Path) -> None:
    if not str(path).endswith(ENDINGS):
        raise ValueError(
            f"{path}: unknown file type. Give a name that ends in .jsonl, .jsonl.gz or .jsonl.xz."
        )


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open a .jsonl, .jsonl.gz or .jsonl.xz file for text in UTF-8, written under another name and
    renamed when whole.

    After an error there is no file, or the former one. ValueError: unknown ending; OSError: another
    process writes it.
    """
    path = Path(path)
    _check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with _lock_that_vanishes(partial) as free:
        if not free:
            raise OSError(
                f"{path}: another process is writing this file. Wait for it, or give another name."
            )
        try:
            with OPENERS[path.suffix](partial, "wt", encoding="utf-8", newline="\n") as file:
                yield file
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder under another name, to be filled, that in the end replaces `path`."""
    with scratch_folder(path.parent, f".{path.name}.draft-") as draft:
        yield draft
        if path.exists():
            shutil.rmtree(path)
        draft.rename(path)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder for intermediate results; remove it at the end, and left-over ones before."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in {str(path).removesuffix(".lock") for path in parent.glob(f"{escape(prefix)}*")}:
        with _lock_that_vanishes(old) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    # the lock is taken before there is a folder: none is ever without its lock
    with _lock_that_vanishes(folder):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock_that_vanishes(path: str | Path) -> Iterator[bool]:
    """Try to hold the lock next to `path`, yield whether that worked, and remove it at the end."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows removes it at the release
            os.unlink(lock.lock_file)  # while it is held: afterwards it could be another process's
        lock.release()
