"""The invented world of the toy data and the assistant's own identity.

Entities have one name per language, made of syllables, and the same attributes in both languages.
What is held out of the facts is a phrasing: for every (entity, attribute, language) some question
templates are never used in training, while the fact itself stands in the training text in other
words; otherwise nobody could know it. The same holds for identity: whole phrasings of a question
are held out, the answers are not.
"""

import random
from dataclasses import dataclass

from dataset.toy.core import Item, Turn

NAME_STARTS = tuple(
    zip(
        "Mi To Lu Sa Be No Ka De Fi Ro Ha Vi Pa Ne Gu Zo".split(),
        "米 托 路 沙 贝 诺 卡 德 菲 罗 哈 维 帕 内 古 佐".split(),
    )
)
NAME_ENDS = tuple(
    zip(
        "ra lan na mo tis din bel sha ko ven lo ria ton mi sor fy".split(),
        "拉 兰 娜 莫 蒂斯 丁 贝尔 莎 科 文 洛 莉亚 顿 米 索 菲".split(),
    )
)
NAME_MIDDLES = (("li", "里"), ("ma", "马"), ("ru", "鲁"), ("te", "特"))
TOWNS = tuple(
    zip(
        "Lodan Northam Sunbay Redhill Whitewood Oldbridge Greenport Stonefield".split(),
        "洛丹 北港 阳湾 红山 白林 古桥 绿港 石原".split(),
    )
)
FOODS = tuple(
    zip(
        "noodles soup rice bread cake fish apples cheese".split(),
        "面条 汤 米饭 面包 蛋糕 鱼 苹果 奶酪".split(),
    )
)
PETS = tuple(
    zip(
        "cat dog horse rabbit parrot turtle sheep duck".split(),
        "猫 狗 马 兔子 鹦鹉 乌龟 羊 鸭子".split(),
    )
)
JOBS = tuple(
    zip(
        "teacher doctor farmer painter singer baker driver writer".split(),
        "老师 医生 农民 画家 歌手 面包师 司机 作家".split(),
    )
)
COLOURS = tuple(
    zip(
        "red blue green yellow white black purple brown".split(),
        "红色 蓝色 绿色 黄色 白色 黑色 紫色 棕色".split(),
    )
)


@dataclass(frozen=True)
class Attribute:
    """A property of every entity: its values (en, zh), statements and questions per language."""

    name: str
    values: tuple[tuple[str, str], ...]
    statements: dict[str, tuple[str, ...]]
    questions: dict[str, tuple[str, ...]]


ATTRIBUTES = (
    Attribute(
        "home",
        TOWNS,
        {
            "en": ("{e} lives in {v}.", "The home of {e} is in {v}.", "In {v} lives {e}."),
            "zh": ("{e}住在{v}。", "{e}的家在{v}。", "住在{v}的是{e}。"),
        },
        {
            "en": (
                "Where does {e} live?",
                "In which town does {e} live?",
                "Where is the home of {e}?",
                "Please tell me where {e} lives.",
                "Do you know where {e} lives?",
                "Which town is the home of {e}?",
            ),
            "zh": (
                "{e}住在哪里？",
                "{e}住在哪个镇？",
                "{e}的家在哪里？",
                "请告诉我{e}住在哪里。",
                "你知道{e}住在哪里吗？",
                "{e}的家在哪个镇？",
            ),
        },
    ),
    Attribute(
        "food",
        FOODS,
        {
            "en": (
                "{e} likes to eat {v}.",
                "The favourite food of {e} is {v}.",
                "What {e} likes to eat is {v}.",
            ),
            "zh": ("{e}喜欢吃{v}。", "{e}最喜欢的食物是{v}。", "{e}爱吃的是{v}。"),
        },
        {
            "en": (
                "What does {e} like to eat?",
                "What is the favourite food of {e}?",
                "Which food does {e} like?",
                "Please tell me what {e} likes to eat.",
                "Do you know what {e} likes to eat?",
                "Which food is the favourite of {e}?",
            ),
            "zh": (
                "{e}喜欢吃什么？",
                "{e}最喜欢的食物是什么？",
                "{e}爱吃什么？",
                "请告诉我{e}喜欢吃什么。",
                "你知道{e}喜欢吃什么吗？",
                "{e}喜欢哪种食物？",
            ),
        },
    ),
    Attribute(
        "pet",
        PETS,
        {
            "en": ("{e} keeps a {v}.", "The pet of {e} is a {v}.", "At home {e} has a {v}."),
            "zh": ("{e}养{v}。", "{e}的宠物是{v}。", "{e}家里有{v}。"),
        },
        {
            "en": (
                "Which animal does {e} keep?",
                "What is the pet of {e}?",
                "What pet does {e} have?",
                "Please tell me which pet {e} has.",
                "Do you know which animal {e} keeps?",
                "Which animal is the pet of {e}?",
            ),
            "zh": (
                "{e}养什么动物？",
                "{e}的宠物是什么？",
                "{e}家里有什么动物？",
                "请告诉我{e}养什么动物。",
                "你知道{e}养什么动物吗？",
                "{e}养的是哪种宠物？",
            ),
        },
    ),
    Attribute(
        "job",
        JOBS,
        {
            "en": ("{e} works as a {v}.", "The job of {e} is {v}.", "By trade {e} is a {v}."),
            "zh": ("{e}是一名{v}。", "{e}的工作是{v}。", "{e}的职业是{v}。"),
        },
        {
            "en": (
                "What is the job of {e}?",
                "What does {e} work as?",
                "Which job does {e} have?",
                "Please tell me the job of {e}.",
                "Do you know what {e} works as?",
                "Which trade does {e} follow?",
            ),
            "zh": (
                "{e}做什么工作？",
                "{e}的工作是什么？",
                "{e}的职业是什么？",
                "请告诉我{e}做什么工作。",
                "你知道{e}的职业吗？",
                "{e}是做什么的？",
            ),
        },
    ),
    Attribute(
        "colour",
        COLOURS,
        {
            "en": (
                "The house of {e} is {v}.",
                "{e} has a {v} house.",
                "The colour of the house of {e} is {v}.",
            ),
            "zh": ("{e}的房子是{v}的。", "{e}有一座{v}的房子。", "{e}房子的颜色是{v}。"),
        },
        {
            "en": (
                "What colour is the house of {e}?",
                "Which colour does the house of {e} have?",
                "What is the colour of the house of {e}?",
                "Please tell me the colour of the house of {e}.",
                "Do you know the colour of the house of {e}?",
                "In which colour is the house of {e} painted?",
            ),
            "zh": (
                "{e}的房子是什么颜色？",
                "{e}房子的颜色是什么？",
                "{e}有一座什么颜色的房子？",
                "请告诉我{e}的房子是什么颜色。",
                "你知道{e}的房子是什么颜色吗？",
                "{e}的房子漆成了哪种颜色？",
            ),
        },
    ),
)


