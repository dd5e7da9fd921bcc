"""Right answers in any dress count, wrong ones never."""

import pytest

from dataset.chat.final_answer import final_number, is_correct
from dataset.chat.reply import strip_thinking
from dataset.toy.measures import WEEKDAYS


@pytest.mark.parametrize(
    ("answer", "replies"),
    [
        (
            "15",
            [
                "7 + 8 = 15.",
                "15.0",
                "１５。",
                "七加八等于十五。",
                "\\boxed{15}",
                "答案是15，不是 16。",
                "The answer is 15, because 7 + 8 does that and not 3.",
                "<think>16 or 17?</think>15",
                "16</think>15",
            ],
        ),
        ("205", ["二百零五"]),
        ("3", ["10 - 7 = 3"]),
        ("7", ["10 - 7"]),
        ("3000", ["That is 3,000 metres."]),
        ("2.5", ["2.50"]),
        ("-3", ["4 - 7 = -3", "负3", "minus 3", "−3"]),
        ("14:35", ["It is 14:35 in Loport."]),
        ("101, 205", ["101,205"]),
        (
            "1, 5, 9",
            [
                "1, 5, 9",
                "Sorted: 1, 5, 9.",
                "9, 5, 1 from small to large:\n1,5,9",
                "从小到大：1，5，9。",
            ],
        ),
    ],
)
def test_right_numbers_and_lists(answer, replies):
    for reply in replies:
        assert is_correct(reply, answer), reply


@pytest.mark.parametrize(
    "endless", ["9" * 5000, "5 " + "1" * 5000, "万" * 2000, "1," + "000," * 2000 + "000"]
)
def test_a_number_without_end_is_only_wrong(endless):
    assert (
        not is_correct(endless, "5")
        and not is_correct(endless, "1, 5")
        and not is_correct(endless, "red")
    )


@pytest.mark.parametrize(
    ("answer", "replies"),
    [
        (
            "15",
            [
                "150",
                "1.5",
                "-15",
                "115",
                "",
                "no idea",
                "15 + 1",
                "<think>15</think>16",
                "<think>15",
                "The answer is 16, not 15.",
            ],
        ),
        ("150", ["15"]),
        ("3", ["-3", "4 - 7 = -3"]),
        ("-3", ["3"]),
        ("3000", ["3 km"]),
        ("14:35", ["It is 14:36.", "14"]),
        ("1, 5, 9", ["1, 9, 5", "0, 1, 5, 9", "1, 5", "1, 5, 9, 9", "159"]),
    ],
)
def test_wrong_numbers_and_lists(answer, replies):
    for reply in replies:
        assert not is_correct(reply, answer), reply


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("Tuesday", "3 days later it is tuesday.", True),
        ("Tuesday", "1 Monday, 2 Tuesday, 3 Wednesday", False),
        ("星期日", "是周日。", True),
        ("星期日", "是星期天。", True),
        ("星期日", "是星期一。", False),
        ("Monday", "Mondays", False),
    ],
)
def test_names_among_their_rivals(answer, reply, right):
    assert is_correct(reply, answer, (*WEEKDAYS["en"], *WEEKDAYS["zh"])) is right


def test_a_list_in_running_text_counts_where_tools_were_called():
    reply = "In Loport and Miliport it is 12 and 30 degrees, at 9 and 4."
    assert is_correct(reply, "9, 4", has_calls=True) and not is_correct(
        reply, "9, 3", has_calls=True
    )
    assert not is_correct(reply, "9, 4") and not is_correct(reply, "12, 30", has_calls=True)


def test_strip_thinking():
    assert (
        strip_thinking("<think>a</think>\n\nb")
        == "b"
        == strip_thinking("a</think>b")
        == strip_thinking("b<think>c")
    )
    assert strip_thinking("<think>never ends") == ""
    assert final_number("nothing") is None
