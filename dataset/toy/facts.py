"""The invented world of the toy data and the assistant's own identity.

Entities have one name per language, made of syllables, and the same attributes in both languages.
What is held out of the facts is a phrasing: for every (entity, attribute, language) some question
templates are never used in training, while the fact itself stands in the training text in other
words; otherwise nobody could know it. The same holds for identity: whole phrasings of a question
are held out, the answers are not.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from dataset.toy.core import Item, Pairs, Turn, pairs
from dataset.toy.numbers import join_sentences

NAME_STARTS = pairs(
    "Mi To Lu Sa Be No Ka De Fi Ro Ha Vi Pa Ne Gu Zo",
    "米 托 路 沙 贝 诺 卡 德 菲 罗 哈 维 帕 内 古 佐",
)
NAME_ENDS = pairs(
    "ra lan na mo tis din bel sha ko ven lo ria ton mi sor fy",
    "拉 兰 娜 莫 蒂斯 丁 贝尔 莎 科 文 洛 莉亚 顿 米 索 菲",
)
NAME_MIDDLES = pairs("li ma ru te", "里 马 鲁 特")
TOWNS = pairs(
    "Lodan Northam Sunbay Redhill Whitewood Oldbridge Greenport Stonefield",
    "洛丹 北港 阳湾 红山 白林 古桥 绿港 石原",
)
FOODS = pairs(
    "noodles soup rice bread cake fish apples cheese", "面条 汤 米饭 面包 蛋糕 鱼 苹果 奶酪"
)
PETS = pairs("cat dog horse rabbit parrot turtle sheep duck", "猫 狗 马 兔子 鹦鹉 乌龟 羊 鸭子")
JOBS = pairs(
    "teacher doctor farmer painter singer baker driver writer",
    "老师 医生 农民 画家 歌手 面包师 司机 作家",
)
COLOURS = pairs(
    "red blue green yellow white black purple brown", "红色 蓝色 绿色 黄色 白色 黑色 紫色 棕色"
)


@dataclass(frozen=True)
class Attribute:
    """A property of every entity: its values (en, zh), statements and questions per language."""

    name: str
    values: Pairs
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


class Fact(NamedTuple):
    """One attribute of one inhabitant in one language. `statements` have their value open: {v}."""

    key: str
    value: str
    choices: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def reply(self) -> str:
        return self.statements[0].format(v=self.value)

    def wrong_reply(self, rng: random.Random) -> str:
        """The reply with another value."""
        return self.statements[0].format(v=rng.choice([v for v in self.choices if v != self.value]))


@dataclass(frozen=True)
class People:
    """The inhabitants: `names[i]` is (en, zh), `facts[i][k]` indexes the values of attribute k."""

    names: Pairs
    facts: tuple[tuple[int, ...], ...]
    attributes: tuple[Attribute, ...]

    def fact(self, who: int, which: int, language: str) -> Fact:
        """Attribute `which` of inhabitant `who`."""
        attribute, side = self.attributes[which], language == "zh"
        choices = tuple(value[side] for value in attribute.values)
        statements, questions = (
            tuple(text.replace("{e}", self.names[who][side]) for text in texts[language])
            for texts in (attribute.statements, attribute.questions)
        )
        key = f"{self.names[who][0]}/{attribute.name}"
        return Fact(key, choices[self.facts[who][which]], choices, statements, questions)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """An inhabitant and an attribute."""
        return rng.randrange(len(self.names)), rng.randrange(len(self.attributes))


def compound(*parts: Pairs) -> Pairs:
    """All names made of one syllable of each part."""
    return tuple(tuple(map("".join, zip(*chosen))) for chosen in product(*parts))


NAMES = compound(NAME_STARTS, NAME_ENDS)
STRANGERS = compound(NAME_STARTS, NAME_MIDDLES, NAME_ENDS)


def make_people(rng: random.Random, count: int, num_attributes: int, pool: Pairs = NAMES) -> People:
    """Draw `count` people with different names out of `pool`."""
    attributes = ATTRIBUTES[:num_attributes]
    chosen = rng.sample(pool, count)
    facts = tuple(tuple(rng.randrange(len(a.values)) for a in attributes) for _ in range(count))
    return People(tuple(chosen), facts, attributes)


def fact(rng: random.Random, language: str, people: People) -> Item:
    """A question about one inhabitant; the key is the phrasing for this entity and attribute."""
    known = people.fact(*people.draw(rng), language)
    form = rng.randrange(len(known.questions))
    statement = rng.choice(known.statements).format(v=known.value)
    return Item(
        "facts",
        language,
        (f"fact:{known.key}/{language}/{form}",),
        (Turn(known.questions[form], known.reply),),
        known.value,
        1 / len(known.choices),
        choices=known.choices,
        reasoning=statement,
        prose=statement,
        wrong=known.wrong_reply(rng),
    )


def portrait(rng: random.Random, language: str, people: People) -> str:
    """Running text about one inhabitant: every attribute once, in any order and wording."""
    who, parts = rng.randrange(len(people.names)), []
    for which in range(len(people.attributes)):
        known = people.fact(who, which, language)
        parts.append(rng.choice(known.statements).format(v=known.value))
    rng.shuffle(parts)
    return join_sentences(parts, language)


def fact_read(rng: random.Random, language: str) -> Item:
    """A question whose fact stands in the prompt, about people whom nobody has heard of.

    The key is the asked (entity, attribute, value): a held-out one is in no training text, not even
    as context.
    """
    people, lines = make_people(rng, 3, len(ATTRIBUTES), STRANGERS), []
    for who in range(len(people.names)):
        for which in rng.sample(range(len(ATTRIBUTES)), 2):
            known = people.fact(who, which, language)
            key = f"read:{known.key}/{people.fact(who, which, 'en').value}"
            lines.append((rng.choice(known.statements).format(v=known.value), key, known))
    rng.shuffle(lines)
    target = rng.choice(lines)
    statement, key, asked = target
    question = rng.choice(asked.questions)
    context = join_sentences([line[0] for line in lines], language)
    task = "读下面的话，然后回答问题。" if language == "zh" else "Read this, then answer."
    prompt = f"{task}\n{context}\n{question}"
    return Item(
        "facts_read",
        language,
        (key, *(line[1] for line in lines if line is not target)),
        (Turn(prompt, asked.reply),),
        asked.value,
        1 / len(asked.choices),
        choices=asked.choices,
        reasoning=statement,
        prose=f"{prompt}\n{asked.reply}",
        wrong=asked.wrong_reply(rng),
    )