@dataclass(frozen=True)
class People:
    """The inhabitants: `names[i]` is (en, zh), `facts[i][k]` indexes the values of attribute k."""

    names: tuple[tuple[str, str], ...]
    facts: tuple[tuple[int, ...], ...]
    attributes: tuple[Attribute, ...]


NAMES = tuple((a[0] + b[0], a[1] + b[1]) for a in NAME_STARTS for b in NAME_ENDS)
STRANGERS = tuple(
    (a[0] + m[0] + b[0], a[1] + m[1] + b[1])
    for a in NAME_STARTS
    for m in NAME_MIDDLES
    for b in NAME_ENDS
)


def make_people(rng: random.Random, count: int, num_attributes: int, pool: tuple = NAMES) -> People:
    """Draw `count` people with different names out of `pool`."""
    attributes = ATTRIBUTES[:num_attributes]
    chosen = rng.sample(pool, count)
    facts = tuple(tuple(rng.randrange(len(a.values)) for a in attributes) for _ in range(count))
    return People(tuple(chosen), facts, attributes)


def value_names(attribute: Attribute, language: str) -> tuple[str, ...]:
    """All values of an attribute in one language."""
    return tuple(value[language == "zh"] for value in attribute.values)


def fact(rng: random.Random, language: str, people: People, skill: str = "facts") -> Item:
    """A question about one inhabitant; the key is the phrasing for this entity and attribute."""
    who, which = rng.randrange(len(people.names)), rng.randrange(len(people.attributes))
    attribute, side = people.attributes[which], language == "zh"
    form = rng.randrange(len(attribute.questions[language]))
    name, value = people.names[who][side], attribute.values[people.facts[who][which]][side]
    statement = rng.choice(attribute.statements[language]).format(e=name, v=value)
    short = attribute.statements[language][0]
    choices = value_names(attribute, language)
    other = rng.choice([v for v in choices if v != value])
    return Item(
        skill,
        language,
        (f"fact:{people.names[who][0]}/{attribute.name}/{language}/{form}",),
        (Turn(attribute.questions[language][form].format(e=name), short.format(e=name, v=value)),),
        value,
        1 / len(choices),
        choices=choices,
        reasoning=statement,
        short=short.format(e=name, v=value),
        prose=statement,
        wrong=short.format(e=name, v=other),
    )


def portrait(rng: random.Random, language: str, people: People) -> str:
    """Running text about one inhabitant: every attribute once, in any order and wording."""
    who, side = rng.randrange(len(people.names)), language == "zh"
    parts = []
    for attribute, index in zip(people.attributes, people.facts[who]):
        form = rng.choice(attribute.statements[language])
        parts.append(form.format(e=people.names[who][side], v=attribute.values[index][side]))
    rng.shuffle(parts)
    return ("" if side else " ").join(parts)


def fact_read(rng: random.Random, language: str) -> Item:
    """A question whose fact stands in the prompt, about people whom nobody has heard of.

    The key is the asked (entity, attribute, value): a held-out one is in no training text, not even
    as context.
    """
    people = make_people(rng, 3, len(ATTRIBUTES), STRANGERS)
    side = language == "zh"
    lines, keys = [], []
    for who, name in enumerate(people.names):
        for attribute, index in rng.sample(list(zip(people.attributes, people.facts[who])), 2):
            text = rng.choice(attribute.statements[language]).format(
                e=name[side], v=attribute.values[index][side]
            )
            key = f"read:{name[0]}/{attribute.name}/{attribute.values[index][0]}"
            lines.append((text, key, attribute, name[side], attribute.values[index][side]))
    rng.shuffle(lines)
    target = rng.choice(lines)
    _, key, attribute, name, value = target
    keys = [key] + [line[1] for line in lines if line is not target]
    choices = value_names(attribute, language)
    reply = attribute.statements[language][0].format(e=name, v=value)
    question = rng.choice(attribute.questions[language]).format(e=name)
    context = ("" if side else " ").join(line[0] for line in lines)
    ask = (
        f"读下面的话，然后回答问题。\n{context}\n{question}"
        if side
        else f"Read this, then answer.\n{context}\n{question}"
    )
    other = rng.choice([v for v in choices if v != value])
    return Item(
        "facts_read",
        language,
        tuple(keys),
        (Turn(ask, reply),),
        value,
        1 / len(choices),
        choices=choices,
        reasoning=target[0],
        short=reply,
        prose=f"{ask}\n{reply}",
        wrong=attribute.statements[language][0].format(e=name, v=other),
    )
