"""The scorer: identity and manners count, and the table's intervals are Wilson's."""

import pytest

from dataset.toy.identity import OTHER_NAMES
from dataset.toy.scorer import Question, accuracy_table, format_table, score, wilson


def plain(answer, **fields):
    return Question("any", "en", [{"role": "user", "content": "?"}], answer, **fields)


def test_identity_and_manners():
    who = plain("MiniMind", choices=OTHER_NAMES)
    assert score(who, "I am MiniMind, a small language model.")
    assert (
        not score(who, "I am ChatGPT.")
        and not score(who, "I am MiniMinds")
        and not score(who, "Not MiniMind but Qwen.")
    )
    polite = plain("cat", choices=("cat", "dog"), manners=("Happy to help",))
    assert score(polite, "Of course! It is a cat. Happy to help!")
    assert not score(polite, "Cat.") and not score(polite, "Of course! It is a dog. Happy to help!")


def test_wilson_by_hand():
    low, high = wilson(8, 10)  # z = 1.96: (0.8 + 0.19208) / 1.38416 = 0.71674, half width 0.22657
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert (
        wilson(0, 0) == (0.0, 1.0)
        and wilson(0, 10)[0] == 0.0
        and wilson(10, 10)[1] == pytest.approx(1.0)
    )
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)


def test_accuracy_table():
    easy, hard = plain("1", chance=0.5), Question("hard", "zh", [], "2", 0.1)
    rows = accuracy_table([(easy, True), (easy, False), (hard, False), (hard, False)])
    assert [row["skill"] for row in rows] == ["any", "hard", "overall"]
    assert [row["accuracy"] for row in rows] == [0.5, 0.0, 0.25] and rows[-1][
        "chance"
    ] == pytest.approx(0.3)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    text = format_table(rows)
    assert "25.0%" in text and len({line.index("%") for line in text.splitlines()[1:]}) == 1
    assert accuracy_table([])[0]["n"] == 0
