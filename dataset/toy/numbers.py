"""Skills of the toy world with bare numbers: arithmetic, comparison, sorting, counting.

Every maker takes (rng, language) plus its level and returns one Item with its worked solution.
"""

import math
import random

from dataset.toy.core import Item, Level, Turn, apply, op_key, pairs

Step = tuple[int, str, int]  # a, operator, b

ARITHMETIC = {
    "en": (
        "What is {a} {op} {b}?",
        "{a} {op} {b} = ?",
        "Please {request}.",
        "How much is {a} {word} {b}?",
    ),
    "zh": (
        "{a} {op} {b} = ?",
        "{a} {request} {b} 等于多少？",
        "请计算 {a} {op} {b}。",
        "{a} {word} {b} 是多少？",
    ),
}
OPERATIONS = {  # operator -> (request, word)
    "en": {
        "+": ("add {a} and {b}", "plus"),
        "-": ("take {b} away from {a}", "minus"),
        "×": ("multiply {a} by {b}", "times"),
    },
    "zh": {"+": ("加", "加上"), "-": ("减", "减去"), "×": ("乘", "乘以")},
}
COMPARISON = {  # questions, reply
    "en": (
        ("Which is {kind}, {a} or {b}?", "Compare {a} and {b}: which one is {kind}?"),
        "{a} {sign} {b}, so the {kind} one is {answer}.",
    ),
    "zh": (
        ("{a} 和 {b} 哪个更{kind}？", "比较 {a} 和 {b}，哪一个更{kind}？"),
        "{a} {sign} {b}，所以更{kind}的是 {answer}。",
    ),
}
KINDS = {"larger": "大", "smaller": "小"}
SORTING = {
    "en": {
        True: ("Sort from small to large: {x}", "Put these numbers in order, smallest first: {x}"),
        False: ("Sort from large to small: {x}", "Put these numbers in order, largest first: {x}"),
    },
    "zh": {
        True: ("从小到大排序：{x}", "请把这些数按从小到大的顺序排列：{x}"),
        False: ("从大到小排序：{x}", "请把这些数按从大到小的顺序排列：{x}"),
    },
}
WORDS = pairs(
    "cat dog bird fish apple book tree star lamp door cup hat "
    "ball ship horse rose milk rice bread chair stone river moon snow",
    "猫 狗 鸟 鱼 苹果 书 树 星 灯 门 杯子 帽子 球 船 马 玫瑰 牛奶 米饭 面包 椅子 石头 河 月亮 雪",
)
COUNT_ALL = {
    "en": (
        "How many words are in this list: {x}",
        "Count these words: {x}",
        "How many things do you see: {x}",
    ),
    "zh": ("下面一共有几个词：{x}", "数一数这些词：{x}", "这里有几样东西：{x}"),
}
COUNT_ONE = {
    "en": ('How many times does "{w}" appear here: {x}', 'Count the word "{w}" in this list: {x}'),
    "zh": ("“{w}”在这里出现了几次：{x}", "数一数下面有几个“{w}”：{x}"),
}


def end_sentence(language: str) -> str:
    """The full stop of a language."""
    return "。" if language == "zh" else "."


def join_clauses(parts: list[str], language: str) -> str:
    """Clauses joined by the comma of a language."""
    return ("，" if language == "zh" else ", ").join(parts)


def join_sentences(parts: list[str], language: str) -> str:
    """Sentences joined as in a language: Chinese has no spaces."""
    return ("" if language == "zh" else " ").join(parts)


def work_out(a: int, op: str, b: int) -> list[Step]:
    """The steps a child writes down for `a op b`, place by place; one step if known by heart."""
    if not op_key(a, op, b):
        return [(a, op, b)]
    if op == "×":
        big, small = max(a, b), min(a, b)
        part = 10 if big > 10 else 5
        if big <= 5:
            return [(a, op, b)]
        return [
            (small, op, part),
            (small, op, big - part),
            (small * part, "+", small * (big - part)),
        ]
    steps, results, place, borrow = [], [], 1, 0
    while a // place or b // place:
        x, y = a // place % 10 - borrow, b // place % 10
        borrow = 1 if op == "-" and x < y else 0
        x = x + 10 * borrow
        if y and x:
            steps.append((x * place, op, y * place))
        results.append(apply(x * place, op, y * place))
        place *= 10
    results = [value for value in reversed(results) if value]
    total = results[0]
    for value in results[1:]:
        steps.append((total, "+", value))
        total += value
    return steps


def step_keys(steps: list[Step]) -> tuple[str, ...]:
    """The keys of all steps, in order."""
    return tuple(key for step in steps for key in op_key(*step))


def write_steps(steps: list[Step], language: str) -> str:
    """The steps as equations in one sentence."""
    return join_clauses([f"{a} {op} {b} = {apply(a, op, b)}" for a, op, b in steps], language)


def near_miss(rng: random.Random, value: int) -> int:
    """A wrong number close to `value`, never negative."""
    return rng.choice(
        [n for n in (value - 10, value - 2, value - 1, value + 1, value + 2, value + 10) if n >= 0]
    )


