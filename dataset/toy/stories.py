"""Skills of the toy world made of several sentences: word problems, look-ups, multi-turn talk,
manners.
"""

import random

from dataset.toy.core import Item, Level, Turn, apply, is_heldout, op_key, pairs
from dataset.toy.facts import NAMES, People
from dataset.toy.numbers import (
    WORDS,
    end_sentence,
    join_clauses,
    join_sentences,
    near_miss,
    step_keys,
    write_steps,
)

PERSONS = pairs("Anna Tom Lily Ben Emma Jack Rosa Paul", "安娜 汤姆 莉莉 小本 艾玛 杰克 小红 小明")
GOODS = pairs("apples books stamps coins cards stones", "个苹果 本书 张邮票 枚硬币 张卡片 块石头")
STORY = {
    "en": {
        "start": ("{p} has {a} {g}.", "At first {p} has {a} {g}."),
        "+": ("{p} buys {b} more.", "{p} finds {b} more.", "A friend gives {p} {b} more."),
        "-": ("{p} gives away {b}.", "{p} loses {b}.", "{p} sells {b}."),
        "×": (
            "Then {p} works hard and has {b} times as many.",
            "By magic the number becomes {b} times as large.",
        ),
        "end": ("How many {g} does {p} have now?", "How many {g} does {p} have in the end?"),
        "reply": "{s}. {p} has {c} {g}.",
    },
    "zh": {
        "start": ("{p}有 {a} {g}。", "一开始{p}有 {a} {g}。"),
        "+": ("又买了 {b} {m}。", "又找到 {b} {m}。", "朋友又给了 {b} {m}。"),
        "-": ("送出去 {b} {m}。", "丢了 {b} {m}。", "卖掉 {b} {m}。"),
        "×": ("后来变成了原来的 {b} 倍。", "然后数量变成 {b} 倍。"),
        "end": ("{p}现在有多少{g}？", "最后{p}有多少{g}？"),
        "reply": "{s}。{p}有 {c} {g}。",
    },
}
WARES = pairs("pen cup ball hat", "支笔 个杯子 个球 顶帽子")
SHOP = {
    "en": (
        "One {w} costs {a} coins. {p} buys {b} of them and pays with {c} coins. How many coins "
        "does {p} get back?",
        "{s}. {p} gets {d} coins back.",
    ),
    "zh": (
        "一{w}卖 {a} 元。{p}买了 {b} {m}，付了 {c} 元。应该找回多少元？",
        "{s}。应该找回 {d} 元。",
    ),
}
LOOKUP = {
    "en": (
        "What number belongs to {w}?",
        "Which number stands next to {w}?",
        "Find the number of {w}.",
    ),
    "zh": ("{w}对应的数字是多少？", "{w}后面的数字是几？", "请找出{w}的数字。"),
}
SAYS = {"en": "The list says {w} = {v}.", "zh": "表中写着 {w} = {v}。"}
MORE = {
    "en": {
        "+": ("And {c} more?", "Now add {c}.", "Plus {c}?"),
        "-": ("Now take away {c}.", "And minus {c}?", "{c} less?"),
    },
    "zh": {
        "+": ("再加 {c} 呢？", "现在加上 {c}。", "然后加 {c}？"),
        "-": ("再减 {c} 呢？", "现在减去 {c}。", "然后减 {c}？"),
    },
}
ABOUT = {"en": ("And {e}?", "What about {e}?"), "zh": ("那{e}呢？", "{e}呢？")}
REQUESTS = {
    "en": (
        "Could you help me? {q}",
        "I have a question for you. {q}",
        "Sorry to bother you. {q}",
        "Please help. {q}",
    ),
    "zh": ("可以帮帮我吗？{q}", "我有个问题想问你。{q}", "打扰一下。{q}", "麻烦你了。{q}"),
}
POLITE = {
    "en": ("Of course! {r} Happy to help!", "Gladly! {r} Ask me any time!"),
    "zh": ("当然可以！{r}很高兴能帮到你！", "没问题！{r}欢迎随时再问！"),
}
MANNERS = {"en": ("Happy to help", "Ask me any time"), "zh": ("很高兴能帮到你", "欢迎随时再问")}


