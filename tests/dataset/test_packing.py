"""Packing: every sequence once, little waste, the order from (seed, epoch), steps independent of
how they are cut.
"""

import hashlib
import json
import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import packing
from dataset.packing import PackedBatches, collate, pack


class Sequences:
    """A dataset whose sequence i is the token i + 1 repeated: what a batch holds can be read off
    it.
    """

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = np.full(self.lengths[index], index + 1)
        return {"input_ids": ids, "labels": ids.copy()}


def toy_lengths(count=1500, low=30, high=100):
    return np.random.default_rng(1).integers(low, high + 1, count)


def batches_of(dataset, **options):
    given = {
        "batch_size": 4,
        "accumulation_steps": 1,
        "max_seq_len": 512,
        "seed": 3,
        "epochs": 1,
        "pad_id": 0,
    }
    return PackedBatches(dataset, **{**given, **options})


def indices_in(micro_batches):
    """Return, in order of appearance, the indices of the sequences in a list of micro-batches."""
    found = []
    for micro in micro_batches:
        starts = (micro["position_ids"] == 0) & (micro["input_ids"] > 0)
        found += (micro["input_ids"][starts] - 1).tolist()
    return found


@pytest.mark.parametrize(
    "lengths", [[5], [8] * 7, [1] * 20, [8, 1, 7, 2, 6, 3, 5, 4], toy_lengths(300, 1, 8)]
)
def test_pack_uses_every_sequence_once_and_overfills_no_row(lengths):
    rows = pack(lengths, 8, seed=0, epoch=0)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 8 for row in rows)


def test_pack_of_nothing_is_no_row():
    assert list(pack([], 8, seed=0, epoch=0)) == []


def test_pack_finds_the_perfect_packing_of_pairs():
    lengths = [500, 12, 400, 112, 300, 212]
    rows = pack(lengths, 512, seed=0, epoch=0)
    assert sorted(sorted(row) for row in rows) == [[0, 1], [2, 3], [4, 5]]


def pieces_and_remainders():
    rng = np.random.default_rng(2)
    return np.concatenate([np.full(3000, 512), rng.integers(2, 513, 3000)])


@pytest.mark.parametrize(
    "lengths",
    [toy_lengths(), toy_lengths(20000), pieces_and_remainders()],
    ids=["toy", "toy_large", "pieces_and_remainders"],
)
def test_pack_wastes_little(lengths):
    rows = pack(lengths, 512, seed=0, epoch=0)
    assert 1 - lengths.sum() / (512 * len(rows)) < (0.015 if len(lengths) < 2000 else 0.006)


def test_rows_mix_lengths():
    lengths = toy_lengths(5000)
    spread = [np.std(lengths[row]) for row in pack(lengths, 512, seed=0, epoch=0)]
    assert np.mean(spread) > 0.8 * np.std(
        lengths
    )  # rows of like lengths, as best-fit decreasing makes, reach 0.25


def test_order_derives_from_seed_and_epoch():
    lengths = toy_lengths()
    first = list(pack(lengths, 512, seed=1, epoch=0))
    assert first == list(pack(lengths, 512, seed=1, epoch=0))
    assert first != list(pack(lengths, 512, seed=1, epoch=1))
    assert first != list(pack(lengths, 512, seed=2, epoch=0))


def test_one_block_packs_as_recorded_runs_did():
    rows = list(pack(toy_lengths(), 512, seed=1, epoch=2))
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "556ae045a9d6fd41"


def test_blocks_lose_no_sequence_and_waste_little_more(monkeypatch):
    lengths = toy_lengths(20_000)
    monkeypatch.setattr(packing, "PACK_BLOCK", 3000)
    rows = pack(lengths, 512, seed=0, epoch=0)
    assert sorted(chain(*rows)) == list(range(20_000))
    assert max(lengths[row].sum() for row in rows) <= 512
    assert 1 - lengths.sum() / (512 * len(rows)) < 0.015
    assert (
        abs(np.corrcoef(list(chain(*rows)), np.arange(20_000))[0, 1]) < 0.03
    )  # each block is a sample of the whole
    assert list(rows) != list(pack(lengths, 512, seed=0, epoch=1))


def test_packing_takes_bounded_memory(monkeypatch):
    lengths = toy_lengths(60_000).astype(np.int32)
    monkeypatch.setattr(packing, "PACK_BLOCK", 2000)
    tracemalloc.start()
    try:
        rows = pack(lengths, 512, seed=0, epoch=0)
        resident, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert resident < 8 * len(lengths) and len(rows) > 5000
    assert (
        peak < 16 * len(lengths) + 500 * 2000
    )  # lists of the whole would take over 100 bytes a sequence


