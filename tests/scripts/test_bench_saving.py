"""The saving benchmark runs and its figures hang together."""

import json

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import bench_saving


def test_the_figures_hang_together(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.lm_dataset.DEFAULT_CACHE", tmp_path / "cache")
    bench_saving.main(["--preset", "tiny", "--batch_size", "1", "--max_seq_len", "128", "--steps", "1", "--rounds", "2",
                       "--save_interval", "10", "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    row, = json.loads((tmp_path / "figures.json").read_text())
    floats = 3 * MiniMindForCausalLM(MiniMindConfig.from_preset("tiny")).num_parameters()  # weights and two moments
    assert 1 < row["checkpoint_mb"] * 1e6 / (4 * floats) < 1.1  # float32, and a little beside them
    for kind in ("waited for", "in the background"):
        cost = max(0.0, row["cost_seconds"][kind])
        assert row["share_of_training"][kind] == cost / (10 * row["step_seconds"] + cost)
        assert row["stall_seconds"][kind] > 0
