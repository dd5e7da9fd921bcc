"""The table against hand-computed values, kept results, refused flags, and the picture."""

import json

import pytest

from scripts import evaluate_stages
from trainer import train_full_sft
from trainer.runtime.arguments import parse_args


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Two stages without training, counted; the flags of a run of both."""
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

    monkeypatch.setattr("scripts.stages.bench.Bench", Bench)
    monkeypatch.setattr(evaluate_stages, "STAGES", ("one", "two"))
    functions = {"one": one, "two": two}
    monkeypatch.setattr(evaluate_stages, "stage_function", functions.get)
    monkeypatch.setattr(
        evaluate_stages,
        "AIMS",
        {
            ("one", "skill"): ("after", 0.65),
            ("one", "other"): ("gain", -0.02),
            ("two", "skill"): ("gain", 0),
        },
    )
    monkeypatch.setattr(evaluate_stages, "write_world", lambda *_: None)
    return calls, [
        "--stages",
        "one",
        "two",
        "--from_weight",
        "base",
        "--save_dir",
        str(tmp_path / "out"),
    ]


def test_means_and_intervals_are_those_of_students_t(fake, tmp_path, capsys):
    calls, flags = fake
    evaluate_stages.main([*flags, "--json", str(tmp_path / "table.json")])
    assert calls == [(stage, seed) for stage in ("one", "two") for seed in (1, 2, 3)]
    skill, other, second = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (
        skill["before"] == 0.5
        and skill["after"] == pytest.approx(0.7)
        and skill["gain"] == pytest.approx(0.2)
    )
    assert skill["half"] == pytest.approx(
        4.303 * 0.1 / 3**0.5
    )  # deviations -0.1, 0, 0.1: standard deviation 0.1
    assert skill["reached"] is True and other["reached"] is False and other["half"] == 0
    assert second["reached"] is True and second["half"] == 0
    out = capsys.readouterr().out
    assert "gain > -2: missed" in out and "after > 65: reached" in out and "70.0 ± 24.8" in out
    assert (tmp_path / "out" / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_not_measured_again_unless_asked_otherwise(fake, capsys):
    calls, flags = fake
    evaluate_stages.main(flags)
    evaluate_stages.main([*flags, "--seeds", "1", "2", "3", "4"])
    assert calls[6:] == [("one", 4), ("two", 4)]
    with pytest.raises(
        ValueError,
        match=r"was measured with .*'limit': 200.* choose another --save_dir, or --overwrite",
    ):
        evaluate_stages.main([*flags, "--limit", "10"])
    evaluate_stages.main([*flags, "--limit", "10", "--seeds", "1", "--overwrite"])
    assert calls[8:] == [("one", 1), ("two", 1)]
    assert "± nan" in capsys.readouterr().out  # one seed has no interval


def test_a_gain_of_which_the_interval_holds_0_is_not_reached(monkeypatch):
    monkeypatch.setattr(evaluate_stages, "AIMS", {("a", "x"): ("gain", 0)})
    rows = [
        evaluate_stages.table_rows("a", [{"x": (0.5, 0.5 + gain)} for gain in gains])[0]
        for gains in ((0.1, 0.1, 0.4), (0.2, 0.21), (0.1,))
    ]
    assert [row["reached"] for row in rows] == [False, True, True]
    assert rows[0]["gain"] == pytest.approx(0.2) and rows[0]["half"] == pytest.approx(4.303 * 0.1)


def test_stages_train_and_measure_for_real(tmp_path, capsys):
    flags = [
        "--save_dir",
        str(tmp_path),
        "--max_steps",
        "1",
        "--limit",
        "1",
        "--seeds",
        "1",
        "--device",
        "cpu",
    ]
    train_full_sft.main(
        [
            "--from_weight",
            "none",
            "--hidden_size",
            "32",
            "--num_hidden_layers",
            "2",
            "--max_steps",
            "1",
            "--save_dir",
            str(tmp_path),
            "--device",
            "cpu",
            "--val_share",
            "0",
        ]
    )
    evaluate_stages.main(
        [
            *flags,
            "--from_weight",
            str(tmp_path / "full_sft_32x2"),
            "--stages",
            "lora",
            "dpo",
            "reward",
            "reason",
            "--json",
            str(tmp_path / "table.json"),
        ]
    )
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {"lora", "dpo", "reward", "reason"} and len(rows) == 8
    assert all(0 <= row[side] <= 1 for row in rows for side in ("before", "after"))
    assert "reward: held-out pairs" in {f"{row['stage']}: {row['what']}" for row in rows}
    assert (tmp_path / "lora-1_32x2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stages", "three"], "--stages three: there are one, two"),
        (["--seeds", "1", "1"], "different numbers"),
    ],
)
def test_bad_flags_are_refused(flags, message, fake, capsys):
    with pytest.raises(SystemExit):
        evaluate_stages.main([*fake[1], *flags])
    assert message in capsys.readouterr().err


def test_the_names_are_those_of_the_functions():
    functions = [evaluate_stages.stage_function(name) for name in evaluate_stages.STAGES]
    assert [function.__name__ for function in functions] == [*evaluate_stages.STAGES]


def test_the_old_name_and_its_results(monkeypatch, tmp_path):
    from scripts import ladder

    assert ladder.main is evaluate_stages.main
    monkeypatch.setattr(evaluate_stages, "OLD_FOLDER", tmp_path)
    args = parse_args(evaluate_stages.StageArgs, ["--rungs", "lora"])
    assert args.stages == ["lora"]
    if not (evaluate_stages.ROOT / "out" / "stages").is_dir():
        assert args.save_dir == str(tmp_path)
