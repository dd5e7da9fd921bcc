"""Each reward on samples written by hand, with its number; and rows that cannot be judged."""

import json
import re
from argparse import Namespace
from dataclasses import dataclass, field

import pytest
import torch

from dataset.chat.reply import assistant_message
from dataset.toy.rows import question_of_row
from dataset.toy.scorer import score
from dataset.toy.tools import TOY_TOOLS
from dataset.toy_world import write_world
from tests.helpers.checkpoints import load_tokenizer
from trainer.rl.rewards import Rewards, check_row, plain_value
from trainer.runtime.think_format import keeps_format

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 + 30"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@dataclass
class Sample:
    """The fields of a rollout's sample; `earlier` are messages between the prompt and the last
    completion.
    """

    text: str
    row: dict
    tokens: list[int] = field(default_factory=lambda: [1, 2])
    is_sampled: list[bool] | None = None
    earlier: list[dict] = field(default_factory=list)
    is_complete: bool = True

    def __post_init__(self):
        self.row = {"conversations": [{"role": "user", "content": "?"}], **self.row}
        self.is_sampled = self.is_sampled or [True] * len(self.tokens)
        last = assistant_message(self.text, bool(self.row["conversations"][0].get("tools")))
        self.messages = [*self.row["conversations"], *self.earlier, last]


@pytest.fixture
def rewards(tokenizer):
    """rewards("answer=1", max_completion_length=10, ...) -> Rewards."""

    def make(*flags, pure_tools=TOY_TOOLS, **options):
        options = {"max_completion_length": 10, "overlong_buffer": 0, **options}
        args = Namespace(rewards=list(flags), **options)
        return Rewards(Namespace(args=args, device=torch.device("cpu")), tokenizer, pure_tools)

    return make


@pytest.fixture
def worth(rewards):
    """worth(name, text, row, ...) -> that reward of one sample."""

    def make(name, text, row=None, overlong_buffer=0, **fields):
        one = rewards(f"{name}=1", overlong_buffer=overlong_buffer)
        (total,), parts = one([Sample(text, row or {}, **fields)])
        assert parts == {name: [total]} and isinstance(total, float)
        return total

    return make


def tool_row(*calls, **fields):
    """A row that offers the toy world's calculator and a tool that only its user can run."""
    arguments = {"city": {"type": "string"}, "seats": {"type": "integer"}}
    book = {
        "name": "book",
        "description": "Book.",
        "parameters": {"properties": arguments, "required": ["city"]},
    }
    toy = {
        "name": "calculator",
        "description": "Work out an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    }
    tools = json.dumps([{"type": "function", "function": toy}, book])
    return {
        "conversations": [
            {"role": "system", "content": "", "tools": tools},
            {"role": "user", "content": "?"},
        ],
        "calls": [{"name": name, "arguments": arguments} for name, arguments in calls],
        **fields,
    }


def call_text(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def call_message(text):
    return [assistant_message(text, True), {"role": "tool", "content": '{"result": 1}'}]


def test_the_weighted_sum_and_its_parts(rewards):
    samples = [Sample("7", {"answer": "7"}, [1, 2, 3]), Sample("8", {"answer": "7"}, [1])]
    totals, parts = rewards("answer=2", "length=0.5", "format=-1")(samples)
    assert parts == {"answer": [1.0, 0.0], "length": [-0.3, -0.1], "format": [1.0, 1.0]}
    assert totals == pytest.approx([2 - 0.15 - 1, -0.05 - 1])
    assert rewards("answer=1", "length=1")([]) == ([], {"answer": [], "length": []})


def test_rated_samples_have_their_rewards_noted(rewards):
    samples = [Sample("7", {"answer": "7"}, [1, 2, 3]), Sample("8", {"answer": "7"}, [1])]
    judge = rewards("answer=2", "length=0.5")
    assert judge.rate(samples) == samples and judge.rate([]) == []
    assert samples[0].rewards == {"answer": 1.0, "length": -0.3, "total": pytest.approx(1.85)}
    assert samples[1].rewards == {"answer": 0.0, "length": -0.1, "total": pytest.approx(-0.05)}


def test_answers_of_the_toy_world_count_as_in_its_held_out_questions(rewards, tmp_path):
    write_world("mini", tmp_path)
    answer, texts, samples, expected = rewards("answer=1"), [], [], []
    for name in ("rl_heldout", "agent_heldout"):
        rows = [
            json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()[::7]
        ]
        texts = [row["answer"] for row in rows]
        for i, row in enumerate(rows):
            for text in (
                texts[i],
                texts[i - 1],
                f"<think>{texts[i - 1]}</think>The answer is {texts[i]}.",
                f"<think>{texts[i]}",
                f"<think>{texts[i]}</think>",
                f"{texts[i]} or {texts[i - 1]}",
            ):
                samples.append(Sample(text, row))
                expected.append(float(score(question_of_row(row), text)))
    assert answer(samples)[0] == expected and 0.3 < sum(expected) / len(expected) < 0.7


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (
            {"answer": "5", "skill": "arithmetic", "language": "en"},
            ["5", "２ + 3 = ５", "五"],
            ["", "6", "<think>5", "<think>5</think>", "<think>5</think>6"],
        ),
        ({"answer": "Red", "choices": ["Red", "Blue"]}, ["Not blue but red."], ["Red or blue"]),
        (
            {"gt": ["7", "Rome"]},
            ["Rome has 7.", "七 in rome"],
            ["Rome has 17.", "7", "<think>7 Rome</think>no"],
        ),
        (
            {"answer": "1,000"},
            ["1000", "\\boxed{1000}", "<think>2</think>#### 1000"],
            ["100", "", "<think>1000", "<think>1000</think>0"],
        ),
        ({"answer": 0.5}, ["1/2", "50%", "二分之一"], ["2"]),
        ({"answer": "5", "gt": ["5", "6"]}, ["5 and 6"], ["5"]),
    ],
)
def test_answer(row, right, wrong, worth):
    for is_complete in (True, False):  # a completion that was cut may have said it before
        assert [worth("answer", text, row, is_complete=is_complete) for text in right] == [
            1.0
        ] * len(right)
        assert [worth("answer", text, row, is_complete=is_complete) for text in wrong] == [
            0.0
        ] * len(wrong)


