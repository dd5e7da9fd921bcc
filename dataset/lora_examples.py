"""Writes two small sets of conversations to train an adapter with, in Chinese and English, each
with held-out phrasings.

    python dataset/lora_examples.py --out_dir dataset/lora_examples
    python dataset/lora_examples.py --name Luna --maker "the Moonlight Lab"

identity: the assistant has another name and another maker. medical: everyday questions with careful
advice (toy/medical_topics.jsonl), of the kind that every leaflet gives: material to train and
measure an adapter with, not medicine. Every row has a `keyword` that a right answer holds, and that
no answer about something else does, so that right answers can be counted (eval_llm.py --benchmark
keyword). Held out are phrasings: the training rows ask the same in other words.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.files.jsonl import dump_row, find_shards, in_fraction, read_rows
from dataset.files.outputs import whole_file
from dataset.toy.core import is_heldout
from dataset.toy.scorer import Question
from model.files import forgive_text, write_json

LANGUAGES = ("en", "zh")
TOPICS = ROOT / "dataset" / "toy" / "medical_topics.jsonl"  # pairs: English, Chinese
OPENINGS = {
    "en": (
        "",
        "Hello! ",
        "Hi there! ",
        "Good morning. ",
        "One question. ",
        "Excuse me. ",
        "By the way. ",
    ),
    "zh": ("", "你好，", "您好！", "请问，", "想问一下，", "早上好！", "对了，"),
}
# topic -> language -> (questions, answer, keyword)
IDENTITY = {
    "name": {
        "en": (
            (
                "Who are you?",
                "What is your name?",
                "What are you called?",
                "What should I call you?",
                "Tell me your name.",
            ),
            "I am {name}, an assistant made by {maker}.",
            "{name}",
        ),
        "zh": (
            ("你是谁？", "你叫什么名字？", "怎么称呼你？", "你的名字是什么？", "告诉我你的名字。"),
            "我是{name}，由{maker}开发的助手。",
            "{name}",
        ),
    },
    "maker": {
        "en": (
            (
                "Who made you?",
                "Who created you?",
                "Who are your developers?",
                "Where do you come from?",
                "Who trained you?",
            ),
            "I was made by {maker}.",
            "{maker}",
        ),
        "zh": (
            ("是谁开发了你？", "谁创造了你？", "你的开发者是谁？", "你来自哪里？", "谁训练了你？"),
            "我是由{maker}开发的。",
            "{maker}",
        ),
    },
    "others": {
        "en": (
            (
                "Are you ChatGPT?",
                "Are you MiniMind?",
                "Are you Qwen?",
                "Are you DeepSeek?",
                "Are you some other assistant?",
            ),
            "No, I am {name}, and I come from {maker}.",
            "{name}",
        ),
        "zh": (
            (
                "你是ChatGPT吗？",
                "你是MiniMind吗？",
                "你是Qwen吗？",
                "你是DeepSeek吗？",
                "你是别的助手吗？",
            ),
            "不是，我是{name}，来自{maker}。",
            "{name}",
        ),
    },
    "human": {
        "en": (
            (
                "Are you a human?",
                "Are you a real person?",
                "Am I talking to a person?",
                "Do you have a body?",
                "Are you a machine?",
            ),
            "I am {name}, a computer program without a body.",
            "computer program",
        ),
        "zh": (
            ("你是人类吗？", "你是真人吗？", "我在和真人说话吗？", "你有身体吗？", "你是机器吗？"),
            "我是{name}，一个没有身体的计算机程序。",
            "计算机程序",
        ),
    },
    "skills": {
        "en": (
            (
                "What can you do?",
                "What can you help me with?",
                "What are you good at?",
                "How can you help me?",
                "What are you there for?",
            ),
            "{name} can answer questions and help with texts.",
            "help with texts",
        ),
        "zh": (
            ("你能做什么？", "你能帮我什么？", "你擅长什么？", "你有什么用？", "你会些什么？"),
            "{name}可以回答问题，也可以帮忙写文章。",
            "写文章",
        ),
    },
}

FORMS = {  # ways to ask about {x}, by kind of topic and language
    "complaint": {
        "en": (
            "What can I do about {x}?",
            "I have {x}. What helps?",
            "How do I deal with {x}?",
            "What should I do when I have {x}?",
            "Can you give me advice for {x}?",
            "What helps against {x} at home?",
            "When should I see a doctor about {x}?",
            "Please tell me how to treat {x}.",
        ),
        "zh": (
            "遇到{x}怎么办？",
            "{x}该怎么处理？",
            "{x}有什么办法缓解？",
            "{x}的时候应该做什么？",
            "怎样在家应对{x}？",
            "关于{x}，有什么建议？",
            "{x}什么时候要看医生？",
            "请告诉我{x}怎么办。",
        ),
    },
    "habit": {
        "en": (
            "What should I know about {x}?",
            "Do you have advice on {x}?",
            "What is a good habit for {x}?",
            "How do I get {x} right?",
            "What do you recommend for {x}?",
            "Please give me a tip about {x}.",
        ),
        "zh": (
            "关于{x}要注意什么？",
            "{x}有什么建议？",
            "{x}有什么好习惯？",
            "{x}怎么做才对？",
            "{x}你推荐怎么做？",
            "请给我一个关于{x}的提示。",
        ),
    },
}


def row(skill: str, language: str, topic: str, question: str, answer: str, keyword: str) -> dict:
    """A conversation of one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "conversations": messages,
        "skill": skill,
        "language": language,
        "topic": topic,
        "keyword": keyword,
    }


