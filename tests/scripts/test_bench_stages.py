"""The costs of saving, and of the stages compared with SFT: the rows that both sides get, medians
and ratios."""

import json

import pytest

from dataset.files.jsonl import dump_row
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.benchmarks import stages, steps
from tests.helpers.bench import read_table, run_bench


def test_saving(tmp_path, monkeypatch, capsys):
    rows = "".join(dump_row({"text": f"Row {i} of the text. " * 9}) for i in range(40))
    (tmp_path / "pretrain_train.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.setattr("dataset.token_dataset.DEFAULT_CACHE", tmp_path / "cache")
    monkeypatch.setattr(steps, "write_world", lambda level, folder: None)
    monkeypatch.setattr(steps, "TOY", tmp_path)
    flags = "--batch_size 1 --max_seq_len 128 --steps 1 --rounds 2 --save_interval 10 --device cpu"
    rows = run_bench(tmp_path, f"saving --preset tiny {flags}")["rows"]
    assert [row["save"] for row in rows] == ["waited for", "in the background"]
    # weights and two moments
    floats = 3 * MiniMindForCausalLM(MiniMindConfig.from_preset("tiny")).num_parameters()
    for row in rows:
        assert 1 < row["checkpoint_mb"] * 1e6 / (4 * floats) < 1.1  # float32, and a little more
        cost = max(0.0, row["cost_s"])
        assert row["training_fraction"] == cost / (10 * row["step_s"] + cost)
        assert row["stall_s"] > 0
    assert len(read_table(capsys.readouterr().out)) == 2


def test_stages_compare_medians_over_the_rounds(monkeypatch, tmp_path, capsys):
    seen = []
    seconds = {"train_full_sft": [1.0, 5.0, 4.0, 6.0], "train_dpo": [12.0, 10.0, 30.0]}

    def train(script, path, folder, args, *flags):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seen.append((script, rows, flags))
        return seconds[script].pop(0), 2.0 if script == "train_dpo" else 1.6

    monkeypatch.setattr(stages, "train", train)
    (row,) = run_bench(tmp_path, "stages --stages dpo --rows 5")["rows"]
    assert (row["seconds"], row["sft_seconds"]) == (12.0, 5.0)
    assert row["ratio"] == pytest.approx(2.4) and row["ratio_range"] == [12 / 5, 30 / 6]
    assert row["memory_ratio"] == pytest.approx(1.25)
    (start, _, flags), (_, plain, _), (_, pairs, _) = seen[:3]
    assert start == "train_full_sft" and "none" in flags  # the network that both start from
    assert len(pairs) == 5 and len(plain) == 10
    sides = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert [one["conversations"] for one in plain] == sides
    assert read_table(capsys.readouterr().out)[0]["ratio"] == "2.40"


@pytest.mark.slow
def test_a_stage_really_trains(tmp_path, capsys):
    flags = "--rows 12 --rounds 1 --batch_size 2 --max_seq_len 256 --device cpu"
    (row,) = run_bench(tmp_path, f"stages {flags} --stages", "distillation, half on-policy")["rows"]
    assert row["ratio"] == row["seconds"] / row["sft_seconds"] > 0
    assert row["memory_gb"] > 0 and capsys.readouterr().out


def test_a_stage_that_fails_is_named_with_its_message(tmp_path):
    args, path = stages.Args(device="cpu"), tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"(?s)train_full_sft.py .* ended with 2: .*--epochs 0"):
        stages.train("train_full_sft", path, tmp_path, args, "--epochs", "0")
