"""The one table and the one JSON format of all benchmarks, and the flags that they share."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from model.files import write_json
from trainer.runtime.arguments import arg

TEXT_WIDTH = 17  # characters that a column of text has at least: later rows may be longer


@dataclass
class BenchArgs:
    json: str = arg("", "write all metrics to this file too")


class Results:
    """Rows of metrics, printed as a Markdown table while they are measured.

    columns: the keys that the table shows, also as headings. A row may have more, for the JSON.
    """

    def __init__(self, columns: str):
        self.columns = columns.split()
        self.facts: dict[str, Any] = {"cores": os.cpu_count()}
        self.rows: list[dict[str, Any]] = []

    def note(self, text: str, **facts: Any) -> None:
        """Print text before or after the table; the facts go to the JSON file."""
        print(f"\n{text}" if self.rows else text, flush=True)
        self.facts |= facts

    def add(self, row: dict[str, Any]) -> None:
        """Print a row, the first one below the headings."""
        cells = [format_cell(row[key]) for key in self.columns]
        if not self.rows:
            headings = [key.replace("_", " ") for key in self.columns]
            self.aligns = ["<" if isinstance(row[key], str) else ">" for key in self.columns]
            least = (TEXT_WIDTH if side == "<" else 0 for side in self.aligns)
            self.widths = [max(len(a), len(b), n) for a, b, n in zip(headings, cells, least)]
            self._print(headings)
            self._print("-" * width for width in self.widths)
        self.rows.append(row)
        self._print(cells)

    def _print(self, cells):
        padded = (f"{x:{side}{n}}" for x, side, n in zip(cells, self.aligns, self.widths))
        print(f"| {' | '.join(padded)} |", flush=True)

    def write(self, path: str, benchmark: str, args: BenchArgs) -> None:
        """Write {"benchmark", "arguments", facts ..., "rows"} as JSON."""
        head = {"benchmark": benchmark, "arguments": asdict(args)}
        write_json(path, head | self.facts | {"rows": self.rows})


def format_cell(value: Any) -> str:
    """Numbers with three digits or all before the point; "-" for None, "low to high" for a list."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(map(format_cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return f"{value:,}" if isinstance(value, int) else value
