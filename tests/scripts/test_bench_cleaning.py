"""The cleaning benchmark: what it plants, and what is found of it."""

import random

import pytest

from dataset.files.jsonl import dump_row
from scripts import bench
from scripts.benchmarks.cleaning import TOKEN, edited
from tests.helpers.bench import read_table, run_bench

WORDS = (
    "river stone morning letter garden window yellow quiet summer bridge market forest candle "
    "silver"
).split()


def test_edits_change_the_fraction_that_they_say():
    draw, text = random.Random(0), "远山近水，" * 40 + "one two three. " * 40
    changed = edited(text, 0.1, ["XX", "换"], draw)
    before, after = TOKEN.findall(text), TOKEN.findall(changed)
    assert len(before) == len(after) == 280
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 28
    assert changed.count("，") == 40 and edited("word", 0.01, ["other"], draw) == "other"


def test_planted_copies_are_found_and_templates_stay(tmp_path, capsys):
    draw, path = random.Random(1), tmp_path / "a.jsonl"
    texts = [
        " ".join(draw.choice(WORDS) + draw.choice(WORDS) for _ in range(100)) for _ in range(60)
    ]
    path.write_text("".join(dump_row({"text": text}) for text in texts), encoding="utf-8")
    flags = "--copies 12 --edit_rates 0.02 0.5 --repeats 1 --num_proc 1 --data_path"
    found = run_bench(tmp_path, f"cleaning {flags}", str(path))
    rows = {row["planted"]: row for row in found["rows"]}
    assert {kind: row["rows"] for kind, row in rows.items()} == {
        **{"original": 60, "same template": 12, "exact": 12, "edited 2%": 12, "edited 50%": 12}
    }
    for form in ("dropped_as_text", "dropped_as_conversations"):
        dropped = {kind: row[form] for kind, row in rows.items()}
        assert dropped["original"] == dropped["same template"] == dropped["edited 50%"] == 0
        assert dropped["exact"] == 12 and dropped["edited 2%"] >= 11
    (speed,) = found["speed"]
    assert speed["megabytes_per_s"] == speed["megabytes"] / speed["seconds"] > 0
    printed = capsys.readouterr().out
    assert read_table(printed)[2]["dropped as text"] == "12" and "a.jsonl: " in printed


def test_too_few_rows_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="0 rows of 100 characters or more, 400 are needed"):
        bench.main(["cleaning", "--data_path", str(tmp_path / "a.jsonl")])
