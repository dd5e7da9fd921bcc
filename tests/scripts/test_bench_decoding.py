"""The decoding benchmark runs, both sides write the same text, and its figures hang together."""

import json

import pytest

from scripts import bench_decoding


def test_the_figures_hang_together(tmp_path):
    bench_decoding.main(["--preset", "tiny", "--batch_size", "1", "3", "--context", "20", "--new_tokens", "5", "--rounds", "1",
                         "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["batch_size"], row["context"]) for row in figures["rows"]] == [(1, 20), (3, 20)]
    for row in figures["rows"]:
        assert row["same_texts"] == row["batch_size"]
        for kind in ("ours", "int8"):
            assert row["ratio"][kind] == pytest.approx(row["ms_per_step"]["theirs"] / row["ms_per_step"][kind])
            assert row["tokens_per_second"][kind] == pytest.approx(row["batch_size"] / row["ms_per_step"][kind] * 1e3)
