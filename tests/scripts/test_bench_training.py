"""The training benchmark: both sides compute the same, and the rows are consistent."""

import pytest
import torch

from dataset.files.jsonl import dump_row
from dataset.packing import PackedBatches
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import bench
from scripts.benchmarks.steps import FirstRows, Ours, Theirs, pad
from tests.helpers.bench import read_table, run_bench
from tests.helpers.networks import SMALL
from trainer.runtime.run import Run
from trainer.runtime.stage_args import TrainArgs


def sequences(count=23):
    rows = FirstRows()
    for _ in range(count):
        input_ids = torch.randint(3, 97, (int(torch.randint(3, 40, ())),))
        labels = torch.where(torch.rand(len(input_ids)) < 0.5, input_ids, -100)
        labels[0] = -100
        rows.append({"input_ids": input_ids.numpy(), "labels": labels.numpy()})
    return rows


def two_sides(size, rows=None, **shape):
    """(ours, transformers' of `size` sequences in a batch) on the same rows."""
    run, settings = Run(TrainArgs(device="cpu")), TrainArgs()
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL | shape)).train()
    cut = {"batch_size": 2, "accumulation_steps": 1, "max_seq_len": 64, "seed": 0, "epochs": 1}
    batches = PackedBatches(rows or sequences(), **cut, pad_id=0)
    return Ours(model, run, batches, settings), Theirs(model, run, batches, size)


@pytest.mark.parametrize("qk_norm, name", [(True, "Qwen3ForCausalLM"), (False, "LlamaForCausalLM")])
@pytest.mark.parametrize("size", [0, 3])
def test_both_sides_learn_the_same(qk_norm, name, size):
    """Same loss on the same sequences, before and after updates, however theirs are cut into
    batches.
    """
    ours, theirs = two_sides(size, qk_norm=qk_norm)
    assert type(theirs.model).__name__ == name
    for step in range(3):
        assert ours.step(step) == pytest.approx(theirs.step(step), abs=1e-4)
    torch.testing.assert_close(
        dict(ours.model.state_dict()), dict(theirs.model.state_dict()), atol=2e-4, rtol=0
    )


def test_both_sides_see_the_same_tokens():
    ours, theirs = two_sides(4)
    for step in range(len(ours.batches)):
        packed = torch.cat([x["input_ids"][x["labels"] != -100] for x in ours.batches[step]])
        padded = torch.cat(
            [x["input_ids"][x["labels"] != -100] for x in theirs.micro_batches(step)]
        )
        assert packed.tolist() == padded.tolist()
        assert all(len(x["input_ids"]) <= 4 for x in theirs.micro_batches(step))


def test_work_of_a_step():
    rows = FirstRows(
        {"input_ids": torch.ones(n).long().numpy(), "labels": torch.ones(n).long().numpy()}
        for n in (40, 50)
    )
    ours, theirs = two_sides(0, rows)
    # two batch rows of 64, whose ends are documents of padding
    pairs = sum(n * (n + 1) // 2 for n in (40, 24, 50, 14))
    assert ours.work(0) == (128, 88, pairs)
    assert theirs.work(0) == (100, 100, 2 * 50 * 51 // 2)


def test_pad():
    rows = [
        {"input_ids": torch.tensor(x).numpy(), "labels": torch.tensor([-100, *x[1:]]).numpy()}
        for x in ([5, 6, 7], [8, 9])
    ]
    padded = pad(rows, pad_id=1)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert padded["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.fixture
def short_rate(monkeypatch):
    monkeypatch.setattr("trainer.runtime.costs.matrix_rate", lambda device, dtype: 1e11)


@pytest.fixture
def chats(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.token_dataset.DEFAULT_CACHE", tmp_path / "cache")
    turns = [
        {"role": "user", "content": "How much is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    rows = (dump_row({"conversations": turns * (1 + i % 3)}) for i in range(24))
    (tmp_path / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    return str(tmp_path / "chats.jsonl")


FLAGS = "--steps 3 --batch_size 1 --max_seq_len 128 --device cpu"


def test_command(chats, short_rate, tmp_path, capsys):
    words = f"training --preset tiny --data_path {chats} --rows 20 --warmup 1 {FLAGS}"
    found = run_bench(tmp_path, words)
    (row,) = found["rows"]
    assert row["losses"] == pytest.approx(row["reference_losses"], abs=1e-3)
    assert len(row["losses"]) == 3
    assert row["limit"] == row["reference_positions"] / row["real_tokens"] >= 1
    assert row["ratio"] == pytest.approx(row["targets_per_s"] / row["reference_targets_per_s"])
    assert row["ratio_of_limit"] == row["ratio"] / row["limit"]
    assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
    assert row["positions"] == 3 * 128 and 0 < row["targets"] < row["real_tokens"]
    assert found["dtype"] == "float32" and row["matrix_gflops_per_s"] == 100
    (shown,) = read_table(capsys.readouterr().out)
    assert (shown["preset"], shown["reference"]) == ("tiny", "Qwen3ForCausalLM")


@pytest.mark.parametrize(
    "qk_norm, name", [(True, "Qwen3MoeForCausalLM"), (False, "GraniteMoeSharedForCausalLM")]
)
def test_mixtures_of_experts_have_the_same_losses(
    chats, short_rate, tmp_path, monkeypatch, qk_norm, name
):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    shape = SMALL | {"vocab_size": 6400, "qk_norm": qk_norm} | experts
    monkeypatch.setattr(
        "trainer.runtime.weights.config_from_args",
        lambda args, device, vocab_size: MiniMindConfig(**shape),
    )
    words = f"training --preset minimind-3-moe --data_path {chats} --warmup 0 {FLAGS}"
    (row,) = run_bench(tmp_path, f"{words} --reference_batch 2")["rows"]
    assert row["reference"] == name
    assert row["losses"] == pytest.approx(row["reference_losses"], abs=1e-4)


def test_errors(chats, capsys):
    message = r"the rows fill 1 steps: give more of them, or make --warmup 2 plus --steps 10"
    with pytest.raises(ValueError, match=message):
        bench.main(f"training --preset tiny --data_path {chats} --rows 2 --device cpu".split())
    with pytest.raises(SystemExit):
        bench.main(["training", "--steps", "0"])
    assert "--steps 0: give more than 0" in capsys.readouterr().err
