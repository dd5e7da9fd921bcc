"""A stand-in for the part of Ray's data sets that dataset/prepare/clean_ray.py uses, in this
process: {column: numpy array} blocks.

Like Ray it keeps no order: blocks, groups and the rows of a group come shuffled.
"""

import random
import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest

Block = dict[str, np.ndarray]


class Data:
    """A data set: its blocks."""

    def __init__(self, blocks: list[Block], draw: random.Random):
        self.blocks = [block for block in blocks if len(next(iter(block.values())))]
        self.draw = draw
        draw.shuffle(self.blocks)

    def map_batches(
        self, function: Callable, batch_size: int | None = None, batch_format: str = "numpy"
    ) -> "Data":
        """Apply a function to every block, or to every row of it with batch_size=1; it returns a
        block or yields some.
        """
        assert batch_size in (None, 1) and batch_format == "numpy"
        out = []
        for block in self.blocks:
            count = len(next(iter(block.values())))
            for i in range(0, count, batch_size or count):
                found = function(
                    {name: column[i : i + (batch_size or count)] for name, column in block.items()}
                )
                out += [found] if isinstance(found, dict) else found
        return Data(out, self.draw)

    def materialize(self) -> "Data":
        return self

    def select_columns(self, names: list[str]) -> "Data":
        return Data([{name: block[name] for name in names} for block in self.blocks], self.draw)

    def iter_batches(self, batch_size: None, batch_format: str) -> Iterator[Block]:
        assert batch_size is None and batch_format == "numpy"
        return iter(self.blocks)

    def groupby(self, name: str, num_partitions: int) -> types.SimpleNamespace:
        assert num_partitions > 0
        return types.SimpleNamespace(
            map_groups=lambda function, batch_format: Data(
                [function(group) for group in self._groups(name)], self.draw
            )
        )

    def _groups(self, name: str) -> Iterator[Block]:
        if not self.blocks:
            return
        whole = {
            key: np.concatenate([block[key] for block in self.blocks]) for key in self.blocks[0]
        }
        for value in np.unique(whole[name]):
            rows = np.flatnonzero(whole[name] == value)
            self.draw.shuffle(rows)
            yield {key: column[rows] for key, column in whole.items()}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of ray."""
    draw = random.Random(0)

    def from_items(rows, override_num_blocks):
        return Data([{name: np.array([row[name]]) for name in row} for row in rows], draw)

    data = types.ModuleType("ray.data")
    data.from_items = from_items
    data.DataContext = types.SimpleNamespace(get_current=types.SimpleNamespace)
    ray = types.ModuleType("ray")
    ray.data, ray.exceptions = data, types.SimpleNamespace(RayError=RuntimeError)
    ray.put = ray.get = lambda value: value
    ray.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
