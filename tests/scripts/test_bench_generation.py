"""Decoding and rollouts: both sides write what they are asked for, and the rows are consistent."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.engine import Engine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import bench
from scripts.benchmarks.generation import sample_engine, sample_reference
from scripts.benchmarks.rollout import draw_lengths, draw_prompts
from tests.helpers.bench import read_table, run_bench
from tests.helpers.networks import SMALL
from trainer.runtime.arguments import ROOT

ARGS = SimpleNamespace(prompt_len=12, new_tokens=40, generations=3)


@pytest.fixture
def sides(tmp_path):
    """(transformers' model, engine) of one random network."""
    config = MiniMindConfig(**SMALL | {"vocab_size": 6400}, initializer_range=0.2)
    model = MiniMindForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = Engine(model, AutoTokenizer.from_pretrained(ROOT / "model"), 4, 64)
    return AutoModelForCausalLM.from_pretrained(tmp_path), engine


def test_both_sides_sample_so_many_tokens_with_their_log_probs(sides):
    theirs, engine = sides
    prompts, lengths = draw_prompts(7, ARGS, 6400), [3, 9, 1, 5, 5, 2, 4]
    for completions in (
        sample_reference(theirs, prompts, lengths, 4, 0.7),
        sample_engine(engine, prompts, lengths, 0.7),
    ):
        assert [len(ids) for ids, _ in completions] == lengths
        for prompt, (ids, log_probs) in zip(prompts, completions):
            logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert log_probs == pytest.approx(expected.tolist(), abs=2e-4)


def test_groups_share_a_prompt_and_lengths_are_drawn():
    prompts = draw_prompts(7, ARGS, 6400)
    assert len(prompts) == 7 and prompts[0] == prompts[1] == prompts[2]
    assert prompts[2] != prompts[3] == prompts[5] != prompts[6]
    assert all(6 <= len(prompt) <= 12 for prompt in prompts)
    assert draw_lengths("equal", 3, ARGS) == [40] * 3
    ragged = draw_lengths("ragged", 1000, ARGS)
    assert ragged == draw_lengths("ragged", 1000, ARGS) and (min(ragged), max(ragged)) == (8, 40)
    assert sorted(ragged)[500] == pytest.approx(40 / 3, abs=1)


def check_rows(found: dict, printed: str) -> None:
    """The ratio is that of the speeds, within the rounds' ratios; the table shows every row."""
    for row in found["rows"]:
        speeds = row["tokens_per_s"] / row["reference_tokens_per_s"]
        assert row["ratio"] == pytest.approx(speeds)
        low, high = row["ratio_range"]
        assert low <= row["ratio"] <= high
    table = read_table(printed)
    assert [row["ratio"] for row in table] == [f"{row['ratio']:#.3g}" for row in found["rows"]]


def test_decoding(tmp_path, capsys):
    flags = "--batch_size 1 3 --context 20 --new_tokens 5 --rounds 2 --device cpu"
    found = run_bench(tmp_path, f"decoding --preset tiny {flags}")
    rows = found["rows"]
    assert [(row["batch_size"], row["engine"]) for row in rows] == [
        *((1, "ours"), (1, "int8"), (3, "ours"), (3, "int8"))
    ]
    for row in rows:
        assert row["context"] == 20 and 0 <= row["same_texts"] <= row["batch_size"]
        if row["engine"] == "ours":
            assert row["same_texts"] == row["batch_size"] and row["bandwidth_ratio"] > 0
    assert found["device"] == "cpu" and found["bandwidth"] > 0
    check_rows(found, capsys.readouterr().out)


def test_rollout(tmp_path, capsys):
    flags = "--prompt_len 10 --new_tokens 12 --rounds 1 --generations 2 --device cpu"
    found = run_bench(tmp_path, f"rollout --preset tiny --batch_sizes 1 4 {flags}")
    rows = found["rows"]
    assert [(row["lengths"], row["batch_size"], row["completions"]) for row in rows] == [
        *(("equal", 1, 2), ("equal", 4, 8), ("ragged", 1, 2), ("ragged", 4, 8))
    ]
    assert rows[1]["tokens"] == 96 and 64 <= rows[3]["tokens"] < 96
    check_rows(found, capsys.readouterr().out)


def test_a_rollout_of_a_checkpoint(sides, tmp_path):
    flags = "--batch_sizes 2 --prompt_len 10 --new_tokens 3 --rounds 1 --device cpu --weight"
    AutoTokenizer.from_pretrained(ROOT / "model").save_pretrained(tmp_path)
    found = run_bench(tmp_path, f"rollout {flags}", str(tmp_path))
    assert found["arguments"]["weight"] == str(tmp_path) and len(found["rows"]) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        ("rollout --preset tiny --weight full_sft", "leave one of them out"),
        ("rollout --batch_sizes 0", "above 0"),
        ("decoding --context 0", "above 0"),
        ("decoding --rounds 0", "--rounds 0"),
    ],
)
def test_flags_that_cannot_work(words, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert message in capsys.readouterr().err