def test_a_guess_within_a_call_is_no_answer(worth):
    row = tool_row(
        ("calculator", {"expression": "12 + 30"}),
        answer="42",
        gt=["42"],
        skill="tools",
        language="en",
    )
    guess = call_text("calculator", expression="42")
    assert worth("answer", guess, row) == 0 and worth("answer", f"It is 42.{guess}", row) == 1
    del row["skill"], row["answer"]
    assert worth("answer", guess, row) == 0 and worth("answer", "42", row) == 1


@pytest.mark.parametrize(
    ("text", "form", "reasoned"),
    [
        ("Yes.", 1, 0),
        ("<think>\nHm.\n</think>\n\nYes.", 1, 1),
        ("<think>\n\n</think>\n\nYes.", 1, 0),
        ("<think>Hm.</think>Yes.", 1, 1),
        ("", 0, 0),
        ("  \n", 0, 0),
        ("<think>Hm.", 0, 0),
        ("<think>Hm.</think>", 0, 0),
        ("<think>Hm.</think>  ", 0, 0),
        ("Yes.</think>", 0, 0),
        ("Hm.</think>Yes.", 0, 0),
        ("Well <think>Hm.</think>Yes.", 0, 0),
        ("<think>a</think>b<think>c</think>d", 0, 0),
        ("<think>a<think>b</think>c", 0, 0),
        ("<think>a</think></think>b", 0, 0),
        (f"Yes. {CALL}", 0, 0),
        ("Yes.<|im_start|>user", 0, 0),
        ("<think>a<|im_end|></think>b", 0, 1),
    ],
)
def test_format_and_think(text, form, reasoned, worth, tokenizer):
    assert worth("format", text) == form and worth("think", text) == reasoned
    assert worth("format", text, is_complete=False) == 0
    if (
        text.startswith("<think>") and "<|" not in text
    ):  # then the validation of train_reason.py sees it so too
        ids = tokenizer.encode(text.removeprefix("<think>") + "<|im_end|>")
        assert keeps_format(ids, True, tokenizer) == reasoned


