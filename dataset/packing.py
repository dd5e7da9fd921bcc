"""Pack sequences of all lengths into batch rows of one length, so that almost no padding is
computed.

A batch row holds several whole sequences. Each is a document of its own: `position_ids` restart at
0, by which the attention knows not to look across, and the first label of each is -100, so nothing
is predicted across the border.

Shapes: `B` batch rows, `T` tokens of a batch row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the label that the loss skips, by the convention of Hugging Face
ROUND_TO = 64  # T is a multiple of this: few distinct shapes for a compiler, whole tiles for a GPU
# sequences packed at a time: 20 MB of Python numbers; fewer would leave more padding
PACK_BLOCK = 1 << 16


class Sequences(Protocol):
    """A data set: `dataset[i]` is {"input_ids", "labels"}, each of `lengths[i]` tokens."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class PackedRows(Sequence):
    """Batch rows as sequence indices, kept flat: `rows[i]` is the list of those in row i.

    order: uint32 [N], row after row. ends: int64 [R], where each row ends in `order`.
    """

    def __init__(self, order: np.ndarray, ends: np.ndarray):
        self.order, self.ends = order, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self.ends[index])  # the IndexError at the end stops an iteration
        index %= len(self)
        return self.order[int(self.ends[index - 1]) if index else 0 : end].tolist()


def pack(lengths: ArrayLike, capacity: int, seed: int, epoch: int) -> PackedRows:
    """Batch rows that together hold every sequence exactly once, in an order from (seed, epoch)
    alone.

    The shuffled sequences are packed in blocks of PACK_BLOCK, which bounds the memory. ValueError
    if a sequence is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"sequences of {lengths.min()} to {lengths.max()} tokens do not fit rows of {capacity} "
            "tokens. Encode the data with the max_seq_len that it is trained with."
        )
    rng = np.random.default_rng([seed, epoch])
    order = np.arange(lengths.size, dtype=np.uint32)
    rng.shuffle(order)
    row_lengths = [np.empty(0, dtype=np.int64)]
    for start in range(0, lengths.size, PACK_BLOCK):
        block = order[start : start + PACK_BLOCK]
        rows = _pack_block(lengths[block].tolist(), capacity)
        rows = [rows[i] for i in rng.permutation(len(rows)).tolist()]
        row_lengths.append(np.array([len(row) for row in rows], dtype=np.int64))
        block[:] = block[np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=len(block))]
    return PackedRows(order, np.cumsum(np.concatenate(row_lengths)))


def _pack_block(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, whose order is random.

    Each row begins with the longest sequence left, takes random ones as long as any would fit, and
    ends with the longest that fit into the rest. Compared with best-fit decreasing, which stacks
    equal lengths on each other, this wastes about a third on short sequences, and a row is a mixed
    sample of the data. Linear in the number of sequences.
    """
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # by length, each in random order
    for index in range(len(lengths) - 1, -1, -1):
        waiting[lengths[index]].append(index)
    # bit n is set while n tokens wait: the longest under a bound is one bit operation
    present = 0
    for length, indices in enumerate(waiting):
        present |= bool(indices) << length

    taken = bytearray(len(lengths))
    rows, head = [], 0
    while present:
        row, space = [], capacity
        length = present.bit_length() - 1
        while length > 0:
            indices = waiting[length]
            index = indices.pop()
            if not indices:
                present ^= 1 << length
            taken[index] = 1
            row.append(index)
            space -= length
            longest = present.bit_length() - 1
            if 0 < longest <= space:
                head = taken.index(0, head)
                length = lengths[head]
            else:
                length = (present & ((2 << space) - 1)).bit_length() - 1
        rows.append(row)
    return rows


