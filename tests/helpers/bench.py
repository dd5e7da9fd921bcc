"""One benchmark, run as a user runs it."""

import json
from pathlib import Path

from scripts import bench


def run_bench(folder: Path, words: str, *more: str) -> dict:
    """Run `bench.py` with these words; returns the content of its JSON file."""
    path = folder / "new" / "bench.json"
    bench.main([*words.split(), *more, "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


def read_table(printed: str) -> list[dict[str, str]]:
    """The rows of the one table that was printed, by their headings."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(cells[1])) == {"-"}
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