def story_numbers(rng: random.Random, level: Level) -> list[tuple[int, str, int]]:
    """Steps that each start from the result before; all results are from 1 to the level's top."""
    small = level.name == "mini"
    top = 20 if small else rng.choice((50, 100, 200))
    value = rng.randint(2, 9 if small else top // 3)
    steps, limit = [], rng.choice(level.story_steps)
    while len(steps) < limit:
        op = rng.choice("+-" if small else "+-+-×")
        if op == "×" and 3 < value and value * 2 <= top:
            b = rng.randint(2, min(5, top // value))
        elif op == "+" and value < top:
            b = rng.randint(1, min(9 if small else 60, top - value))
        elif op == "-" and value > 1:
            b = rng.randint(1, min(9 if small else 60, value - 1))
        else:
            continue
        steps.append((value, op, b))
        value = apply(value, op, b)
    return steps


def word_problem(rng: random.Random, language: str, level: Level) -> Item:
    """A story with numbers and its solution step by step; some at level full are about shopping."""
    if level.name == "full" and rng.random() < 0.2:
        return shopping(rng, language)
    side, text, steps = language == "zh", STORY[language], story_numbers(rng, level)
    person, goods = rng.choice(PERSONS)[side], rng.choice(GOODS)[side]
    fields = {"p": person, "g": goods, "m": goods[:1]}
    parts = [rng.choice(text["start"]).format(a=steps[0][0], **fields)]
    parts += [rng.choice(text[op]).format(b=b, **fields) for _, op, b in steps]
    parts.append(rng.choice(text["end"]).format(**fields))
    question, worked = join_sentences(parts, language), write_steps(steps, language)
    answer = apply(*steps[-1])
    reply = text["reply"].format(s=worked, c=answer, **fields)
    wrong = text["reply"].format(s=worked.rpartition("= ")[0] + "= {c}", c="{c}", **fields)
    final = text["reply"].format(s="", c=answer, **fields).lstrip(".。 ")
    key = "story:" + str(steps[0][0]) + "".join(f"{op}{b}" for _, op, b in steps)
    return Item(
        "word_problems",
        language,
        tuple(dict.fromkeys((key, *step_keys(steps)))),
        (Turn(question, reply),),
        str(answer),
        reasoning=worked + end_sentence(language),
        short=final,
        wrong=wrong.format(c=near_miss(rng, answer)),
    )


def shopping(rng: random.Random, language: str) -> Item:
    """Price times number, then the change."""
    side = language == "zh"
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    paid = rng.choice([n for n in (10, 20, 50, 100, 200) if n > a * b])
    ware, person = rng.choice(WARES)[side], rng.choice(PERSONS)[side]
    question, reply = (
        text.format(w=ware, m=ware[:1], a=a, b=b, c=paid, p=person, d=paid - a * b, s="{s}")
        for text in SHOP[language]
    )
    steps = [(a, "×", b), (paid, "-", a * b)]
    worked = write_steps(steps, language)
    miss = near_miss(rng, paid - a * b)
    slip = join_clauses([f"{a} × {b} = {a * b}", f"{paid} - {a * b} = {miss}"], language)
    wrong = SHOP[language][1].format(s=slip, p=person, d=miss)
    return Item(
        "word_problems",
        language,
        (f"shop:{a}x{b},{paid}", *step_keys(steps)),
        (Turn(question, reply.format(s=worked)),),
        str(paid - a * b),
        reasoning=worked + end_sentence(language),
        short=reply.format(s="").lstrip(".。 "),
        wrong=wrong,
    )


def lookup(rng: random.Random, language: str, level: Level) -> Item:
    """One line out of a list of "- name = number"; the key is the asked (name, number) pair.

    The other lines never carry a held-out pair; chance is one over the number of lines.
    """
    count, side = rng.choice(level.lookup_lines), language == "zh"
    pool, low, top = (WORDS, 1, 9) if level.name == "mini" else (NAMES, 10, 999)
    names = rng.sample(pool, count)
    values = [rng.randint(low, top) for _ in names]
    target = rng.randrange(count)
    for i, name in enumerate(names):
        while i != target and is_heldout(f"look:{name[0]}={values[i]}"):
            values[i] = rng.randint(low, top)
    name = names[target][side]
    lines = [f"- {n[side]} = {value}" for n, value in zip(names, values)]
    question = "\n".join([*lines, rng.choice(LOOKUP[language]).format(w=name)])
    reply = SAYS[language].format(w=name, v=values[target])
    told = [SAYS[language].format(w=n[side], v=value) for n, value in zip(names, values)]
    rng.shuffle(told)
    prose = "\n".join([*lines, *told[:8]]) if rng.random() < 0.7 else f"{question}\n{reply}"
    other = next(value for value in [*values, values[target] + 1] if value != values[target])
    return Item(
        "lookup",
        language,
        (f"look:{names[target][0]}={values[target]}",),
        (Turn(question, reply),),
        str(values[target]),
        1 / count,
        prose=prose,
        wrong=SAYS[language].format(w=name, v=other),
    )


def echo(rng: random.Random, language: str) -> str:
    """Words and numbers in any order, twice: the plainest text from which to learn to copy."""
    listed = [
        rng.choice(WORDS)[language == "zh"] if rng.random() < 0.6 else str(rng.randint(0, 99))
        for _ in range(8)
    ]
    line = join_clauses(listed[: rng.randint(5, 8)], language)
    return f"{line}{end_sentence(language)}\n{line}{end_sentence(language)}"


def follow_up_sum(rng: random.Random, language: str, level: Level) -> Item:
    """A small sum, then one or two turns that continue from its result."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    value, stop = a + b, end_sentence(language)
    turns = [Turn(f"{a} + {b} = ?", f"{a} + {b} = {value}{stop}")]
    keys, name = [], f"multi:{a}+{b}"
    for _ in range(1 if level.name == "mini" else rng.choice((1, 2))):
        op = rng.choice("+-") if value > 2 else "+"
        c = rng.randint(1, 9 if op == "+" else min(9, value - 1))
        reply = f"{value} {op} {c} = {apply(value, op, c)}{stop}"
        turns.append(Turn(rng.choice(MORE[language][op]).format(c=c), reply))
        keys += op_key(value, op, c)
        name, value = f"{name}{op}{c}", apply(value, op, c)
    wrong = turns[-1].reply.rpartition("= ")[0] + f"= {near_miss(rng, value)}{stop}"
    return Item(
        "multi_turn", language, (name, *dict.fromkeys(keys)), tuple(turns), str(value), wrong=wrong
    )


def follow_up_fact(rng: random.Random, language: str, people: People) -> Item:
    """A question about one inhabitant, then the same about another in two words."""
    which = rng.randrange(len(people.attributes))
    pair = rng.sample(range(len(people.names)), 2)
    first, second = (people.fact(who, which, language) for who in pair)
    name = people.names[pair[1]][language == "zh"]
    turns = (
        Turn(first.questions[0], first.reply),
        Turn(rng.choice(ABOUT[language]).format(e=name), second.reply),
    )
    return Item(
        "multi_turn",
        language,
        (f"multi:{people.names[pair[0]][0]}>{second.key}", f"fact:{first.key}/{language}/0"),
        turns,
        second.value,
        1 / len(second.choices),
        choices=second.choices,
        prose=second.reply,
        wrong=second.wrong_reply(rng),
    )


def multi_turn(rng: random.Random, language: str, level: Level, people: People) -> Item:
    """A conversation whose last question cannot be understood without the turns before it."""
    if rng.random() < 0.5:
        return follow_up_sum(rng, language, level)
    return follow_up_fact(rng, language, people)


def preference(rng: random.Random, language: str, people: People) -> Item:
    """A known fact asked for kindly: the good reply is right and polite, `short` right but curt."""
    which = rng.randrange(len(people.attributes))
    known = people.fact(rng.randrange(len(people.names)), which, language)
    form = rng.randrange(len(known.questions))
    request = rng.randrange(len(REQUESTS[language]))
    question = REQUESTS[language][request].format(q=known.questions[form])
    manner = rng.choice(POLITE[language])
    phrasing = f"{known.key}/{language}/{form}"
    return Item(
        "preferences",
        language,
        (f"pref:{phrasing}/{request}", f"fact:{phrasing}"),
        (Turn(question, manner.format(r=known.reply)),),
        known.value,
        choices=known.choices,
        manners=MANNERS[language],
        reasoning=known.reply,
        short=known.value[0].upper() + known.value[1:] + end_sentence(language),
        prose=known.reply,
        wrong=manner.format(r=known.wrong_reply(rng)),
    )
