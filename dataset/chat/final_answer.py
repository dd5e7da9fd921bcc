"""The final answer of a completion: the number, list or name that it ends on; if it is right."""

import re
from collections.abc import Iterable
from fractions import Fraction

from dataset.chat.reply import strip_thinking

CLOSE = Fraction(1, 10**6)  # floats that differ by less were rounded differently
MAX_DIGITS = 100  # Python refuses to read 4,300
NUMBER = re.compile(
    r"(?:负|minus |negative |(?<![\d.)\]])(?<![\d)\]] )[-−])?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)"
    r"|(?:负|minus |negative |(?<![\d.)\]])(?<![\d)\]] )[-−])?\d+(?:\.\d+)?"
)
MARKER = re.compile(
    r"(?:answer|result)(?: is|:|：)|答案(?:是|为|：|:)|结果(?:是|为|：|:)|####|\\boxed\{",
    re.IGNORECASE,
)
CHINESE_NUMBER = re.compile(r"负?[零一二两三四五六七八九十百千万]+")
DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000}


def normalise(text: str) -> str:
    """Full-width digits and signs become ASCII, 周 and 礼拜 become 星期, 星期天 becomes 星期日."""
    wide = "０１２３４５６７８９，．：－"
    text = text.translate(str.maketrans(wide, "0123456789,.:-"))
    return re.sub(
        r"(?:周|礼拜|星期)([一二三四五六日天])", lambda m: "星期" + m[1].replace("天", "日"), text
    )


def chinese_value(text: str) -> int:
    """The value of a Chinese numeral below 100 million: 二百零五 is 205."""
    sign, text = (-1, text[1:]) if text[0] == "负" else (1, text)
    if "万" in text:
        high, _, low = text.partition("万")
        return sign * (chinese_value(high or "一") * 10_000 + (chinese_value(low) if low else 0))
    total = digit = 0
    for char in text:
        if char in UNITS:
            total, digit = total + (digit or 1) * UNITS[char], 0
        elif char in DIGITS:
            digit = DIGITS[char]
    return sign * (total + digit)


def to_number(text: str) -> Fraction | None:
    """The number that the whole text is, or None; one of endless digits counts as none."""
    match = NUMBER.fullmatch(text.strip())
    if not match or len(match[0]) > MAX_DIGITS:
        return None
    digits = re.sub(r"[^\d.]", "", match[0])
    return -Fraction(digits) if match[0][0] in "负mn-−M" else Fraction(digits)


def numbers_in(text: str) -> list[Fraction | None]:
    """All numbers of a text, None for an endless one; Chinese numerals only if it has no digits."""
    found = [to_number(match[0]) for match in NUMBER.finditer(text)]
    numerals = [match[0] for match in CHINESE_NUMBER.finditer(text)]
    return found or [
        Fraction(chinese_value(text)) if len(text) <= MAX_DIGITS else None for text in numerals
    ]


def final_number(completion: str) -> Fraction | None:
    """The first number after "the answer is", else the last number of the completion."""
    markers = list(MARKER.finditer(completion))
    after = numbers_in(completion[markers[-1].end() :]) if markers else []
    if after:
        return after[0]
    numbers = numbers_in(completion)
    return numbers[-1] if numbers else None


def final_list(completion: str) -> list[Fraction | None]:
    """All numbers of the last line that has any, after its last colon."""
    lines = [line for line in completion.splitlines() if numbers_in(line)]
    return numbers_in(re.split(r"[:：]", lines[-1])[-1].replace(",", ", ")) if lines else []


def last_mention(completion: str, candidates: Iterable[str]) -> str | None:
    """Which candidate is named last, as a whole word where it is written in Latin letters."""
    best, where = None, (-1, -1)
    for candidate in candidates:
        word = re.escape(candidate.lower())
        pattern = rf"(?<![a-z0-9]){word}(?![a-z0-9])" if candidate.isascii() else word
        for match in re.finditer(pattern, completion.lower()):
            if (match.end(), match.end() - match.start()) > where:
                best, where = candidate, (match.end(), match.end() - match.start())
    return best


def contains(text: str, value: str) -> bool:
    """Whether a value stands in a text: a number as a number, anything else as whole words.

    A number that is not whole may differ by less than CLOSE.
    """
    text, value = normalise(text), normalise(value)
    number = to_number(value)
    if number is None:
        return last_mention(text, [value]) is not None
    found = numbers_in(text)
    is_whole = number.denominator == 1
    return number in found or (
        not is_whole and any(one is not None and abs(one - number) < CLOSE for one in found)
    )


def is_correct(
    completion: str, answer: str, choices: Iterable[str] = (), has_calls: bool = False
) -> bool:
    """Whether the final answer is `answer`: a number, a list in order, or one of `choices`.

    Reasoning is cut off first. A number counts as number (15, 15.0, １５ and 十五 agree, 150 does
    not); of the answer and its rivals, `choices`, the last one mentioned counts. A list may stand
    in running text where it reports results of tool calls (`has_calls`).
    """
    completion, answer = normalise(strip_thinking(completion)), normalise(answer)
    number = to_number(answer)
    if number is not None:
        return final_number(completion) == number
    if re.fullmatch(r"-?\d+(, -?\d+)+", answer):
        wanted = numbers_in(answer)
        return final_list(completion) == wanted or (
            has_calls and numbers_in(completion)[-len(wanted) :] == wanted
        )
    return last_mention(completion, (answer, *map(normalise, choices))) == answer