def draw_operands(rng: random.Random, level: Level) -> Step:
    """A sum, difference or product in the level's range; a quarter are those known by heart."""
    ops = "+-×" if level.max_factor else "+-"
    op = rng.choice(ops)
    if op == "×":
        return rng.randint(2, level.max_factor), op, rng.randint(2, level.max_factor)
    top = 18 if rng.random() < 0.25 else level.max_sum
    if top > 99 and rng.random() < 0.4:
        top = 99
    total = rng.randint(2, top)
    part = (
        rng.randint(1, total - 1) if top > 18 else rng.randint(max(1, total - 9), min(9, total - 1))
    )
    return (part, op, total - part) if op == "+" else (total, op, part)


def arithmetic(rng: random.Random, language: str, level: Level) -> Item:
    """Sums, differences and, at level full, products; small tables are always training material."""
    a, op, b = draw_operands(rng, level)
    steps, stop = work_out(a, op, b), end_sentence(language)
    answer = str(apply(a, op, b))
    final = f"{a} {op} {b} = {answer}{stop}"
    reasoning = write_steps(steps, language) + stop
    reply = final
    if len(steps) > 1 and level.worked:
        reply = f"{reasoning}{'所以 ' if language == 'zh' else ' So '}{final}"
    wrong = f"{a} {op} {b} = {near_miss(rng, int(answer))}{stop}"
    request, word = (text.format(a=a, b=b) for text in OPERATIONS[language][op])
    question = rng.choice(ARITHMETIC[language]).format(a=a, b=b, op=op, request=request, word=word)
    prose = rng.choice([final, f"{question} {reply}", f"{question} {reply}"])
    return Item(
        "arithmetic",
        language,
        tuple(dict.fromkeys(op_key(a, op, b) + step_keys(steps))),
        (Turn(question, reply),),
        answer,
        reasoning=reasoning,
        short=final,
        prose=prose,
        wrong=wrong,
    )


def comparison(rng: random.Random, language: str, level: Level) -> Item:
    """Which of two numbers is larger or smaller; chance is one half."""
    top = rng.choice([level.max_sum, 99]) if level.max_sum > 99 else level.max_sum
    a, b = rng.sample(range(top + 1), 2)
    kind = rng.choice(["larger", "smaller"])
    questions, text = COMPARISON[language]
    word = kind if language == "en" else KINDS[kind]
    answer, other = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    sign = "<" if a < b else ">"
    reply = text.format(a=a, b=b, sign=sign, kind=word, answer=answer)
    wrong = text.format(a=a, b=b, sign="<>"[sign == "<"], kind=word, answer=other)
    question = rng.choice(questions).format(a=a, b=b, kind=word)
    reasoning = f"{a} {sign} {b}{end_sentence(language)}"
    return Item(
        "comparison",
        language,
        (f"cmp:{min(a, b)},{max(a, b)}",),
        (Turn(question, reply),),
        str(answer),
        0.5,
        reasoning=reasoning,
        short=str(answer) + end_sentence(language),
        wrong=wrong,
    )


def sorting(rng: random.Random, language: str, level: Level) -> Item:
    """Put a few different numbers in order; chance is one over the number of orders."""
    size = rng.choice(level.sort_sizes)
    numbers = rng.sample(range(1, level.sort_max + 1), size)
    upwards = rng.random() < 0.5
    ordered = sorted(numbers, reverse=not upwards)
    shown, answer = ", ".join(map(str, numbers)), ", ".join(map(str, ordered))
    swapped = ordered[1:2] + ordered[0:1] + ordered[2:]
    question = rng.choice(SORTING[language][upwards]).format(x=shown)
    reasoning = join_clauses(
        [f"{i} → {n}" for i, n in enumerate(ordered, 1)], language
    ) + end_sentence(language)
    return Item(
        "sorting",
        language,
        ("sort:" + ",".join(map(str, sorted(numbers))),),
        (Turn(question, answer),),
        answer,
        1 / math.factorial(size),
        reasoning=reasoning,
        prose=f"{question}\n{answer}",
        wrong=", ".join(map(str, swapped)),
    )


def counting(rng: random.Random, language: str, level: Level) -> Item:
    """How many words a list has (level mini) or how often one stands in it, counted aloud."""
    low, high = level.count_sizes
    size, side = rng.randint(low, high), language == "zh"
    if level.name == "mini":
        listed, target = rng.sample(range(len(WORDS)), size), None
        question = rng.choice(COUNT_ALL[language])
    else:
        kinds = rng.sample(range(len(WORDS)), rng.choice((2, 2, 3)))
        listed, target = [rng.choice(kinds) for _ in range(size)], kinds[0]
        question = rng.choice(COUNT_ONE[language])
    aloud, count = [], 0
    for kind in listed:
        hit = target is None or kind == target
        count += hit
        aloud.append(f"{count} {WORDS[kind][side]}" if hit else WORDS[kind][side])
    separator, stop = "、" if side else ", ", end_sentence(language)
    word = "" if target is None else WORDS[target][side]
    question = question.format(w=word, x=separator.join(WORDS[kind][side] for kind in listed))
    final = (f"一共 {count} 个" if side else f"That makes {count}") + stop
    reasoning = separator.join(aloud) + stop
    reply = join_sentences([reasoning, final], language) if level.worked else final
    key = "count:" + ",".join([f"{target}:" if target is not None else "", *map(str, listed)])
    values = high - low + 1 if target is None else high + 1
    return Item(
        "counting",
        language,
        (key,),
        (Turn(question, reply),),
        str(count),
        1 / values,
        reasoning=reasoning,
        short=final,
        wrong=final.replace(str(count), str(near_miss(rng, count))),
    )
