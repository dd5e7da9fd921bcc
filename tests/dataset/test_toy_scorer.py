"""The scorer: right answers in any dress count, wrong ones never, and the table's intervals are Wilson's."""

import pytest

from dataset.toy_identity import OTHER_NAMES
from dataset.toy_numbers import WEEKDAYS
from dataset.toy_scorer import Question, accuracy_table, final_number, format_table, score, strip_thinking, wilson


def plain(answer, **fields):
    return Question("any", "en", [{"role": "user", "content": "?"}], answer, **fields)


@pytest.mark.parametrize(("answer", "replies"), [
    ("15", ["7 + 8 = 15.", "15.0", "１５。", "七加八等于十五。", "\\boxed{15}", "答案是15，不是 16。",
            "The answer is 15, because 7 + 8 does that and not 3.", "<think>16 or 17?</think>15", "16</think>15"]),
    ("205", ["二百零五"]), ("3", ["10 - 7 = 3"]), ("7", ["10 - 7"]), ("3000", ["That is 3,000 metres."]), ("2.5", ["2.50"]),
    ("-3", ["4 - 7 = -3", "负3", "minus 3", "−3"]), ("14:35", ["It is 14:35 in Loport."]), ("101, 205", ["101,205"]),
    ("1, 5, 9", ["1, 5, 9", "Sorted: 1, 5, 9.", "9, 5, 1 from small to large:\n1,5,9", "从小到大：1，5，9。"]),
])  # fmt: skip
def test_right_numbers_and_lists(answer, replies):
    for reply in replies:
        assert score(plain(answer), reply), reply


@pytest.mark.parametrize("endless", ["9" * 5000, "5 " + "1" * 5000, "万" * 2000, "1," + "000," * 2000 + "000"])
def test_a_number_without_end_is_only_wrong(endless):
    assert not score(plain("5"), endless) and not score(plain("1, 5"), endless) and not score(plain("red"), endless)


@pytest.mark.parametrize(("answer", "replies"), [
    ("15", ["150", "1.5", "-15", "115", "", "no idea", "15 + 1", "<think>15</think>16", "<think>15",
            "The answer is 16, not 15."]),
    ("150", ["15"]), ("3", ["-3", "4 - 7 = -3"]), ("-3", ["3"]), ("3000", ["3 km"]), ("14:35", ["It is 14:36.", "14"]),
    ("1, 5, 9", ["1, 9, 5", "0, 1, 5, 9", "1, 5", "1, 5, 9, 9", "159"]),
])  # fmt: skip
def test_wrong_numbers_and_lists(answer, replies):
    for reply in replies:
        assert not score(plain(answer), reply), reply



@pytest.mark.parametrize(("answer", "reply", "right"), [
    ("Tuesday", "3 days later it is tuesday.", True), ("Tuesday", "1 Monday, 2 Tuesday, 3 Wednesday", False),
    ("星期日", "是周日。", True), ("星期日", "是星期天。", True), ("星期日", "是星期一。", False), ("Monday", "Mondays", False),
])  # fmt: skip
def test_names_among_their_rivals(answer, reply, right):
    assert score(plain(answer, choices=(*WEEKDAYS["en"], *WEEKDAYS["zh"])), reply) is right


def test_identity_and_manners():
    who = plain("MiniMind", choices=OTHER_NAMES)
    assert score(who, "I am MiniMind, a small language model.")
    assert not score(who, "I am ChatGPT.") and not score(who, "I am MiniMinds") and not score(who, "Not MiniMind but Qwen.")
    polite = plain("cat", choices=("cat", "dog"), manners=("Happy to help",))
    assert score(polite, "Of course! It is a cat. Happy to help!")
    assert not score(polite, "Cat.") and not score(polite, "Of course! It is a dog. Happy to help!")


def test_strip_thinking():
    assert strip_thinking("<think>a</think>\n\nb") == "b" == strip_thinking("a</think>b") == strip_thinking("b<think>c")
    assert strip_thinking("<think>never ends") == ""
    assert final_number("nothing") is None


def test_wilson_by_hand():
    low, high = wilson(8, 10)  # z = 1.96: (0.8 + 0.19208) / 1.38416 = 0.71674, half width 0.22657
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)


def test_accuracy_table():
    easy, hard = plain("1", chance=0.5), Question("hard", "zh", [], "2", 0.1)
    rows = accuracy_table([(easy, True), (easy, False), (hard, False), (hard, False)])
    assert [row["skill"] for row in rows] == ["any", "hard", "overall"]
    assert [row["accuracy"] for row in rows] == [0.5, 0.0, 0.25] and rows[-1]["chance"] == pytest.approx(0.3)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    text = format_table(rows)
    assert "25.0%" in text and len({line.index("%") for line in text.splitlines()[1:]}) == 1
    assert accuracy_table([])[0]["n"] == 0