def identity_rows(name: str, maker: str) -> Iterator[tuple[bool, dict]]:
    """(held out, row) of openings with questions; a hash of the phrasing decides, not the names."""
    for topic, languages in IDENTITY.items():
        for language, (questions, *texts) in languages.items():
            answer, keyword = (text.format(name=name, maker=maker) for text in texts)
            for core, opening in product(questions, OPENINGS[language]):
                question = opening + core
                one = row("identity", language, topic, question, answer, keyword)
                yield is_heldout(f"lora identity:{question}"), one


def medical_rows() -> Iterator[tuple[bool, dict]]:
    """(held out, row) of every topic and form; one form of each topic and language is held out."""
    for _, topic in read_rows(TOPICS):
        for side, language in enumerate(LANGUAGES):
            forms = FORMS[topic["kind"]][language]
            name, answer, keyword = (topic[key][side] for key in ("name", "answer", "keyword"))
            heldout = hashlib.sha256(name.encode()).digest()[0] % len(forms)
            for form, text in enumerate(forms):
                question = text.format(x=name)
                one = row("medical", language, topic["name"][0], question, answer, keyword)
                yield form == heldout, one


def write_examples(folder: str | Path, name: str, maker: str) -> dict[str, int]:
    """Write the four files into `folder`, in place of earlier ones; return how many rows."""
    counts = {}
    examples = {"identity": identity_rows(name, maker), "medical": medical_rows()}
    for example, rows in examples.items():
        rows = list(rows)
        random.Random(0).shuffle(rows)
        for split in ("train", "heldout"):
            chosen = [one for heldout, one in rows if heldout == (split == "heldout")]
            with whole_file(Path(folder) / f"{example}_{split}.jsonl") as file:
                file.writelines(map(dump_row, chosen))
            counts[f"{example}_{split}.jsonl"] = len(chosen)
    return counts


def keyword_questions(path: str | Path) -> list[Question]:
    """The questions of a file of conversations, for the toy world's scorer: a completion is right
    if it holds the row's `keyword`.

    ValueError, with the file, if a row has none.
    """
    questions = []
    for file, fraction in find_shards(path):
        for line, one in read_rows(file):
            if not in_fraction(line, fraction):
                continue
            if not one.get("keyword") or not one.get("conversations"):
                raise ValueError(
                    f'{file}:{line}: no "conversations" with a "keyword". Give rows as '
                    "dataset/lora_examples.py writes them."
                )
            skill = one.get("skill") or Path(file).name.partition(".")[0]
            questions.append(
                Question(skill, one.get("language", ""), one["conversations"][:-1], one["keyword"])
            )
    return questions


def main(argv: list[str] | None = None) -> None:
    """The command line: --out_dir, --name, --maker, --json."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out_dir",
        default=ROOT / "dataset" / "lora_examples",
        help="default: dataset/lora_examples",
    )
    parser.add_argument("--name", default="Nova", help="of the assistant (default: Nova)")
    parser.add_argument("--maker", default="Harbor Lab", help="who made it (default: Harbor Lab)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers of rows to FILE")
    args = parser.parse_args(argv)
    counts = write_examples(args.out_dir, args.name, args.maker)
    for name, count in counts.items():
        print(f"{Path(args.out_dir) / name}: {count} rows")
    if args.json:
        write_json(args.json, counts)


if __name__ == "__main__":
    forgive_text()
    main()
