"""Whether a completion's final answer is that of a row of data: numbers, LaTeX, or words.

The final answer stands in the last \\boxed{...}, else after the last "the answer is" or "####",
else at the end of the completion. A number counts as a number: 1,000 and 1000; 0.5, 1/2, 50% and
\\frac{1}{2}; 1 1/2, 1(1/2) and 1.5; 十五 and 15, 百分之五十 and 50%, 二分之一 and 1/2. A percent
sign on one side alone may be a unit that the other left out: 50 agrees with 50% too. A division
that comes out even is not worked out: 12/4 is not 3. Everything else is compared letter by letter,
without spaces, dollars and LaTeX's variants of a spelling. Plain words need only be named; yes and
no, or true and false, named last. So a completion that lists many names is right by one of them:
"choices" in the row name the rivals, where they are known.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from dataset.chat.arithmetic import evaluate
from dataset.chat.final_answer import (
    CHINESE_NUMBER,
    MARKER,
    NUMBER,
    last_mention,
    normalise,
    numbers_in,
    to_number,
)

FRACTION = (
    r"(?:(?: (?P<upper>\d{1,99}))?\s?/\s?(?P<lower>[1-9]\d{0,99})(?!\.?\d))?(?P<percent>\s?%)?"
)
VALUE = re.compile(rf"(?P<first>{NUMBER.pattern}){FRACTION}", re.IGNORECASE)
# others are told from a variable by the space before them
SHORT_UNITS = r"(?:mm|cm|dm|km|kg|mg|ml|min)\b"
UNIT = re.compile(
    rf"\s*(?:°|℃|{SHORT_UNITS}|(?<=\s)[^\W\d_]{{2,}}(?: [^\W\d_]+)*|[\u4e00-\u9fff]+)?\s*[.。]?",
    re.IGNORECASE,
)
WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")
OPPOSITES = (("yes", "no"), ("true", "false"), ("对", "错"), ("正确", "错误"))
RIVALS = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}  # an answer that names both says neither
WIDE = str.maketrans("％（）／＝＋", "%()/=+")
SPELLINGS = (  # of LaTeX -> one of them, or plain text; in this order
    (r"\\[dt]frac", r"\\frac"),
    (r"\\\$|\\left|\\right|(?<!\\)\\[!,;: ]|[$~]|\^\\circ|\^\{\\circ\}", ""),
    (r"\{,\}", ","),
    (r"\\%", "%"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1/\2)"),
    (r"(?<![\w.)\]}])\.(?=\d)", "0."),
    (r"(\d)\s*\(\s*(\d+)\s*/\s*(\d+)\s*\)", r"\1 \2/\3"),
    (r"\(\s*(\d+)\s*/\s*(\d+)\s*\)", r"\1/\2"),
)
PART = rf"({CHINESE_NUMBER.pattern}|\d+(?:\.\d+)?)"


class Value(NamedTuple):
    """A number as written, before its percent sign; None if too large or a division left undone."""

    number: Fraction | None
    percent: bool

    def agrees(self, other: "Value") -> bool:
        """Whether both mean one number, or only a percent sign apart."""
        if self.number is None or other.number is None:
            return False
        mine, theirs = (one.number / 100 if one.percent else one.number for one in (self, other))
        return mine == theirs or (self.percent != other.percent and self.number == other.number)


def is_right(answer: str, completion: str) -> bool:
    """Whether a completion without its reasoning gives `answer`, which may be a whole solution with
    a box or "####" of its own.
    """
    answer = boxed(answer) or answer.rpartition("####")[2].strip()
    box = boxed(completion)
    wanted = value_of(answer)
    is_number = wanted is not None and wanted.number is not None
    if wanted := wanted if is_number else expression(answer):
        found = value_of(box.rpartition("=")[2]) if box is not None else final_value(completion)
        is_same = found is not None and wanted.agrees(found)
        if is_same or is_number:
            return is_same
    if box is not None:
        return bare(box) == bare(answer)
    said = plain(completion)
    markers = list(MARKER.finditer(said))
    if markers:
        said = said[markers[-1].end() :].strip().partition("\n")[0]
    ends = [said, *said.splitlines()[-1:], *re.findall(r"\$([^$]+)\$", completion)[-1:]]
    if any(bare(end) == bare(answer) for end in ends):
        return True
    word = plain(answer).lower()
    rival = RIVALS.get(word)
    return (
        WORDS.fullmatch(answer) is not None
        and last_mention(said, [word, rival] if rival else [word]) == word
    )


def boxed(text: str) -> str | None:
    """The content of the closed \\boxed{...} that begins last; None without one."""
    opened, found = [], (-1, 0)
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\}", text):
        if match[0] != "}":
            opened.append((match.end(), match[1] is not None))
        elif opened:
            start, is_box = opened.pop()
            found = max(found, (start, match.start())) if is_box else found
    return text[slice(*found)].strip() if found[0] >= 0 else None


def plain(text: str) -> str:
    """A text in ASCII's signs, without LaTeX marks that mean nothing; fractions as 1/2 or 3 1/2."""
    text = normalise(text).translate(WIDE)
    text = re.sub(rf"百分之{PART}", lambda match: f"{numbers_in(match[1])[0]}%", text)
    text = re.sub(
        rf"{PART}分之{PART}",
        lambda match: f"{numbers_in(match[2])[0]}/{numbers_in(match[1])[0]}",
        text,
    )
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return text.strip()


def bare(text: str) -> str:
    """A text for comparison by letter: no spaces, no "x =" before it, no full stop behind it."""
    return re.sub(r"^[a-zA-Z]=", "", re.sub(r"\s+", "", plain(text)).rstrip(".。"))


def read_value(match: re.Match) -> Value:
    """The Value that VALUE has found."""
    number, upper, lower = to_number(match["first"]), match["upper"], match["lower"]
    if lower and number is not None:
        part = Fraction(int(upper or 1), int(lower))
        number = number + (part if number >= 0 else -part) if upper else number * part
        if not upper and number.denominator == 1 and int(lower) != 1:
            number = None
    return Value(number, bool(match["percent"]))


def values_in(text: str) -> list[Value]:
    """All Values of a plain text; Chinese numerals count where there are no digits at all."""
    found = [read_value(match) for match in VALUE.finditer(text)]
    return found or [Value(number, False) for number in numbers_in(text)]


def value_of(text: str) -> Value | None:
    """The Value that the whole text is, but for a unit; None if it is none."""
    text = plain(text)
    match = VALUE.match(text)
    if match:
        return read_value(match) if UNIT.fullmatch(text, match.end()) else None
    return values_in(text)[0] if CHINESE_NUMBER.fullmatch(text) else None


def final_value(completion: str) -> Value | None:
    """The first Value after "the answer is", else the last: `final_number` with fractions."""
    completion = plain(completion)
    markers = list(MARKER.finditer(completion))
    after = values_in(completion[markers[-1].end() :]) if markers else []
    return next(iter(after or values_in(completion)[-1:]), None)


def expression(answer: str) -> Value | None:
    """The Value of a row's answer not worked out, like 15/(1/5); None if it is none, or a date."""
    is_date = re.fullmatch(r"\d+([-/.])\d+\1\d+", answer.strip())
    if is_date or not re.fullmatch(r"[\d.+\-*/() ]+", answer):
        return None
    try:
        return Value(evaluate(answer.strip()), False)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
