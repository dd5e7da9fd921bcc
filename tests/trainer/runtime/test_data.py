"""The data of a run: the toy world in place of files, the held-out part, steps, one pass."""

from types import SimpleNamespace

import pytest
import torch

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import PackedBatches
from dataset.pair_dataset import PairBatches, PairDataset
from tests.helpers.checkpoints import load_tokenizer
from tests.helpers.pair_rows import write_pairs
from tests.helpers.toy_runs import toy_run
from trainer.runtime import data, usual_files
from trainer.runtime.data import (
    open_datasets,
    single_pass,
    split_validation,
    training_batches,
    use_default_data,
)
from trainer.runtime.run import Inspected


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def make_run(tmp_path, rows):
    """make_run(**flags): a run on the short text rows, and one with data_path=None on nothing."""

    def make(**flags):
        paths = {"data_path": [str(rows["pretrain"])], "max_seq_len": 64, "num_proc": 1}
        given = {**paths, "cache_dir": str(tmp_path / "cache"), **flags}
        run = toy_run(tmp_path / "out" / "toy", **{k: v for k, v in given.items() if v is not None})
        run.args.given -= paths.keys()
        return run

    return make


def open_texts(run, tokenizer, **options):
    return open_datasets(run, tokenizer, PretrainDataset, ["pretrain_train.jsonl"], **options)


# --- opening ---


def test_the_files_are_read_with_the_flags_and_reported(make_run, tokenizer, capsys):
    run = make_run(val_ratio=0.1, max_seq_len=32)
    train_set, val_sets = open_texts(run, tokenizer)
    assert train_set.max_seq_len == 32 and list(val_sets) == ["held_out"]
    assert len(train_set) + len(val_sets["held_out"]) >= 60
    assert "60 read, 60 used" in capsys.readouterr().out


def test_bad_rows_stop_the_run_or_are_skipped(make_run, tokenizer, rows, capsys):
    with open(rows["pretrain"], "a") as file:
        file.write("{nope\n")
    with pytest.raises(ValueError, match=r"text\.jsonl:61: "):
        open_texts(make_run(), tokenizer)
    open_texts(make_run(bad_rows="skip"), tokenizer)
    assert "1 skipped" in capsys.readouterr().out


def test_options_of_a_stage_reach_its_dataset(make_run, tokenizer, rows):
    run = make_run(data_path=[str(rows["sft"])], val_ratio=0.0)
    plain = open_datasets(run, tokenizer, SFTDataset, [], seed=1)[0]
    prompted = open_datasets(run, tokenizer, SFTDataset, [], seed=1, system_prompt_ratio=1.0)[0]
    assert sum(prompted.lengths) > sum(plain.lengths)


def test_inspecting_prints_sequences_and_ends_the_run(make_run, tokenizer, capsys):
    run = make_run(inspect=2)
    with pytest.raises(Inspected):
        open_texts(run, tokenizer)
    out = capsys.readouterr().out
    assert "sequence 1" in out and "make" in out and "held out" not in out


# --- the toy world ---


def test_without_data_the_toy_world_is_written_and_used(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "TOY", tmp_path / "toy")
    run = make_run(data_path=None)
    use_default_data(run, ["sft_train.jsonl@0.5", "lora_train.jsonl"], "sft_heldout.jsonl")
    toy = str(tmp_path / "toy")
    assert run.args.data_path == [f"{toy}/sft_train.jsonl@0.5", f"{toy}/lora_train.jsonl"]
    assert run.args.val_path == [f"{toy}/sft_heldout.jsonl"]
    assert (tmp_path / "toy" / "sft_train.jsonl").is_file()
    assert "no --data_path: learning from the toy world" in capsys.readouterr().out


def test_without_data_a_file_of_the_usual_name_is_used(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(usual_files, "DATASET", tmp_path)
    path = tmp_path / "sft_t2t_mini.jsonl"
    path.write_text("{}")
    run = make_run(data_path=None)
    use_default_data(run, ["sft_train.jsonl"], "sft_heldout.jsonl")
    assert run.args.data_path == [str(path)] and run.args.val_path == []
    monkeypatch.setattr(data, "TOY", tmp_path / "toy")
    run = make_run(data_path=["toy"])
    use_default_data(run, ["sft_train.jsonl"], "sft_heldout.jsonl")
    assert run.args.data_path == [str(tmp_path / "toy" / "sft_train.jsonl")]
    assert f"no --data_path: learning from {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, val_path",
    [({"val_ratio": 0.1}, []), ({"val_max_rows": 5}, []), ({"val_path": ["mine"]}, ["mine"])],
)
def test_who_chooses_held_out_rows_does_not_get_the_toy_worlds(flags, val_path, make_run):
    run = make_run(data_path=None, **flags)
    use_default_data(run, ["dpo_train.jsonl"], "dpo_heldout.jsonl")
    assert run.args.val_path == val_path


def test_files_that_are_given_are_left_alone(make_run, rows, monkeypatch):
    monkeypatch.setattr(data, "TOY", None)
    run = make_run()
    use_default_data(run, ["sft_train.jsonl"], "sft_heldout.jsonl")
    assert run.args.data_path == [str(rows["pretrain"])] and run.args.val_path == []