def collate(
    rows: list[list[dict]], capacity: int, num_rows: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """One micro-batch from lists of sequences: `input_ids`, `labels`, `position_ids`, int64 [B, T].

    A sequence is `{"input_ids", "labels"}`; rows missing up to `num_rows` are all padding. T is the
    longest row, rounded up to a multiple of 64, at most `capacity`. The unused end of a row is a
    document of padding: positions from 0, labels -100. Labels are not shifted (the model does
    that).
    """
    import torch  # seconds, which an --inspect need not wait for

    used = [sum(len(sequence["input_ids"]) for sequence in row) for row in rows]
    longest = max(used, default=0)
    assert len(rows) <= num_rows and longest <= capacity
    T = min(capacity, max(1, -(-longest // ROUND_TO)) * ROUND_TO)
    input_ids = np.full((num_rows, T), pad_id, dtype=np.int64)
    labels = np.full((num_rows, T), IGNORE, dtype=np.int64)
    position_ids = np.empty((num_rows, T), dtype=np.int64)
    count = np.arange(T)
    for b in range(num_rows):
        start = 0
        for sequence in rows[b] if b < len(rows) else ():
            end = start + len(sequence["input_ids"])
            input_ids[b, start:end] = sequence["input_ids"]
            labels[b, start:end] = sequence["labels"]
            labels[b, start] = IGNORE
            position_ids[b, start:end] = count[: end - start]
            start = end
        position_ids[b, start:] = count[: T - start]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
    }


def cut(rows: list, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list]:
    """The micro-batches of a rank: its part of a step's rows, cut into at most `batch_size` and
    about the same size.

    Ranks differ by one row at most. Each gets the same number of micro-batches, an empty one where
    it has no row.
    """
    most_rows = -(-len(rows) // world_size)
    num_micro_batches = -(-most_rows // batch_size)
    mine = np.array_split(np.arange(len(rows)), world_size)[rank]
    return [[rows[i] for i in part] for part in np.array_split(mine, num_micro_batches)]


class PackedBatches:
    """The optimizer steps of a run: item `step` is the list of all micro-batches of that step for
    this rank.

    A step is `rows_per_step` consecutive batch rows of the epoch's packing, by default `batch_size
    * accumulation_steps * world_size`. Rank r takes the r-th part of them, and cuts it into
    micro-batches of at most `batch_size` rows, all of about the same size. So the same sequences
    form a step however they are split; a run that resumes with another number of ranks passes the
    `rows_per_step` that it began with. The last step of an epoch may have fewer rows: an epoch
    trains on every sequence exactly once, and every rank gets the same number of micro-batches (one
    of padding alone where it has no row).

    `max_steps` ends the run early. (seed, epoch, step) alone decide the content of a step, so a run
    resumes at any step without replaying, and the processes of a `DataLoader(batches,
    batch_size=None, sampler=range(first, len(batches)))` read ahead of the model.
    """

    def __init__(
        self,
        dataset: Sequences,
        *,
        batch_size: int,
        accumulation_steps: int,
        max_seq_len: int,
        seed: int,
        epochs: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int,
        max_steps: int | None = None,
        rows_per_step: int | None = None,
    ):
        """Its many arguments are flags of the run, so each is given by its name."""
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation_steps", accumulation_steps),
            ("epochs", epochs),
            ("max_steps", 1 if max_steps is None else max_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}. Give 1 or more.")
        if rows_per_step is None:
            rows_per_step = batch_size * accumulation_steps * world_size
        if rows_per_step < world_size:
            raise ValueError(
                f"a step of {rows_per_step} rows leaves some of {world_size} processes without "
                f"work. Start at most {rows_per_step} processes, or a new run with a larger "
                "batch_size."
            )
        if not len(dataset):
            raise ValueError(
                "the dataset holds no sequence to train on. Give more data, or keep less of it for "
                "validation."
            )
        assert 0 <= rank < world_size
        self.dataset, self.capacity, self.seed, self.pad_id = dataset, max_seq_len, seed, pad_id
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.rows_per_step = rows_per_step
        self._packed: tuple[int, PackedRows | None] = -1, None  # the last packed epoch, its rows
        # the first step after each epoch; packings differ by a row or two
        self._epoch_ends: list[int] = []
        for epoch in range(epochs):
            first = self._epoch_ends[-1] if self._epoch_ends else 0
            if max_steps is not None and first >= max_steps:
                break
            rows = self.rows(epoch)
            if epoch == 0:
                first_packed = self._packed
                used = int(np.sum(dataset.lengths, dtype=np.int64))
                self.padding_ratio = 1 - used / (len(rows) * self.capacity)
            self._epoch_ends.append(first + -(-len(rows) // self.rows_per_step))
        # the one that is needed next, also by processes that are forked from this one
        self._packed = first_packed
        self._num_steps = min(self._epoch_ends[-1], max_steps or self._epoch_ends[-1])

    def __len__(self) -> int:
        return self._num_steps

    def describe(self) -> str:
        """How well the sequences are packed, for the user."""
        return f"{self.padding_ratio:.1%} of the positions are padding"

    def rows(self, epoch: int) -> PackedRows:
        """All batch rows of an epoch as sequence indices, in training order."""
        if self._packed[0] != epoch:
            self._packed = epoch, pack(self.dataset.lengths, self.capacity, self.seed, epoch)
        return self._packed[1]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return int(np.searchsorted(self._epoch_ends, step, side="right"))

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch = self.epoch_of(step)
        begin = (step - (self._epoch_ends[epoch - 1] if epoch else 0)) * self.rows_per_step
        rows = self.rows(epoch)[begin : begin + self.rows_per_step]
        return [
            self.micro_batch(part)
            for part in cut(rows, self.batch_size, self.rank, self.world_size)
        ]

    def micro_batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """The tensors of some batch rows, given as sequence indices."""
        sequences = [[self.dataset[index] for index in row] for row in rows]
        return collate(sequences, self.capacity, max(1, len(rows)), self.pad_id)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))