def test_rows_are_a_sequence():
    rows = pack([5, 3, 8, 2, 2, 2], 8, seed=0, epoch=0)
    listed = [rows[i] for i in range(len(rows))]
    assert (
        list(rows) == listed == rows[:]
        and rows[-1] == listed[-1]
        and rows[1:3] == listed[1:3]
        and rows[7:] == []
    )
    assert sorted(chain(*listed)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_order_carries_nothing_of_the_order_on_disk():
    order = np.array(list(chain(*pack([64] * 4000, 512, seed=0, epoch=0))))
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.06  # four standard deviations


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_pack_refuses_lengths_that_no_row_holds(lengths):
    with pytest.raises(ValueError, match=r"do not fit rows of 8 tokens.*max_seq_len"):
        pack(lengths, 8, seed=0, epoch=0)


def test_pack_is_fast():
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    start = time.process_time()
    pack(lengths, 512, seed=0, epoch=0)
    assert time.process_time() - start < 3  # measured 0.3; a quadratic search takes minutes


def test_collate_by_hand():
    sequences = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [4, 3, 2, 1], "labels": [-100, -100, 2, 1]},
    ]
    batch = collate([sequences[:2], sequences[2:]], capacity=8, num_rows=3, pad_id=0)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 0, 0, 0],
        [4, 3, 2, 1, 0, 0, 0, 0],
        [0] * 8,
    ]
    n = -100
    assert batch["labels"].tolist() == [[n, 6, 7, n, 9, n, n, n], [n, n, 2, 1, n, n, n, n], [n] * 8]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 0, 1, 2],
        [0, 1, 2, 3, 0, 1, 2, 3],
        list(range(8)),
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("longest", "width"), [(1, 64), (64, 64), (65, 128), (300, 300)])
def test_collate_trims_to_the_longest_row(longest, width):
    sequence = {"input_ids": [1] * longest, "labels": [1] * longest}
    assert collate([[sequence], []], capacity=300, num_rows=2, pad_id=0)["input_ids"].shape == (
        2,
        width,
    )


def test_collate_leaves_the_dataset_as_it_is():
    sequence = {"input_ids": np.array([7, 8]), "labels": np.array([7, 8])}
    collate([[sequence]], capacity=8, num_rows=1, pad_id=0)
    assert sequence["labels"].tolist() == [7, 8]


def test_each_epoch_trains_on_every_sequence_once():
    dataset = Sequences(toy_lengths(700))
    batches = batches_of(dataset, batch_size=3, accumulation_steps=2, epochs=3)
    by_epoch = [[], [], []]
    for step, micro_batches in enumerate(batches):
        by_epoch[batches.epoch_of(step)] += indices_in(micro_batches)
    assert step == len(batches) - 1
    assert all(sorted(indices) == list(range(700)) for indices in by_epoch)
    assert by_epoch[0] != by_epoch[1]


def test_a_step_holds_the_same_however_it_is_split():
    dataset = Sequences(toy_lengths(500))

    def steps(batch_size, accumulation_steps, world_size=1):
        runs = [
            batches_of(
                dataset,
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
                rank=rank,
                world_size=world_size,
                epochs=2,
            )
            for rank in range(world_size)
        ]
        return [list(chain(*map(indices_in, step))) for step in zip(*runs, strict=True)]

    whole = steps(12, 1)
    assert len(whole) > 4
    assert (
        whole
        == steps(3, 4)
        == steps(1, 12)
        == steps(6, 1, world_size=2)
        == steps(1, 4, world_size=3)
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "world_size"),
    [(12, 1, 1), (5, 1, 1), (4, 1, 2), (3, 2, 3), (1, 1, 5), (2, 9, 7), (1, 1, 12), (64, 1, 8)],
)
def test_a_run_goes_on_with_another_number_of_ranks(batch_size, accumulation_steps, world_size):
    dataset = Sequences(toy_lengths(400))
    whole = batches_of(dataset, batch_size=6, accumulation_steps=2, epochs=2)
    runs = [
        batches_of(
            dataset,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            epochs=2,
            world_size=world_size,
            rows_per_step=12,
        )
        for rank in range(world_size)
    ]
    assert len(whole) > 4
    first_epoch = []
    for step, expected in enumerate(whole):
        ranks = [run[step] for run in runs]
        first_epoch += chain(*map(indices_in, ranks)) if whole.epoch_of(step) == 0 else []
        assert list(chain(*map(indices_in, ranks))) == indices_in(expected)
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
        sizes = [[len(micro["input_ids"]) for micro in micro_batches] for micro_batches in ranks]
        assert max(chain(*sizes)) <= batch_size
        assert all(max(of_rank) - min(of_rank) <= 1 for of_rank in sizes)
    assert sorted(first_epoch) == list(range(400))


