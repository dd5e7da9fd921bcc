"""The ladder's table against hand-computed figures, what it keeps and refuses, and its picture."""

import json

import pytest

from scripts import ladder
from trainer import train_full_sft


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Two rungs without training, counted; the flags of a run of both."""
    calls = []

    class Bench:
        def __init__(self, args, world):
            self.args, self.base = args, args.from_weight

    def one(bench, seed):
        """First."""
        calls.append(("one", seed))
        return {"skill": (0.5, 0.5 + seed / 10), "other": (0.9, 0.8)}

    def two(bench, seed):
        """Second."""
        calls.append(("two", seed))
        return {"skill": (0.25, 0.75)}

    monkeypatch.setattr(ladder, "Bench", Bench)
    monkeypatch.setattr(ladder, "RUNGS", {"one": one, "two": two})
    monkeypatch.setattr(ladder, "AIMS", {
        ("one", "skill"): ("after", 0.65), ("one", "other"): ("gain", -0.02), ("two", "skill"): ("gain", 0)})
    monkeypatch.setattr(ladder, "write_world", lambda *_: None)
    return calls, ["--rungs", "one", "two", "--from_weight", "base", "--save_dir", str(tmp_path / "ladder")]


def test_means_and_intervals_are_those_of_students_t(fake, tmp_path, capsys):
    calls, flags = fake
    ladder.main([*flags, "--json", str(tmp_path / "ladder.json")])
    assert calls == [(rung, seed) for rung in ("one", "two") for seed in (1, 2, 3)]
    skill, other, second = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    assert skill["before"] == 0.5 and skill["after"] == pytest.approx(0.7) and skill["gain"] == pytest.approx(0.2)
    assert skill["half"] == pytest.approx(4.303 * 0.1 / 3**0.5)  # deviations -0.1, 0, 0.1: standard deviation 0.1
    assert skill["reached"] is True and other["reached"] is False and other["half"] == 0
    assert second["reached"] is True and second["half"] == 0
    out = capsys.readouterr().out
    assert "gain > -2: missed" in out and "after > 65: reached" in out and "70.0 ± 24.8" in out
    assert (tmp_path / "ladder" / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_not_measured_again_unless_asked_otherwise(fake, capsys):
    calls, flags = fake
    ladder.main(flags)
    ladder.main([*flags, "--seeds", "1", "2", "3", "4"])
    assert calls[6:] == [("one", 4), ("two", 4)]
    with pytest.raises(ValueError, match=r"was measured with .*'limit': 200.* choose another --save_dir, or --overwrite"):
        ladder.main([*flags, "--limit", "10"])
    ladder.main([*flags, "--limit", "10", "--seeds", "1", "--overwrite"])
    assert calls[8:] == [("one", 1), ("two", 1)]
    assert "± nan" in capsys.readouterr().out  # one seed has no interval


def test_a_gain_of_which_the_interval_holds_0_is_not_reached(monkeypatch):
    monkeypatch.setattr(ladder, "AIMS", {("a", "x"): ("gain", 0)})
    rows = [ladder.table_rows("a", [{"x": (0.5, 0.5 + gain)} for gain in gains])[0]
            for gains in ((0.1, 0.1, 0.4), (0.2, 0.21), (0.1,))]
    assert [row["reached"] for row in rows] == [False, True, True]
    assert rows[0]["gain"] == pytest.approx(0.2) and rows[0]["half"] == pytest.approx(4.303 * 0.1)


def test_rungs_train_and_measure_for_real(tmp_path, capsys):
    flags = ["--save_dir", str(tmp_path), "--max_steps", "1", "--limit", "1", "--seeds", "1", "--device", "cpu"]
    train_full_sft.main(["--from_weight", "none", "--hidden_size", "32", "--num_hidden_layers", "2", "--max_steps", "1",
                         "--save_dir", str(tmp_path), "--device", "cpu", "--val_share", "0"])
    ladder.main([*flags, "--from_weight", str(tmp_path / "full_sft_32x2"), "--rungs", "lora", "dpo", "reward", "reason",
                 "--json", str(tmp_path / "ladder.json")])
    rows = json.loads((tmp_path / "ladder.json").read_text())["rows"]
    assert {row["rung"] for row in rows} == {"lora", "dpo", "reward", "reason"} and len(rows) == 8
    assert all(0 <= row[side] <= 1 for row in rows for side in ("before", "after"))
    assert "reward: held-out pairs" in {f"{row['rung']}: {row['what']}" for row in rows}
    assert (tmp_path / "lora-1_32x2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("flags, message", [
    (["--rungs", "three"], "--rungs three: there are one, two"), (["--seeds", "1", "1"], "different numbers")])
def test_bad_flags_are_refused(flags, message, fake, capsys):
    with pytest.raises(SystemExit):
        ladder.main([*fake[1], *flags])
    assert message in capsys.readouterr().err