def test_format_of_calls(worth):
    row = tool_row()
    assert (
        worth("format", f"Wait.\n{CALL}", row) == 1 and worth("format", CALL, row) == 0
    )  # the last completion has no answer
    assert worth("format", "Wait. <tool_call>{bad}</tool_call>", row) == 0
    assert worth("format", "42", row, earlier=call_message(CALL)) == 1
    assert worth("format", "42", row, earlier=call_message("<tool_call>{bad}</tool_call>")) == 0
    row["conversations"].append(
        {"role": "assistant", "content": "an example: <tool_call>"}
    )  # of the prompt's is nothing asked
    assert worth("format", "42", row) == 1


def test_lengths(worth):
    for count, length, overlong in (
        (0, 0, 0),
        (1, -0.1, 0),
        (6, -0.6, 0),
        (7, -0.7, -0.25),
        (9, -0.9, -0.75),
        (10, -1, -1),
        (13, -1.3, -1),
    ):
        fields = dict(tokens=[5] * count)
        assert worth("length", "", **fields) == pytest.approx(length)
        assert worth("overlong", "", overlong_buffer=4, **fields) == pytest.approx(overlong)
    mixed = dict(
        tokens=[5] * 8, is_sampled=[True] * 3 + [False] * 4 + [True]
    )  # what tools wrote is not the model's
    assert worth("length", "", **mixed) == pytest.approx(-0.4)
    assert worth("overlong", "", overlong_buffer=8, **mixed) == pytest.approx(
        -0.125
    )  # the longest reply has 3


@pytest.mark.parametrize(
    ("tokens", "is_sampled", "value"),
    [
        ([], None, 0),
        ([1, 1], None, 0),
        ([1, 2, 3, 4, 5], None, 0),
        ([1] * 6, None, -3 / 4),
        ([1, 2, 3, 1, 2, 3], None, -1 / 4),
        ([1, 2, 3, 9, 1, 2, 3], [True] * 3 + [False] + [True] * 3, -1 / 2),
        ([1, 1, 1, 1, 1], [True, True, False, True, True], 0),
        ([1, 1, 1, 1, 2, 3, 4], [False] * 4 + [True] * 3, 0),
    ],
)
def test_repetition(tokens, is_sampled, value, worth):
    assert worth("repetition", "", tokens=tokens, is_sampled=is_sampled) == pytest.approx(value)


def test_tools(worth):
    plus, book = ("calculator", {"expression": "12 + 30"}), ("book", {"city": "Rome", "seats": 2})
    row = tool_row(plus, book)

    def made(*texts, row=row):
        return worth(
            "tools",
            "Done.",
            row,
            earlier=[message for text in texts for message in call_message(text)],
        )

    right = call_text("calculator", expression="12+30"), call_text("book", city=" rome", seats="２")
    assert (
        made() == 0
        and made(right[0]) == 0.5
        and made(*right) == made(*right[::-1]) == made("".join(right)) == 1
    )
    # pure tools count by their result
    assert made(call_text("calculator", expression="6 * 7")) == 0.5
    assert made(call_text("calculator", expression="13 + 30"), right[1]) == 0.5
    assert (
        made(call_text("book", city="Rome", seats=3)) == made(call_text("book", city="Rome")) == 0
    )
    assert (
        made(call_text("other", expression="12 + 30")) == 0
        and made("<tool_call>{bad}</tool_call>") == 0
    )
    assert (
        made(*right, *right, call_text("book", city="Bonn")) == 1
    )  # nothing is taken off for more
    none = tool_row()
    assert (
        made(row=none) == 1
        and made(right[0], row=none) == 0
        and made("<tool_call>{bad}</tool_call>", row=none) == 0
    )
    wanted_in_gt = tool_row(gt=[{"name": "book", "arguments": {"city": "Rome", "seats": 2}}])
    assert made(right[1], row=wanted_in_gt) == 1 and made(right[0], row=wanted_in_gt) == 0
    assert (
        worth("tools", call_text("book", city="Rome", seats=2), row) == 0.5
    )  # the last completion counts as well
    # without "calls", one valid call for each value of "gt"
    free, valid = {**tool_row(gt=["42", "Rome"]), "calls": None}, call_text("book", city="Rome")
    assert made(row=free) == made("<tool_call>{bad}</tool_call>", row=free) == 0
    assert made(right[0], row=free) == 0.5 and made(right[0], valid, row=free) == 1
    assert made(right[0], valid, valid, row=free) == 0.5
    assert made(right[0], valid, call_text("other"), row=free) == 0.5
    row["conversations"].insert(
        1, assistant_message(right[0], True)
    )  # an example in the prompt does not
    assert made() == 0