# --- the held-out part ---


def test_a_fraction_is_held_out_by_the_seed_and_at_most_some_rows(make_run, tokenizer):
    def held_out(**flags):
        train_set, val_sets = open_texts(make_run(**flags), tokenizer)
        parts = [{bytes(row["input_ids"]) for row in x} for x in (train_set, val_sets["held_out"])]
        assert not parts[0] & parts[1]
        return parts[1]

    first = held_out(val_ratio=0.3)
    assert held_out(val_ratio=0.3) == first != held_out(val_ratio=0.3, seed=1)
    assert 10 < len(first) < 26 and len(held_out(val_ratio=0.3, val_max_rows=5)) == 5


def test_nothing_is_held_out_of_a_ratio_of_0(make_run, tokenizer):
    assert open_texts(make_run(val_ratio=0.0), tokenizer)[1] == {}


def test_each_validation_file_is_a_set_by_its_name(make_run):
    run = make_run(val_path=["a/zh.jsonl.xz", "b/en.jsonl"])
    train_set, val_sets = split_validation(run, "train", lambda paths: tuple(paths))
    assert train_set == "train"
    assert val_sets == {"zh": ("a/zh.jsonl.xz",), "en": ("b/en.jsonl",)}
    run = make_run(val_path=["a/zh.jsonl", "b/zh.jsonl.gz"])
    with pytest.raises(ValueError, match="two files are called 'zh', and their metrics would be"):
        split_validation(run, "train", lambda paths: paths)


# --- steps and passes ---


def rows_in(micro_batches):
    return [row for micro in micro_batches for row in micro["input_ids"].tolist()]


def test_the_steps_are_cut_by_the_flags(make_run, tokenizer):
    run = make_run(val_ratio=0.0, batch_size=3, accumulation_steps=2, epochs=9, max_steps=5)
    train_set, _ = open_texts(run, tokenizer)
    steps = training_batches(run, train_set, tokenizer.pad_token_id)
    assert isinstance(steps, PackedBatches) and len(steps) == 5
    assert [micro["input_ids"].shape for micro in steps[0]] == [(3, 64)] * 2
    one_by_one = make_run(val_ratio=0.0, batch_size=1, accumulation_steps=6, epochs=9, max_steps=5)
    again = training_batches(one_by_one, train_set, tokenizer.pad_token_id)
    assert rows_in(steps[1]) == rows_in(again[1])


def test_a_resumed_run_keeps_the_batch_rows_of_a_step(make_run, tokenizer):
    run = make_run(val_ratio=0.0, batch_size=2)
    run.rows_per_step = 4  # by the checkpoint
    train_set, _ = open_texts(run, tokenizer)
    steps = training_batches(run, train_set, tokenizer.pad_token_id)
    assert sum(len(micro["input_ids"]) for micro in steps[0]) == 4


def test_ranks_share_the_rows_of_a_step(make_run, tokenizer):
    def rows_of(world_size, rank, batch_size):
        run = make_run(val_ratio=0.0, batch_size=batch_size)
        run.ranks = SimpleNamespace(**{**vars(run.ranks), "rank": rank, "world_size": world_size})
        run.rows_per_step = 4
        train_set, _ = open_texts(run, tokenizer)
        return rows_in(training_batches(run, train_set, tokenizer.pad_token_id)[0])

    alone = rows_of(1, 0, 4)
    shared = rows_of(2, 0, 2) + rows_of(2, 1, 2)
    assert sorted(alone) == sorted(shared)


def test_a_pass_visits_every_sequence_once_over_all_ranks(make_run, tokenizer):
    run = make_run(val_ratio=0.0)
    train_set, _ = open_texts(run, tokenizer)

    def targets(rank, world_size):
        ranks = SimpleNamespace(ranks=SimpleNamespace(rank=rank, world_size=world_size))
        sizes = dict(batch_size=2, max_seq_len=64)
        micro_batches = list(single_pass(ranks, train_set, tokenizer.pad_token_id, **sizes))
        return sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)

    assert targets(0, 1) == targets(0, 2) + targets(1, 2)
    assert targets(0, 1) == sum(int((row["labels"][1:] != -100).sum()) for row in train_set)


def test_pairs_are_batched_as_trees(make_run, tokenizer, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    run = make_run(data_path=[str(pairs)], val_ratio=0.0, batch_size=2, epochs=2)
    dataset, _ = open_datasets(run, tokenizer, PairDataset, [])
    steps = training_batches(run, dataset, tokenizer.pad_token_id, PairBatches)
    assert isinstance(steps, PairBatches) and {"tree", "branch", "lengths"} <= steps[0][0].keys()
    sizes = dict(batch_size=4, max_seq_len=64)
    passed = single_pass(run, dataset, tokenizer.pad_token_id, PairBatches, **sizes)
    items = torch.cat([micro["items"] for micro in passed])
    assert sorted(items.tolist()) == list(range(20))
