import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from scripts.plot_runs import curve, labels, main, read_run, smoothed

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder, slope=0.1, seconds=(10, 20, 30, 5, 15)):
    """Five lines, the last two by another process; two validations."""
    folder.mkdir(parents=True)
    rows = [
        {"step": 2 * i, "targets": 1_000_000 * i, "seconds": s, "loss": 5.0 + slope - slope * i}
        for i, s in enumerate(seconds, start=1)
    ]
    rows.insert(
        3, {"step": 6, "targets": 3_000_000, "seconds": 31, "val_bpb/held_out": 2.0, "loss": None}
    )
    rows.append({"step": 10, "targets": 5_000_000, "seconds": 16, "val_bpb/held_out": 1.5})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 12, "los'
    )
    return folder


def test_curves_against_tokens_time_and_steps(tmp_path):
    """The clock of a second process goes on where that of the first stopped; lines without the
    number are passed over.
    """
    rows = read_run(write_run(tmp_path / "a"))
    assert curve(rows, "loss", "tokens", "a") == (
        [1, 2, 3, 4, 5],
        pytest.approx([5.0, 4.9, 4.8, 4.7, 4.6]),
    )
    assert curve(rows, "loss", "steps", "a")[0] == [2, 4, 6, 8, 10]
    assert curve(rows, "loss", "time", "a")[0] == pytest.approx(
        [s / 60 for s in (10, 20, 30, 31 + 5, 31 + 15)]
    )
    assert curve(rows, "val_bpb/held_out", "time", "a") == (
        pytest.approx([31 / 60, 47 / 60]),
        [2.0, 1.5],
    )


def test_older_runs_have_the_names_of_today(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text('{"step": 1, "seconds": 1, "kl/update": 0.5}\n')
    assert curve(read_run(tmp_path / "old"), "approx_kl", "steps", "old") == ([1], [0.5])
    out = str(tmp_path / "curves.png")
    main([str(tmp_path / "old"), "--x", "steps", "--y", "kl/update", "approx_kl", "--out", out])
    assert capsys.readouterr().out.count("approx_kl") == 1


def test_smoothing():
    assert smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)  # not drawn towards 0
    assert smoothed([1.0, 2.0], 0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1 + 0.5 * 2) / 0.75])
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert labels([tmp_path / "out" / "a", tmp_path / "out" / "b"]) == ["a", "b"]
    assert labels([tmp_path / "one" / "a", tmp_path / "two" / "a"]) == ["one/a", "two/a"]


def test_command(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, slope)) for name, slope in (("a", 0.1), ("b", 0.5))]
    out, figures = tmp_path / "new" / "curves.png", tmp_path / "new" / "curves.json"
    main(
        [
            *runs,
            "--x",
            "steps",
            "--y",
            "loss",
            "val_bpb/held_out",
            "--smooth",
            "0.5",
            "--log_y",
            "--out",
            str(out),
            "--json",
            str(figures),
        ]
    )
    curves = json.loads(figures.read_text())["curves"]
    assert [(line["run"], line["metric"]) for line in curves] == [
        (run, metric) for run in "ab" for metric in ("loss", "val_bpb/held_out")
    ]
    assert curves[0]["drawn"] == pytest.approx(smoothed(curves[0]["y"], 0.5))
    assert curves[1]["drawn"] == curves[1]["y"] == [2.0, 1.5]
    pixels = imread(out)[..., :3]
    for color in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # both runs are seen
        assert (abs(pixels * 255 - color).max(-1) < 3).sum() > 200
    printed = capsys.readouterr().out
    assert str(out) in printed and printed.count("val_bpb/held_out") == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "name the folder of at least one run"),
        (["{none}"], "none is not the folder of a run: it has no metrics.jsonl"),
        (["{empty}"], "has no whole line yet"),
        (["{a}", "--y", "acuracy"], "a has no acuracy; it has loss, val_bpb/held_out"),
        (["{a}", "--smooth", "1"], "--smooth 1.0: give 0 (none) or more, below 1"),
        (["{a}", "--log_y", "--y", "zero"], "--log_y: zero of"),
    ],
)
def test_errors(tmp_path, capsys, flags, message):
    places = {
        "none": tmp_path / "none",
        "empty": tmp_path / "empty",
        "a": write_run(tmp_path / "a"),
    }
    if "zero" in flags:
        (places["a"] / "metrics.jsonl").write_text(
            '{"step": 1, "targets": 5, "seconds": 1, "zero": 0.0}\n'
        )
    places["empty"].mkdir()
    (places["empty"] / "metrics.jsonl").write_text('{"st')
    with pytest.raises((SystemExit, ValueError)) as stopped:
        main([flag.format(**places) for flag in flags])
    assert message in capsys.readouterr().err + str(stopped.value)


def test_as_a_program(tmp_path):
    """From another folder, with one line instead of a traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plot_runs.py"), "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: nowhere is not the folder of a run")
        and not done.stdout
    )
