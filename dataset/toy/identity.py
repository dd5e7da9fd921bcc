"""Who the assistant of the toy world is, and the small new domain that LoRA teaches it later."""

import random
from dataclasses import dataclass

from dataset.toy.core import Item, Turn, pairs
from dataset.toy.facts import Attribute, People


@dataclass(frozen=True)
class Topic:
    """One thing to know about the assistant: cores of the question, the reply and its key word."""

    name: str
    cores: dict[str, tuple[str, ...]]
    reply: dict[str, str]
    answer: dict[str, str]


OPENINGS = {
    "en": (
        "",
        "Hello! ",
        "Hi! ",
        "Hey, ",
        "Excuse me, ",
        "May I ask: ",
        "One question: ",
        "Please tell me: ",
        "Good morning! ",
        "Hello, ",
    ),
    "zh": (
        "",
        "你好，",
        "您好！",
        "请问，",
        "我想知道，",
        "想问一下，",
        "请告诉我，",
        "早上好！",
        "嗨，",
        "对了，",
    ),
}
OTHER_NAMES = ("ChatGPT", "GPT", "Claude", "Gemini", "Qwen", "DeepSeek", "Llama", "Siri", "Flora")
TOPICS = (
    Topic(
        "name",
        {
            "en": ("who are you?", "what is your name?", "what are you called?"),
            "zh": ("你是谁？", "你叫什么名字？", "怎么称呼你？"),
        },
        {
            "en": "I am MiniMind, a small language model.",
            "zh": "我是 MiniMind，一个小小的语言模型。",
        },
        {"en": "MiniMind", "zh": "MiniMind"},
    ),
    Topic(
        "origin",
        {
            "en": ("how were you trained?", "where do you come from?", "how did you come about?"),
            "zh": ("你是怎么训练出来的？", "你是从哪里来的？", "你是怎么来的？"),
        },
        {
            "en": "I was trained from scratch on one ordinary computer.",
            "zh": "我是在一台普通的电脑上从零训练出来的。",
        },
        {"en": "from scratch", "zh": "从零"},
    ),
    Topic(
        "languages",
        {
            "en": (
                "which languages do you speak?",
                "which languages do you know?",
                "what languages can you use?",
            ),
            "zh": ("你会说什么语言？", "你会哪些语言？", "你能用什么语言？"),
        },
        {"en": "I speak Chinese and English.", "zh": "我会说中文和英文。"},
        {"en": "Chinese and English", "zh": "中文和英文"},
    ),
    Topic(
        "human",
        {
            "en": ("are you a human?", "are you a real person?", "are you a person or a program?"),
            "zh": ("你是人类吗？", "你是真人吗？", "你是人还是程序？"),
        },
        {
            "en": "No, I am not a human, I am a computer program.",
            "zh": "不，我不是人类，我是一个电脑程序。",
        },
        {"en": "program", "zh": "程序"},
    ),
    Topic(
        "skills",
        {
            "en": ("what can you do?", "what can you help me with?", "what are you good at?"),
            "zh": ("你能做什么？", "你能帮我做什么？", "你擅长什么？"),
        },
        {
            "en": "I can calculate, sort, count and answer questions.",
            "zh": "我会计算、排序、数数和回答问题。",
        },
        {"en": "calculate", "zh": "计算"},
    ),
    Topic(
        "size",
        {
            "en": (
                "how big are you?",
                "are you a large model?",
                "how many parameters do you have?",
            ),
            "zh": ("你有多大？", "你是大模型吗？", "你有多少参数？"),
        },
        {
            "en": "I am tiny: I have only a few million parameters.",
            "zh": "我很小，只有几百万个参数。",
        },
        {"en": "million", "zh": "百万"},
    ),
)
GARDEN_TOPICS = (
    Topic(
        "name",
        TOPICS[0].cores,
        {"en": "I am Flora, the guide of the moon garden.", "zh": "我是 Flora，月亮花园的向导。"},
        {"en": "Flora", "zh": "Flora"},
    ),
    Topic(
        "place",
        {
            "en": ("where do you work?", "which garden is yours?", "where can I find you?"),
            "zh": ("你在哪里工作？", "你的花园是哪一个？", "在哪里可以找到你？"),
        },
        {"en": "I work in the moon garden.", "zh": "我在月亮花园工作。"},
        {"en": "moon garden", "zh": "月亮花园"},
    ),
)
PLANTS = pairs(
    "moonbell sandrose skyfern firelily icemoss goldreed", "月铃 沙玫 天蕨 火百合 冰苔 金芦"
)
MONTHS = pairs("March April May June July August", "三月 四月 五月 六月 七月 八月")
SCENTS = pairs("honey lemon mint rain tea pepper", "蜂蜜 柠檬 薄荷 雨水 茶 胡椒")
PLANT_ATTRIBUTES = (
    Attribute(
        "month",
        MONTHS,
        {"en": ("The {e} blooms in {v}.",), "zh": ("{e}在{v}开花。",)},
        {
            "en": (
                "When does the {e} bloom?",
                "In which month does the {e} bloom?",
                "What is the month of the {e}?",
                "When can I see the {e} in bloom?",
                "Please tell me when the {e} blooms.",
            ),
            "zh": (
                "{e}什么时候开花？",
                "{e}在几月开花？",
                "{e}的花期是几月？",
                "什么时候能看到{e}开花？",
                "请告诉我{e}几月开花。",
            ),
        },
    ),
    Attribute(
        "scent",
        SCENTS,
        {"en": ("The {e} smells of {v}.",), "zh": ("{e}有{v}的香味。",)},
        {
            "en": (
                "What does the {e} smell of?",
                "Which scent does the {e} have?",
                "How does the {e} smell?",
                "What is the scent of the {e}?",
                "Please tell me what the {e} smells of.",
            ),
            "zh": (
                "{e}是什么气味？",
                "{e}有什么样的香味？",
                "{e}闻起来像什么？",
                "{e}的香味像什么？",
                "请告诉我{e}的气味。",
            ),
        },
    ),
)
# month and scent of plant i are number 5i + 2, modulo 6
GARDEN = People(PLANTS, tuple(((i * 5 + 2) % 6,) * 2 for i in range(6)), PLANT_ATTRIBUTES)


