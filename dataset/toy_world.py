"""Writes, from a seed, a small bilingual world whose every question has a checkable answer.

    python dataset/toy_world.py --level mini --out_dir dataset/toy_mini --seed 0
    python dataset/toy_world.py --level full --out_dir dataset/toy_full --seed 0

Each stage gets `<stage>_train.jsonl` and `<stage>_heldout.jsonl`: pretrain, sft, lora, tools (conversations that call
tools, with more different arguments than sft has), reason, dpo, rl, agent (formats: dataset.md). `meta.json` names
level, seed, a hash of these sources and the rows of every file.

What "held out" means: a stable hash of a canonical key decides, 15% of all keys, for every seed alike (see
toy_core.py). No training file, the pretraining text included, contains a held-out pair of operands, list to
sort or count, (weekday, number of days), (number, unit), story, looked-up pair, city, item or date span.
Three exceptions are by intention and must be known when figures are read:
- sums and differences of one-digit numbers, round tens and products with 1, 5, 10 are what longer sums are
  made of; they are always training material and never asked as held-out arithmetic;
- a held-out *fact* is a phrasing: the question template is new for this (entity, attribute, language), but
  the fact stands in the training text, since it could not be known otherwise. The same holds for LoRA's facts
  and for polite requests (`preferences`), which ask known facts in new combinations of request and phrasing;
- a held-out *identity* question is an unseen phrasing whose answer training gives to other phrasings.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import toy_identity, toy_numbers, toy_stories
from dataset.toy_core import LANGUAGES, LEVELS, Item, Level, Maker, draw_items
from dataset.toy_facts import People, fact, fact_read, make_people, portrait
from dataset.toy_scorer import Question, accuracy_table, ask, format_table, score
from dataset.toy_tools import run_tool, tool_schemas, tool_use, two_cities

__all__ = [
    "Question", "World", "accuracy_table", "ask", "format_table", "heldout_questions", "make_world", "run_tool", "score",
]  # fmt: skip

# What decides a world besides its level and seed: after any change of the generators old folders are written again.
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("toy_*.py")))).hexdigest()[:12]
SPLITS = ("train", "heldout")
STAGES = ("pretrain", "sft", "lora", "tools", "reason", "dpo", "rl", "agent")
CHAT_SHARE = 0.2  # of the conversations that are joined into longer ones
REASON_SKILLS = ("arithmetic", "comparison", "sorting", "counting", "dates", "word_problems")
RL_SKILLS = ("arithmetic", "comparison", "sorting", "counting", "dates", "units", "word_problems", "lookup")
DPO_SKILLS = ("preferences", "preferences", "arithmetic", "dates", "facts", "word_problems")


@dataclass(frozen=True)
class World:
    """A level, a seed, the people who live in it, and the maker of every skill's items."""

    level: Level
    seed: int
    people: People
    makers: dict[str, Maker]

    def items(self, purpose: str, skill: str, split: str, count: int) -> Iterator[Item]:
        """Up to `count` items of a skill, both languages in turn; the same for the same purpose and seed."""
        streams = []
        for language, share in zip(LANGUAGES, ((count + 1) // 2, count // 2)):
            rng = random.Random(f"{self.seed}/{purpose}/{skill}/{split}/{language}")
            streams.append(draw_items(self.makers[skill], rng, language, split, share))
        while streams:
            for stream in list(streams):
                item = next(stream, None)
                if item is None:
                    streams.remove(stream)
                else:
                    yield item


def make_world(level: str, seed: int = 0) -> World:
    """The world of a level ("mini" or "full") and a seed; nothing is written."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}. Choose one of: {', '.join(LEVELS)}")
    shape = LEVELS[level]
    people = make_people(random.Random(f"{seed}/people"), shape.num_entities, shape.num_attributes)
    makers = {
        name: partial(getattr(toy_numbers, name), level=shape)
        for name in ("arithmetic", "comparison", "sorting", "counting", "dates", "units")
    }
    makers |= {
        "word_problems": partial(toy_stories.word_problem, level=shape),
        "facts": partial(fact, people=people),
        "facts_read": fact_read,
        "identity": toy_identity.identity,
        "multi_turn": partial(toy_stories.multi_turn, level=shape, people=people),
        "tools": partial(tool_use, level=shape),
        "two_cities": partial(two_cities, level=shape),
        "preferences": partial(toy_stories.preference, people=people),
        "lookup": partial(toy_stories.lookup, level=shape),
        "lora_identity": toy_identity.garden_identity,
        "lora_facts": toy_identity.garden_fact,
    }
    return World(shape, seed, people, makers)


def system_message(item: Item) -> list[dict]:
    """The system message that offers an item's tools, if it has any."""
    if not item.tools:
        return []
    return [{"role": "system", "content": "", "tools": json.dumps(tool_schemas(item.tools), ensure_ascii=False)}]


def turn_messages(item: Item) -> list[dict]:
    """The whole conversation of an item, tool calls and results included."""
    messages = system_message(item)
    for turn in item.turns:
        messages.append({"role": "user", "content": turn.question})
        if turn.calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            tool_calls = json.dumps(calls, ensure_ascii=False)
            messages.append({"role": "assistant", "content": "", "tool_calls": tool_calls})
            messages += [{"role": "tool", "content": run_tool(call.name, call.arguments)} for call in turn.calls]
        messages.append({"role": "assistant", "content": turn.reply})
    return messages


def sft_row(item: Item, rng: random.Random) -> dict:
    """One conversation; half of the polite replies become curt ones, so that DPO has something to change."""
    messages = turn_messages(item)
    if item.skill == "preferences" and rng.random() < 0.5:
        messages[-1]["content"] = item.short
    return {"conversations": messages, "skill": item.skill, "language": item.language}


def reason_row(item: Item, rng: random.Random) -> dict:
    """The worked solution as `reasoning_content`, the final answer alone as content."""
    messages = turn_messages(item)
    messages[-1] = {"role": "assistant", "content": item.short, "reasoning_content": item.thought}
    return {"conversations": messages, "skill": item.skill, "language": item.language}


def dpo_row(item: Item, rng: random.Random) -> dict:
    """Right and polite against curt or wrong for polite requests, right against wrong elsewhere."""
    prompt = turn_messages(item)[:-1]
    curt = item.manners and rng.random() < 0.5
    rejected = item.short if curt else item.wrong
    pair = {"chosen": item.turns[-1].reply, "rejected": rejected}
    row = {side: [*prompt, {"role": "assistant", "content": text}] for side, text in pair.items()}
    return row | {"skill": item.skill, "language": item.language}


def rl_row(item: Item, rng: random.Random) -> dict:
    """The prompt and what the verifier checks; `choices` and `chance` let `question_of_row` rebuild the question."""
    messages = turn_messages(item)[:-1]
    return {
        "conversations": messages, "answer": item.answer, "choices": list(item.choices), "chance": item.chance,
        "skill": item.skill, "language": item.language,
    }  # fmt: skip


def agent_row(item: Item, rng: random.Random) -> dict:
    """Tools and a question; `gt` lists the values that the final answer must contain, `calls` the calls it needs."""
    messages = [*system_message(item), {"role": "user", "content": item.turns[0].question}]
    calls = [{"name": call.name, "arguments": call.arguments} for call in item.turns[0].calls]
    return {
        "conversations": messages, "gt": item.answer.split(", "), "answer": item.answer, "calls": calls,
        "skill": item.skill, "language": item.language,
    }  # fmt: skip


def question_of_row(row: dict) -> Question:
    """The question of a row of rl_*.jsonl or agent_*.jsonl, ready for `score` and `ask`."""
    messages = [{key: value for key, value in message.items() if key != "tools"} for message in row["conversations"]]
    tools = row["conversations"][0].get("tools")
    return Question(
        row.get("skill", ""), row.get("language", ""), messages, row["answer"], row.get("chance", 0.0),
        tuple(row.get("choices") or ()), tools=json.loads(tools) if isinstance(tools, str) else tools or None,
        calls=tuple((call["name"], call["arguments"]) for call in row.get("calls") or ()),
    )  # fmt: skip


def question_of_item(item: Item) -> Question:
    """The question that an item asks."""
    messages = [{"role": "system", "content": ""}] if item.tools else []
    messages.append({"role": "user", "content": item.turns[0].question})
    return Question(
        item.skill, item.language, messages, item.answer, item.chance, item.choices, item.manners,
        tools=tool_schemas(item.tools) if item.tools else None,
        calls=tuple((call.name, call.arguments) for turn in item.turns for call in turn.calls),
        follow_ups=tuple(turn.question for turn in item.turns[1:]), key=item.keys[0] if item.keys else "",
    )  # fmt: skip


def heldout_questions(world: World, limit_per_skill: int = 40, part: str = "sft") -> list[Question]:
    """Up to `limit_per_skill` held-out questions per skill, half in each language; part "sft" or "lora".

    They are the first rows of sft_heldout.jsonl (lora_heldout.jsonl), whatever the limit.
    """
    skills = world.level.sft_rows if part == "sft" else ("lora_identity", "lora_facts")
    return [question_of_item(item) for skill in skills for item in world.items(part, skill, "heldout", limit_per_skill)]


def pretrain_rows(world: World, split: str, count: int) -> Iterator[dict]:
    """Running text: portraits of the people, lists to copy, views of a garden, and the exercises of all skills told as prose."""
    rng = random.Random(f"{world.seed}/pretrain/{split}")
    for n in range(count // 5):
        yield {"text": portrait(rng, LANGUAGES[n % 2], world.people)}
    for n in range(count // 10):
        yield {"text": toy_stories.echo(rng, LANGUAGES[n % 2])}
    for n in range(count // 45):
        yield {"text": toy_identity.garden_view(rng, LANGUAGES[n % 2])}
    weights = {skill: n for skill, n in world.level.sft_rows.items() if skill != "preferences"}
    for skill, weight in weights.items():
        share = count * 7 // 10 * weight // sum(weights.values())
        for item in world.items("pretrain", skill, split, share):
            yield {"text": item.prose}


def stage_rows(world: World, stage: str, split: str) -> Iterator[dict]:
    """All rows of one file, in the order of their skills."""
    level = world.level
    size = {"train": 1.0, "heldout": 0.1}[split]
    if stage == "pretrain":
        yield from pretrain_rows(world, split, int(level.pretrain_rows * size))
        return
    make_row = {"reason": reason_row, "dpo": dpo_row, "rl": rl_row, "agent": agent_row}.get(stage, sft_row)
    skills = {
        "sft": tuple(level.sft_rows), "lora": ("lora_identity", "lora_facts"), "reason": REASON_SKILLS,
        "dpo": DPO_SKILLS, "rl": RL_SKILLS, "agent": ("tools",), "tools": ("tools",),
    }[stage]  # fmt: skip
    rng = random.Random(f"{world.seed}/{stage}/{split}/rows")
    waiting = []
    for skill in dict.fromkeys(skills):
        rows = level.sft_rows[skill] if stage == "sft" else level.extra_rows[stage] * skills.count(skill) // len(skills)
        for item in world.items(stage, skill, split, int(rows * size)):
            row = make_row(item, rng)
            if (stage, split) == ("sft", "train") and not item.tools and rng.random() < CHAT_SHARE:
                waiting.append(row)
            else:
                yield row
    yield from chats(waiting, rng)


def chats(rows: list[dict], rng: random.Random) -> Iterator[dict]:
    """Two to four unrelated conversations after one another: in a chat the next question may be about anything."""
    rng.shuffle(rows)
    while rows:
        parts = [rows.pop() for _ in range(min(rng.randint(2, 4), len(rows)))]
        messages = [message for part in parts for message in part["conversations"]]
        yield {"conversations": messages, "skill": "chat", "language": parts[0]["language"]}


def write_files(world: World, folder: Path) -> dict[str, dict]:
    """Writes every file of a world, rows shuffled, and returns {file name: rows and bytes}."""
    files = {}
    for stage in STAGES:
        for split in SPLITS:
            rows = list(stage_rows(world, stage, split))
            random.Random(f"{world.seed}/{stage}/{split}/order").shuffle(rows)
            path = folder / f"{stage}_{split}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_bytes(text.encode())
            files[path.name] = {"rows": len(rows), "bytes": path.stat().st_size}
    return files


def is_complete(folder: Path, level: str, seed: int) -> bool:
    """True if the folder already holds this level and seed; ValueError if it holds something that is not ours."""
    meta_path = folder / "meta.json"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not meta_path.is_file():
        raise ValueError(f"{folder} is not empty and was not written by this script. Choose another --out_dir.")
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    wanted = {"level": level, "seed": seed, "sources": SOURCES}
    if any(meta.get(key) != value for key, value in wanted.items()):
        return False
    paths = {folder / name: entry["bytes"] for name, entry in meta["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def write_world(level: str, out_dir: str | Path, seed: int = 0) -> bool:
    """Writes a world into `out_dir`, all or nothing; False (and no change) if it is there already.

    A folder of this script with another level, seed or generator is replaced; any other non-empty folder is a ValueError.
    """
    folder = Path(out_dir).resolve()
    if is_complete(folder, level, seed):
        return False
    world = make_world(level, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        meta = {"level": level, "seed": seed, "sources": SOURCES, "files": write_files(world, draft)}
        (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> None:
    """The command line: --level, --out_dir, --seed, --json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--level", choices=LEVELS, default="mini")
    parser.add_argument("--out_dir", help="default: dataset/toy_<level> of the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the printed figures to FILE")
    args = parser.parse_args(argv)
    folder = Path(args.out_dir) if args.out_dir else ROOT / "dataset" / f"toy_{args.level}"
    written = write_world(args.level, folder, args.seed)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    print(f"{folder}: " + ("written" if written else f"level {args.level}, seed {args.seed} is there already, nothing to do"))
    for name, entry in meta["files"].items():
        print(f"{name:<24} {entry['rows']:>8} rows {entry['bytes'] / 1e6:>8.2f} MB")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
