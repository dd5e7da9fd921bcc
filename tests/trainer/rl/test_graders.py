"""Answers of maths: what agrees, whatever it is dressed in, and what does not."""

import pytest

from trainer.rl.graders import boxed, is_right

LATEX_PAIRS = [  # as the rows of MATH spell them
    ("\\frac{1}{2}", "\\boxed{\\dfrac12}"),
    ("3,\\!250", "So $26 \\times 5 \\times 25=\\boxed{3,\\!250}$ ways."),
    ("\\$7.50", "$7.5"),
    ("10{,}000", "10000"),
    ("-\\frac{3}{4}", "$-\\tfrac{3}{4}$"),
    ("-\\frac{3}{4}", "-0.75"),
    ("65\\%", "0.65"),
    ("6\\frac15", "6.2"),
    ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\dfrac{\\sqrt3}{2}}"),
    ("(8,4,2)", "\\boxed{(8, 4, 2)}"),
    ("(8,4,2)", "The answer is $(8,4,2)$."),
    ("385_9", "\\boxed{385_9}"),
    ("575\\text{ students}", "575"),
    ("5\\text{ inches}", "\\boxed{5}"),
    ("y = x+3", "\\boxed{x + 3}"),
    ("\\text{(E)}", "The answer is (E)."),
    ("x^2 + 10x + 25", "\\boxed{x^2+10x+25}"),
    ("90^\\circ", "\\boxed{90}"),
    (".38", "0.38"),
    ("14", "Hence $x=\\boxed{14}$."),
    ("5", "\\boxed{x = 5}"),
    ("\\text{Monday}", "\\boxed{\\text{Monday}}"),
    ("\\begin{pmatrix} -6 \\\\ 9 \\end{pmatrix}", "\\boxed{\\begin{pmatrix}-6\\\\9\\end{pmatrix}}"),
]


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("1000", "1,000"),
        ("1,000", "The answer is 1000."),
        ("0.5", "1/2"),
        ("0.5", "50%"),
        ("50%", "1/2"),
        ("1/2", ".5"),
        ("50%", "50"),
        ("50", "50%"),
        ("37.5%", "3/8"),
        ("1.50", "1.5"),
        ("1/2", "2/4"),
        ("15", "十五"),
        ("15", "１５"),
        ("50%", "百分之五十"),
        ("50%", "５０％"),
        ("(3/5)", "五分之三"),
        ("(3/5)", "答案是3/5。"),
        ("1(1/4)", "1.25"),
        ("1(1/4)", "5/4"),
        ("31(1/9)", "31 1/9"),
        ("15/(1/5)", "75"),
        ("808-432", "答案是376。"),
        ("525/7", "75"),
        ("-3", "负三"),
        ("-3", "minus 3"),
        ("5", "5个"),
        ("5", "\\boxed{5米}"),
        ("72", "48 + 24 = 72\n#### 72"),
        ("48 + 24 = 72\n#### 72", "72"),
        ("so it is \\boxed{7}", "7"),
        ("12", "It costs $12."),
        ("12", "The answer is 12 because 3 x 4 is that."),
        ("5", "\\boxed{5 cm}"),
        ("7", "first \\boxed{6}, no, \\boxed{7}"),
        ("5", "\\boxed{5"),
        ("Paris", "The capital of France is Paris."),
        ("Paris", "the answer is paris"),
        ("A", "The answer is A."),
        ("北京", "是北京。"),
        ("2024-12-25", "The answer is 2024-12-25."),
        ("12/25/2024", "12/25/2024"),
        ("10-20", "\\boxed{10-20}"),
        ("3-1", "3-1"),
        ("yes", "No doubt: yes."),
        ("False", "It is false."),
        *LATEX_PAIRS,
    ],
)
def test_right_answers(answer, reply):
    assert is_right(answer, reply)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("1000", "1,00"),
        ("1000", "10,000"),
        ("0.5", "50"),
        ("0.5", "5%"),
        ("1/2", "2"),
        ("1/2", "1"),
        ("1/3", "0.33"),
        ("15", "五"),
        ("5", ""),
        ("3", "-3"),
        ("5", "It is 4.5"),
        ("3", "12/4"),
        ("3", "\\boxed{12/4}"),
        ("376", "808-432"),
        ("3", "\\boxed{3x+2}"),
        ("2", "\\boxed{2\\pi}"),
        ("3", "\\boxed{1, 2, 3}"),
        ("3", "\\boxed{}"),
        ("7", "\\boxed{6} or 7"),
        ("385_9", "3859"),
        ("2\\pi", "2"),
        ("9\\text{ a.m.}", "9"),
        ("12", "#### 13, not 12"),
        ("Paris", "Parisian"),
        ("A", "a banana"),
        ("(8,4,2)", "(8,4,3)"),
        ("(8,4,2)", "8"),
        ("x^2", "x^3"),
        ("5", "9" * 5000),
        ("5", "1/" + "9" * 5000),
        ("5", "百分之" + "9" * 5000),
        ("5", "万" * 2000),
        ("x", "\\boxed{" * 3000),
        ("2024-12-25", "1987"),
        ("12/25/2024", "2024"),
        ("10-20", "10"),
        ("yes", "yes or no"),
        ("False", "false, true"),
        ("true", "False."),
    ],
)
def test_wrong_answers(answer, reply):
    assert not is_right(answer, reply)


def test_boxes_end_with_their_own_bracket():
    assert (
        boxed("a \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
        and boxed("\\boxed{1} \\boxed{2") == "1"
    )
    assert boxed("\\fbox{3}") == "3" and boxed("{3}") is None
