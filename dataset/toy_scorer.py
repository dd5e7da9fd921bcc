"""Questions of the toy world put to a model: the protocol, the scorer and the table of accuracies."""

import json
import math
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from fractions import Fraction

from dataset.chat_reply import parse_reply
from dataset.toy_tools import run_tool

MAX_TOOL_ROUNDS = 3
MAX_DIGITS = 100  # Python refuses to read 4,300
NUMBER = re.compile(r"(?:负|minus |negative |(?<![\d.)\]])(?<![\d)\]] )[-−])?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)"
                    r"|(?:负|minus |negative |(?<![\d.)\]])(?<![\d)\]] )[-−])?\d+(?:\.\d+)?")  # fmt: skip
MARKER = re.compile(r"(?:answer|result)(?: is|:|：)|答案(?:是|为|：|:)|结果(?:是|为|：|:)|####|\\boxed\{", re.IGNORECASE)
CHINESE_NUMBER = re.compile(r"负?[零一二两三四五六七八九十百千万]+")
DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000}

Generate = Callable[[list[dict], list[dict] | None], str]


@dataclass(frozen=True)
class Question:
    """A held-out question. `messages` is the prompt; `follow_ups` are later user turns; `calls` the tool calls
    (name, arguments) that must be made; `tools` the schemas on offer, None if there are none."""

    skill: str
    language: str
    messages: list[dict]
    answer: str
    chance: float = 0.0
    choices: tuple[str, ...] = ()
    manners: tuple[str, ...] = ()
    tools: list[dict] | None = None
    calls: tuple[tuple[str, dict], ...] = ()
    follow_ups: tuple[str, ...] = ()
    key: str = ""


def strip_thinking(reply: str) -> str:
    """The reply after its thinking; empty if the thinking never ends."""
    return reply.rpartition("</think>")[2].partition("<think>")[0].strip()


def normalise(text: str) -> str:
    """Full-width digits and signs become ASCII, 周 and 礼拜 become 星期, 星期天 becomes 星期日."""
    wide = "０１２３４５６７８９，．：－"
    text = text.translate(str.maketrans(wide, "0123456789,.:-"))
    return re.sub(r"(?:周|礼拜|星期)([一二三四五六日天])", lambda m: "星期" + m[1].replace("天", "日"), text)


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
    """The number that the whole text is, or None; what a network may write without end is none."""
    match = NUMBER.fullmatch(text.strip())
    if not match or len(match[0]) > MAX_DIGITS:
        return None
    digits = re.sub(r"[^\d.]", "", match[0])
    return -Fraction(digits) if match[0][0] in "负mn-−M" else Fraction(digits)


def numbers_in(text: str) -> list[Fraction | None]:
    """All numbers of a text, None for one without end; Chinese numerals count where there are no digits at all."""
    found = [to_number(match[0]) for match in NUMBER.finditer(text)]
    numerals = [match[0] for match in CHINESE_NUMBER.finditer(text)]
    return found or [Fraction(chinese_value(text)) if len(text) <= MAX_DIGITS else None for text in numerals]


def final_number(reply: str) -> Fraction | None:
    """The first number after "the answer is", else the last number of the reply."""
    markers = list(MARKER.finditer(reply))
    after = numbers_in(reply[markers[-1].end() :]) if markers else []
    if after:
        return after[0]
    numbers = numbers_in(reply)
    return numbers[-1] if numbers else None


def final_list(reply: str) -> list[Fraction | None]:
    """All numbers of the last line that has any, after its last colon."""
    lines = [line for line in reply.splitlines() if numbers_in(line)]
    return numbers_in(re.split(r"[:：]", lines[-1])[-1].replace(",", ", ")) if lines else []


def last_mention(reply: str, candidates: Iterable[str]) -> str | None:
    """Which candidate is named last, as a whole word where it is written in Latin letters."""
    best, where = None, (-1, -1)
    for candidate in candidates:
        word = re.escape(candidate.lower())
        pattern = rf"(?<![a-z0-9]){word}(?![a-z0-9])" if candidate.isascii() else word
        for match in re.finditer(pattern, reply.lower()):
            if (match.end(), match.end() - match.start()) > where:
                best, where = candidate, (match.end(), match.end() - match.start())
    return best


def contains(text: str, value: str) -> bool:
    """Whether a value stands in a text: a number as a number, anything else as whole words."""
    text, value = normalise(text), normalise(value)
    number = to_number(value)
    return number in numbers_in(text) if number is not None else last_mention(text, [value]) is not None


