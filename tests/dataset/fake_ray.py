"""A stand-in for the part of Ray's data sets that dataset/clean_ray.py uses, in this process: {column: numpy array} blocks.

Like Ray it keeps no order: blocks, groups and the rows of a group come shuffled.
"""

import random
import sys
import types

import numpy as np


class Data:
    """A data set: its blocks."""

    def __init__(self, blocks, draw):
        self.blocks, self.draw = [block for block in blocks if len(next(iter(block.values())))], draw
        draw.shuffle(self.blocks)

    def map_batches(self, function, batch_size=None, batch_format="numpy"):
        """Apply a function to every block, or to every row of it with batch_size=1; it returns a block or yields some."""
        assert batch_size in (None, 1) and batch_format == "numpy"
        out = []
        for block in self.blocks:
            count = len(next(iter(block.values())))
            for i in range(0, count, batch_size or count):
                found = function({name: column[i : i + (batch_size or count)] for name, column in block.items()})
                out += [found] if isinstance(found, dict) else found
        return Data(out, self.draw)

    def materialize(self):
        return self

    def select_columns(self, names):
        return Data([{name: block[name] for name in names} for block in self.blocks], self.draw)

    def iter_batches(self, batch_size, batch_format):
        assert batch_size is None and batch_format == "numpy"
        return iter(self.blocks)

    def groupby(self, name, num_partitions):
        assert num_partitions > 0
        return types.SimpleNamespace(map_groups=lambda function, batch_format: Data(
            [function(group) for group in self._groups(name)], self.draw))

    def _groups(self, name):
        if not self.blocks:
            return
        whole = {key: np.concatenate([block[key] for block in self.blocks]) for key in self.blocks[0]}
        for value in np.unique(whole[name]):
            rows = np.flatnonzero(whole[name] == value)
            self.draw.shuffle(rows)
            yield {key: column[rows] for key, column in whole.items()}


def install(monkeypatch):
    """Put the stand-in where `import ray` finds it."""
    draw = random.Random(0)

    def from_items(rows, override_num_blocks):
        return Data([{name: np.array([row[name]]) for name in row} for row in rows], draw)

    data = types.ModuleType("ray.data")
    data.from_items, data.DataContext = from_items, types.SimpleNamespace(get_current=types.SimpleNamespace)
    ray = types.ModuleType("ray")
    ray.data, ray.exceptions = data, types.SimpleNamespace(RayError=RuntimeError)
    ray.put = ray.get = lambda value: value
    ray.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
