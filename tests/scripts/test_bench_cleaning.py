import json
import random

import pytest

from scripts.bench_cleaning import TOKEN, edited, main

WORDS = "river stone morning letter garden window yellow quiet summer bridge market forest candle silver".split()


def test_edits_change_the_share_that_they_say():
    draw, text = random.Random(0), "远山近水，" * 40 + "one two three. " * 40
    changed = edited(text, 0.1, ["XX", "换"], draw)
    before, after = TOKEN.findall(text), TOKEN.findall(changed)
    assert len(before) == len(after) == 280 and sum(a != b for a, b in zip(before, after, strict=True)) == 28
    assert changed.count("，") == 40 and edited("word", 0.01, ["other"], draw) == "other"


def test_planted_copies_are_found_and_templates_stay(tmp_path, capsys):
    draw = random.Random(1)
    rows = [{"text": " ".join(f"{draw.choice(WORDS)}{draw.choice(WORDS)}" for _ in range(100))} for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(["--data_path", str(tmp_path / "a.jsonl"), "--copies", "12", "--edit_rates", "0.02", "0.5", "--repeats", "1",
          "--num_proc", "1", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    for form in ("running text", "conversations"):
        dropped = {kind: found["dropped"] for kind, found in figures[form].items()}
        assert dropped["original"] == dropped["same template"] == dropped["edited 50%"] == 0
        assert dropped["exact"] == 12 and dropped["edited 2%"] >= 11
    assert figures["speed"][0]["megabytes_per_second"] > 0
    assert "| exact | 12 | 12 | 12 |" in capsys.readouterr().out


def test_too_few_rows_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="0 rows of 100 characters or more, 400 are needed"):
        main(["--data_path", str(tmp_path / "a.jsonl")])
