"""What the stages cost beside SFT: the rows that both sides get, the medians and the ratios."""

import json

import pytest

from scripts import bench_stages


def test_ratios_are_those_of_medians_over_the_rounds(monkeypatch, tmp_path, capsys):
    seen = []

    def train(script, path, folder, args, *flags):
        seen.append((script, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], flags))
        own = [flag for flag in flags if flag == "on_the_fly"]
        times = {"train_full_sft": [5.0, 4.0, 6.0], "train_dpo": [12.0, 10.0, 30.0]}[script]
        return times[len(seen) // 2 % 3 - 1] + len(own), 2.0 if script == "train_dpo" else 1.6

    monkeypatch.setattr(bench_stages, "train", train)
    bench_stages.main(["--stages", "dpo", "--rows", "5", "--json", str(tmp_path / "bench.json")])
    row = json.loads((tmp_path / "bench.json").read_text())["stages"][0]
    assert (row["seconds"], row["sft_seconds"]) == (12.0, 5.0) and row["time_ratio"] == pytest.approx(2.4)
    assert row["memory_ratio"] == pytest.approx(1.25)
    (start, _, flags), (_, plain, _), (_, pairs, _) = seen[:3]
    assert start == "train_full_sft" and "none" in flags  # the network that both start from
    assert len(pairs) == 5 and len(plain) == 10
    assert [one["conversations"] for one in plain] == [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert "2.40" in capsys.readouterr().out


def test_a_stage_that_fails_is_named_with_what_it_said(tmp_path):
    args = bench_stages.parse_args(bench_stages.BenchArgs, ["--device", "cpu"])
    with pytest.raises(ValueError, match=r"(?s)train_full_sft.py .* ended with 1: .*no_such_file"):
        bench_stages.train("train_full_sft", tmp_path / "no_such_file.jsonl", tmp_path, args, "--from_weight", "none")