def score(question: Question, reply: str) -> bool:
    """True if the reply's final answer is right: a number, a list in order, or a name among its rivals.

    Thinking is cut off first. A number counts as number (15, 15.0, １５ and 十五 agree, 150 does not); of a name
    and its rivals the last one mentioned counts; where manners are asked for, one of the phrases must occur.
    """
    reply, answer = normalise(strip_thinking(reply)), normalise(question.answer)
    if question.manners and not any(phrase in reply for phrase in question.manners):
        return False
    number = to_number(answer)
    if number is not None:
        return final_number(reply) == number
    if re.fullmatch(r"-?\d+(, -?\d+)+", answer):
        wanted = numbers_in(answer)
        return final_list(reply) == wanted or (bool(question.calls) and numbers_in(reply)[-len(wanted) :] == wanted)
    return last_mention(reply, (answer, *map(normalise, question.choices))) == answer


def assistant_message(reply: str, tools: bool) -> dict:
    """A raw reply as a message, its tool calls as [{"name", "arguments": object}]; see `parse_reply`."""
    message = parse_reply(reply, tools=tools)
    calls = [call["function"] for call in message.pop("tool_calls", ())]
    if calls:
        message["tool_calls"] = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    return message


def dialogue(
    question: Question, run=run_tool, max_rounds: int = MAX_TOOL_ROUNDS
) -> Generator[tuple[list[dict], list[dict] | None], str, tuple[bool, list[dict]]]:
    """The conversation of a question: yields (messages, tools), is sent the assistant's raw reply to them, and in the
    end returns (was it answered rightly, the messages).

    Tool calls in a reply are run, by `run(name, arguments) -> JSON`, and their results handed back, at most `max_rounds`
    times per turn; follow-up questions are asked after the model's own replies. A question with tools is right only if
    the calls it needs were made, in whatever spelling gives their result.
    """
    messages, made = list(question.messages), set()
    for turn in (None, *question.follow_ups):
        if turn is not None:
            messages.append({"role": "user", "content": turn})
        for rounds_left in reversed(range(max_rounds + 1)):
            reply = yield list(messages), question.tools
            messages.append(assistant_message(reply, bool(question.tools)))
            if "tool_calls" not in messages[-1] or not rounds_left:
                break
            for call in messages[-1]["tool_calls"]:
                result = run(call["name"], call["arguments"])
                made.add((call["name"], result))
                messages.append({"role": "tool", "content": result})
    needed = {(name, run(name, arguments)) for name, arguments in question.calls}
    return needed <= made and score(question, messages[-1]["content"]), messages


def ask(question: Question, generate: Generate) -> tuple[bool, list[dict]]:
    """Hold the dialogue of one question with `generate(messages, tools) -> raw reply`."""
    talk = dialogue(question)
    request = next(talk)
    while True:
        try:
            request = talk.send(generate(*request))
        except StopIteration as end:
            return end.value


def hold_all(
    questions: Iterable[Question], generate_all, run=run_tool, max_rounds: int = MAX_TOOL_ROUNDS
) -> list[tuple[bool, list[dict]]]:
    """Hold all dialogues side by side and return what each of them returns.

    `generate_all([(messages, tools), ...])` gives the raw replies, in order.
    """
    talks = [dialogue(question, run, max_rounds) for question in questions]
    waiting, ends = {i: next(talk) for i, talk in enumerate(talks)}, {}
    while waiting:
        replies = dict(zip(waiting, generate_all(list(waiting.values())), strict=True))
        for i, reply in replies.items():
            try:
                waiting[i] = talks[i].send(reply)
            except StopIteration as end:
                ends[i] = end.value
                del waiting[i]
    return [ends[i] for i in range(len(talks))]


def ask_all(questions: Iterable[Question], generate_all) -> list[tuple[Question, bool]]:
    """Which of the questions are answered rightly; see `hold_all`."""
    questions = list(questions)
    return [(question, right) for question, (right, _) in zip(questions, hold_all(questions, generate_all))]


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a share (E. B. Wilson, 1927); (0, 1) for no trials."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_table(results: Iterable[tuple[Question, bool]]) -> list[dict]:
    """One row per skill, then "overall": skill, n, accuracy, chance (mean over its questions), low, high (95%)."""
    results = list(results)
    groups = {skill: [] for skill in dict.fromkeys(question.skill for question, _ in results)}
    for question, correct in results:
        groups[question.skill].append((question, correct))
    rows = []
    for skill, group in [*groups.items(), ("overall", results)]:
        n, right = len(group), sum(correct for _, correct in group)
        low, high = wilson(right, n)
        chance = sum(question.chance for question, _ in group) / max(n, 1)
        rows.append({"skill": skill, "n": n, "accuracy": right / max(n, 1), "chance": chance, "low": low, "high": high})
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows of `accuracy_table` as aligned text, shares in percent."""
    lines = [f"{'skill':<14} {'n':>5} {'accuracy':>9} {'chance':>7}  95% interval"]
    for row in rows:
        shares = (100 * row[name] for name in ("accuracy", "chance", "low", "high"))
        lines.append(f"{row['skill']:<14} {row['n']:>5} {'{:>8.1f}% {:>6.1f}%  {:.1f} to {:.1f}'.format(*shares)}")
    return "\n".join(lines)