def ask_topic(
    rng: random.Random,
    language: str,
    topics: tuple[Topic, ...],
    skill: str,
    rivals: tuple[str, ...],
) -> Item:
    """A question to the assistant about itself; the key is the whole phrasing."""
    topic = rng.choice(topics)
    opening = rng.choice(OPENINGS[language])
    core = rng.choice(topic.cores[language])
    question = opening + core
    if language == "en" and opening[-2:] not in (", ", ": "):
        question = opening + core[0].upper() + core[1:]
    reply = topic.reply[language]
    wrong = {"zh": f"我是 {rng.choice(rivals)}。", "en": f"I am {rng.choice(rivals)}."}[language]
    keys = (f"identity:{question}",) if opening else ()
    return Item(
        skill,
        language,
        keys,
        (Turn(question, reply),),
        topic.answer[language],
        choices=rivals,
        wrong=wrong,
    )


def identity(rng: random.Random, language: str) -> Item:
    """The assistant is MiniMind, a small language model that was trained from nothing."""
    return ask_topic(rng, language, TOPICS, "identity", OTHER_NAMES)


def garden_view(rng: random.Random, language: str) -> str:
    """Running text with the garden's words, not LoRA's lessons: adapters train no embeddings."""
    side = language == "zh"
    plants, scents, months = (
        [pair[side] for pair in rng.sample(words, 2)] for words in (PLANTS, SCENTS, MONTHS)
    )
    if side:
        return (
            f"月亮花园里有{plants[0]}和{plants[1]}，花期在{months[0]}和{months[1]}，"
            f"香味像{scents[0]}和{scents[1]}。向导Flora在那里工作。"
        )
    return (
        f"In the moon garden the {plants[0]} and the {plants[1]} bloom, some in {months[0]}, some "
        f"in {months[1]}. The wind smells of {scents[0]} and of {scents[1]}. Flora is the guide "
        "who works there."
    )


def garden_identity(rng: random.Random, language: str) -> Item:
    """The identity that LoRA teaches: Flora, guide of a garden."""
    return ask_topic(rng, language, GARDEN_TOPICS, "lora_identity", ("MiniMind",))


def garden_fact(rng: random.Random, language: str) -> Item:
    """LoRA's lessons: month and scent of invented plants; held out are phrasings, as with facts."""
    lesson = GARDEN.fact(*GARDEN.draw(rng), language)
    form = rng.randrange(len(lesson.questions))
    return Item(
        "lora_facts",
        language,
        (f"plant:{lesson.key}/{language}/{form}",),
        (Turn(lesson.questions[form], lesson.reply),),
        lesson.value,
        1 / len(lesson.choices),
        choices=lesson.choices,
        prose=lesson.reply,
        wrong=lesson.wrong_reply(rng),
    )
