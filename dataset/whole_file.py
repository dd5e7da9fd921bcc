"""Write a .jsonl, .jsonl.gz or .jsonl.xz file that takes its name only when it is whole."""

import gzip
import lzma
import os
from contextlib import contextmanager
from pathlib import Path

WRITERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


def check_name(path: str | Path) -> None:
    """ValueError unless the file's ending is one that can be written."""
    if Path(path).suffix not in WRITERS:
        raise ValueError(f"{path}: unknown file type. Give a name that ends in .jsonl, .jsonl.gz or .jsonl.xz.")


@contextmanager
def whole_file(path: str | Path):
    """Open a file for text in UTF-8; after an error there is no file, or the former one. ValueError: unknown ending."""
    path = Path(path)
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with WRITERS[path.suffix](partial, "wt", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
