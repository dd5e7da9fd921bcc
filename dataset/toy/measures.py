"""Skills of the toy world about time and measures: days of the week, units.

Every maker takes (rng, language) plus its level and returns one Item with its worked solution.
"""

import random

from dataset.toy.core import Item, Level, Turn
from dataset.toy.numbers import end_sentence, join_clauses, join_sentences

WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
DATES = {
    "en": {
        1: (
            "Today is {d}. Which day is it {n} {days} from now?",
            "If today is {d}, what day comes {n} {days} later?",
            "What day of the week is {n} {days} after {d}?",
            "It is {d}. Count {n} {days} forward.",
        ),
        -1: (
            "Today is {d}. Which day was it {n} {days} ago?",
            "If today is {d}, what day was {n} {days} earlier?",
            "What day of the week is {n} {days} before {d}?",
            "It is {d}. Count {n} {days} back.",
        ),
        "way": ("Forward from {d}", "Back from {d}"),
        "reply": ("{n} {days} after {d} is {answer}.", "{n} {days} before {d} is {answer}."),
    },
    "zh": {
        1: (
            "今天是{d}，{n} 天后是星期几？",
            "如果今天是{d}，再过 {n} 天是星期几？",
            "{d}的 {n} 天后是星期几？",
            "今天是{d}，请往后数 {n} 天。",
        ),
        -1: (
            "今天是{d}，{n} 天前是星期几？",
            "如果今天是{d}，往前数 {n} 天是星期几？",
            "{d}的 {n} 天前是星期几？",
            "今天是{d}，请往前数 {n} 天。",
        ),
        "way": ("从{d}往后数", "从{d}往前数"),
        "reply": ("{d}的 {n} 天后是{answer}。", "{d}的 {n} 天前是{answer}。"),
    },
}
UNITS = (  # (big unit, small unit, factor, only at level full)
    (("kilometres", "千米"), ("metres", "米"), 1000, False),
    (("metres", "米"), ("centimetres", "厘米"), 100, False),
    (("kilograms", "千克"), ("grams", "克"), 1000, False),
    (("litres", "升"), ("millilitres", "毫升"), 1000, True),
    (("hours", "小时"), ("minutes", "分钟"), 60, True),
    (("weeks", "星期"), ("days", "天"), 7, True),
    (("years", "年"), ("months", "个月"), 12, True),
)
UNIT_TEXT = {
    "en": (
        "How many {small} are {n} {big}?",
        "Convert {n} {big} to {small}.",
        "What is {n} {big} in {small}?",
    ),
    "zh": (
        "{n} {big}等于多少{small}？",
        "请换算：{n} {big}等于多少{small}？",
        "{n} {big}是多少{small}？",
    ),
}


def dates(rng: random.Random, language: str, level: Level) -> Item:
    """The day of the week so many days later or earlier, counted off day by day; chance is 1/7."""
    start, n, sign = rng.randrange(7), rng.randint(1, level.max_days), rng.choice((1, -1))
    names, text = WEEKDAYS[language], DATES[language]
    answer = names[(start + sign * n) % 7]
    fields = {"d": names[start], "n": n, "days": "day" if n == 1 else "days", "answer": answer}
    question = rng.choice(text[sign]).format(**fields)
    final = text["reply"][sign < 0].format(**fields)
    counted = n if n <= 7 else n % 7
    parts = [f"{i} {names[(start + sign * i) % 7]}" for i in range(1, counted + 1)]
    if n <= 7:
        way = text["way"][sign < 0].format(**fields)
        reasoning = f"{way}{'：' if language == 'zh' else ': '}{join_clauses(parts, language)}"
    else:
        reasoning = join_clauses([f"{n} = {n // 7} × 7 + {counted}", *parts], language)
    reasoning += end_sentence(language)
    reply = join_sentences([reasoning, final], language) if level.worked else final
    other = names[(start + sign * n + rng.randint(1, 6)) % 7]
    wrong = text["reply"][sign < 0].format(**fields | {"answer": other})
    return Item(
        "dates",
        language,
        (f"day:{start}{'+' if sign > 0 else '-'}{n}",),
        (Turn(question, reply),),
        answer,
        1 / 7,
        choices=names,
        reasoning=reasoning,
        short=final,
        wrong=wrong,
    )


def units(rng: random.Random, language: str, level: Level) -> Item:
    """Convert a whole number of a larger unit into a smaller one."""
    big, small, factor, _ = rng.choice(
        [unit for unit in UNITS if level.name == "full" or not unit[3]]
    )
    n = rng.randint(2, 99 if factor in (100, 1000) else 12)
    side = language == "zh"
    fields = {"n": n, "big": big[side], "small": small[side]}
    answer = n * factor
    question = rng.choice(UNIT_TEXT[language]).format(**fields)
    verb = "等于" if side else " is"
    final = f"{n} {big[side]}{verb} {answer} {small[side]}{end_sentence(language)}"
    wrong = final.replace(
        str(answer), str(rng.choice((answer * 10, answer // 10, answer + factor)))
    )
    reasoning = f"{n} × {factor} = {answer}{end_sentence(language)}"
    return Item(
        "units",
        language,
        (f"unit:{big[0]}>{small[0]}:{n}",),
        (Turn(question, final),),
        str(answer),
        reasoning=reasoning,
        prose=rng.choice([final, f"{question} {final}"]),
        wrong=wrong,
    )