def test_micro_batches_are_of_like_size():
    (micro_batches,) = batches_of(
        Sequences([8] * 5), batch_size=4, accumulation_steps=2, max_seq_len=8
    )
    assert [len(micro["input_ids"]) for micro in micro_batches] == [3, 2]


def test_a_step_with_fewer_rows_than_ranks_is_refused():
    with pytest.raises(
        ValueError,
        match=r"a step of 3 rows leaves some of 4 processes without work\. Start at most 3",
    ):
        batches_of(Sequences([8] * 20), world_size=4, rows_per_step=3)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_give_what_indexing_gives(context):
    batches = batches_of(Sequences(toy_lengths(300)), batch_size=2, accumulation_steps=2, epochs=2)
    first = 3
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=2,
        multiprocessing_context=context,
    )
    loaded = list(loader)
    assert len(loaded) == len(batches) - first > 10
    for step, micro_batches in enumerate(loaded, start=first):
        for micro, expected in zip(micro_batches, batches[step], strict=True):
            assert micro.keys() == expected.keys() and all(
                torch.equal(micro[name], expected[name]) for name in micro
            )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_get_the_same_number_of_micro_batches(world_size):
    dataset = Sequences([8] * 21)  # 21 full rows: the last step is short for every world size
    runs = [
        batches_of(
            dataset,
            batch_size=2,
            accumulation_steps=2,
            max_seq_len=8,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    seen = []
    for step in zip(*runs, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1
        assert all(
            micro["input_ids"].shape[0] >= 1 for micro_batches in step for micro in micro_batches
        )
        seen += chain(*map(indices_in, step))
    assert sorted(seen) == list(range(21))


def test_a_rank_without_rows_gets_padding_alone():
    (micro_batches,) = batches_of(Sequences([8]), max_seq_len=8, rank=1, world_size=2)
    (micro,) = micro_batches
    assert micro["labels"].tolist() == [[-100] * 8]
    assert micro["position_ids"].tolist() == [list(range(8))]


def test_a_later_step_is_built_without_reading_what_came_before():
    dataset = Sequences(toy_lengths(900))
    options = {"batch_size": 2, "accumulation_steps": 2, "epochs": 2}
    whole = list(batches_of(dataset, **options))
    first = len(whole) - 5
    read = []
    dataset.__class__ = type(
        "Watched",
        (Sequences,),
        {
            "__getitem__": lambda self, index: (
                read.append(index) or Sequences.__getitem__(self, index)
            )
        },
    )
    batches = batches_of(dataset, **options)
    rest = [batches[step] for step in range(first, len(batches))]
    assert len(rest) == 5
    for expected, micro_batches in zip(whole[first:], rest, strict=True):
        for a, b in zip(expected, micro_batches, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(read) == sorted(chain(*map(indices_in, rest)))


def test_max_steps_ends_the_run():
    dataset = Sequences(toy_lengths(900))
    whole = list(batches_of(dataset, epochs=2))
    cut = batches_of(dataset, epochs=2, max_steps=len(whole) - 3)
    assert len(cut) == len(list(cut)) == len(whole) - 3
    assert indices_in(cut[5]) == indices_in(whole[5])
    assert len(batches_of(dataset, epochs=1, max_steps=10_000)) == len(
        batches_of(dataset, epochs=1)
    )
    with pytest.raises(IndexError):
        cut[len(cut)]


def test_padding_ratio_is_what_a_row_leaves_unused():
    assert batches_of(Sequences([6, 6, 2]), max_seq_len=8).padding_ratio == pytest.approx(
        1 - 14 / 16
    )


@pytest.mark.parametrize("name", ["batch_size", "accumulation_steps", "epochs", "max_steps"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0. Give 1 or more"):
        batches_of(Sequences([3]), **{name: 0})


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no sequence to train on"):
        batches_of(Sequences([]))
