"""The rollout benchmark runs, both sides write what was asked for, and its figures hang together."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.engine import Engine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import bench_rollout
from scripts.bench_rollout import ROOT, lengths_of, prompts_of, write_ours, write_theirs

ARGS = SimpleNamespace(prompt_len=12, new_tokens=40, generations=3)


@pytest.fixture
def sides(tmp_path):
    """(transformers' model, engine) of one random network."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                               intermediate_size=64, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path), Engine(model, AutoTokenizer.from_pretrained(ROOT / "model"), 4, 64)


def test_both_sides_write_so_many_tokens_with_their_log_probs(sides):
    theirs, engine = sides
    prompts, lengths = prompts_of(7, ARGS, 6400), [3, 9, 1, 5, 5, 2, 4]
    for answers in (write_theirs(theirs, prompts, lengths, 4, 0.7), write_ours(engine, prompts, lengths, 0.7)):
        assert [len(ids) for ids, _ in answers] == lengths
        for prompt, (ids, log_probs) in zip(prompts, answers):
            logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert log_probs == pytest.approx(expected.tolist(), abs=2e-4)


def test_groups_share_a_prompt_and_lengths_are_drawn():
    prompts = prompts_of(7, ARGS, 6400)
    assert len(prompts) == 7 and prompts[0] == prompts[1] == prompts[2] != prompts[3] == prompts[5] != prompts[6]
    assert all(6 <= len(prompt) <= 12 for prompt in prompts)
    assert lengths_of("equal", 3, ARGS) == [40] * 3
    ragged = lengths_of("ragged", 1000, ARGS)
    assert ragged == lengths_of("ragged", 1000, ARGS) and (min(ragged), max(ragged)) == (8, 40)
    assert sorted(ragged)[500] == pytest.approx(40 / 3, abs=1)


def test_the_figures_hang_together(tmp_path, capsys):
    bench_rollout.main(["--preset", "tiny", "--batch_sizes", "1", "4", "--prompt_len", "10", "--new_tokens", "12",
                        "--rounds", "1", "--generations", "2", "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["lengths"], row["batch_size"], row["answers"]) for row in rows] == [
        ("equal", 1, 2), ("equal", 4, 8), ("ragged", 1, 2), ("ragged", 4, 8)]
    assert rows[1]["tokens"] == 96 and 64 <= rows[3]["tokens"] < 96
    for row in rows:
        assert row["ratio"] == pytest.approx(row["tokens_per_second"]["ours"] / row["tokens_per_second"]["theirs"])
        assert row["tokens_per_second"]["ours"] == pytest.approx(row["tokens"] / row["seconds"]["ours"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.endswith("x")]) == 4


def test_a_checkpoint_is_measured(sides, tmp_path, capsys):
    bench_rollout.main(["--weight", str(tmp_path), "--batch_sizes", "2", "--prompt_len", "10", "--new_tokens", "3",
                        "--rounds", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"{tmp_path} on cpu" in out and len([line for line in out.splitlines() if line.endswith("x")]) == 2


def test_a_shape_beside_a_checkpoint_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_rollout.main(["--preset", "tiny", "--weight", "full_sft"])
    assert "leave one of them out" in capsys.readouterr().err