def test_valid_calls(worth):
    def valid(*texts, row=None):
        earlier = [message for text in texts for message in call_message(text)]
        return worth("valid_calls", "Done.", row or tool_row(), earlier=earlier)

    good, broken = call_text("book", city="Rome", seats=2), "<tool_call>{bad}</tool_call>"
    assert valid() == 1 and valid(good) == 1 and valid(broken) == 0 and valid(good, broken) == 0.5
    for bad in (
        call_text("book", seats=2),
        call_text("book", city=3),
        call_text("book", city="Rome", time=1),
        call_text("get_time", city="x"),
    ):
        assert valid(bad) == 0 and valid(good, good, bad) == pytest.approx(2 / 3)
    bare = {
        "conversations": [
            {"role": "system", "content": "", "tools": [{"name": "now"}]},
            {"role": "user", "content": "?"},
        ]
    }
    assert valid(call_text("now"), row=bare) == 1 and valid(call_text("now", a=1), row=bare) == 0


CALLS = [{"type": "function", "function": {"name": "book", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        (
            ["answer"],
            {"solution": "5"},
            "neither \"answer\" nor \"gt\" among the keys ['conversations', 'solution']",
        ),
        (
            ["answer"],
            {"gt": [{"name": "book", "arguments": {}}]},
            "give a list of texts; for calls, take --rewards tools=1",
        ),
        (["answer"], {"gt": "5"}, "give a list of texts"),
        (["answer"], {"gt": ["5", " "]}, "give a list of texts"),
        (["answer"], {"gt": []}, '"gt" is []: nothing tells'),
        (["answer"], {"answer": None}, '"answer" is None: nothing tells'),
        (["answer"], {"answer": ["5"]}, "\"answer\" is ['5']"),
        (["answer"], {"answer": " "}, "Give a text or a number"),
        (["answer"], {"answer": True}, '"answer" is True'),
        (
            ["answer"],
            {"answer": 1, "choices": ["Rome", "Paris"]},
            "which is not among the \"choices\" ['Rome', 'Paris']",
        ),
        (["tools"], {"calls": CALLS}, "(KeyError: 'name'). Tools are"),
        (["valid_calls"], {"tools": '[{"description": "x"}]'}, "KeyError"),
    ],
)
def test_rows_that_nobody_can_judge(names, row, message):
    row = {
        "conversations": [{"role": "system", "content": "", "tools": row.pop("tools", "")}],
        **row,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        check_row(row, names)
    check_row(row, ["format", "length"])


@pytest.mark.parametrize(
    "row",
    [
        {"answer": 0.5, "skill": "algebra"},
        {"gt": ["5"]},
        {"answer": "Rome", "choices": ["Rome"]},
        {"answer": "5", "choices": None},
    ],
)
def test_rows_that_can_be_judged(row):
    check_row(
        {"conversations": [{"role": "user", "content": "?"}], **row},
        ["answer", "tools", "valid_calls"],
    )


def test_a_column_of_the_users_own_does_not_change_how_an_answer_is_compared(worth):
    assert worth("answer", "0.5", {"answer": "\\frac{1}{2}", "skill": "algebra"}) == 1
    tools = [
        {"type": "function", "function": {"name": "book", "description": "", "parameters": {}}}
    ]
    row = {
        "answer": "5",
        "skill": "x",
        "language": "en",
        "conversations": [{"role": "system", "content": "", "tools": tools}],
    }
    assert worth("answer", "5", row) == 1  # a list of tools, not its text


def test_numbers_in_texts_are_numbers():
    assert plain_value({"a": ["0.1", "5", "1e999"]})["a"][:2] == plain_value({"a": [0.1, 5]})["a"]
    assert plain_value(0.2) != plain_value("0.1") and plain_value(float("inf")) == float("inf")


def test_without_pure_tools_calls_are_compared_by_their_arguments(rewards):
    """No tool is run."""
    row = tool_row(("calculator", {"expression": "12 + 30"}))
    judge = rewards("tools=1", pure_tools=None)
    for expression, reward in (("12 + 30", 1), (" 12 + 30", 1), ("30 + 12", 0)):
        call = call_message(call_text("calculator", expression=expression))
        assert judge([Sample("42", row, earlier=call)])[0] == [reward]
