"""Items of the toy world -> rows of every stage's files (formats: dataset.md) and questions."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict

from dataset.toy.core import LANGUAGES, Item
from dataset.toy.facts import portrait
from dataset.toy.identity import garden_view
from dataset.toy.scorer import Question
from dataset.toy.stories import echo
from dataset.toy.tools import run_tool, tool_schemas
from dataset.toy.world import World

CHAT_RATIO = 0.2  # of the conversations that are joined into longer ones
REASON_SKILLS = ("arithmetic", "comparison", "sorting", "counting", "dates", "word_problems")
RL_SKILLS = (
    "arithmetic",
    "comparison",
    "sorting",
    "counting",
    "dates",
    "units",
    "word_problems",
    "lookup",
)
LORA_SKILLS = ("lora_identity", "lora_facts")
DPO_SKILLS = ("preferences", "preferences", "arithmetic", "dates", "facts", "word_problems")


def system_message(item: Item) -> list[dict]:
    """The system message that offers an item's tools, if it has any."""
    if not item.tools:
        return []
    tools = json.dumps(tool_schemas(item.tools), ensure_ascii=False)
    return [{"role": "system", "content": "", "tools": tools}]


def turn_messages(item: Item) -> list[dict]:
    """The whole conversation of an item, tool calls and results included."""
    messages = system_message(item)
    for turn in item.turns:
        messages.append({"role": "user", "content": turn.question})
        if turn.calls:
            tool_calls = json.dumps([*map(asdict, turn.calls)], ensure_ascii=False)
            messages.append({"role": "assistant", "content": "", "tool_calls": tool_calls})
            messages += [
                {"role": "tool", "content": run_tool(call.name, call.arguments)}
                for call in turn.calls
            ]
        messages.append({"role": "assistant", "content": turn.reply})
    return messages


def sft_row(item: Item, rng: random.Random) -> dict:
    """One conversation; half of the polite replies become curt, which DPO can then change."""
    messages = turn_messages(item)
    if item.skill == "preferences" and rng.random() < 0.5:
        messages[-1]["content"] = item.short
    return {"conversations": messages, "skill": item.skill, "language": item.language}


def reason_row(item: Item, rng: random.Random) -> dict:
    """The worked solution as `reasoning_content`, the final answer alone as content."""
    messages = turn_messages(item)
    messages[-1] = {"role": "assistant", "content": item.short, "reasoning_content": item.reasoning}
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
    """The prompt and the verifier's values: all that `question_of_row` needs."""
    return {
        "conversations": turn_messages(item)[:-1],
        "answer": item.answer,
        "choices": list(item.choices),
        "chance": item.chance,
        "skill": item.skill,
        "language": item.language,
    }


def agent_row(item: Item, rng: random.Random) -> dict:
    """Tools and a question; `gt`: values that the final answer must hold, `calls`: calls needed."""
    messages = [*system_message(item), {"role": "user", "content": item.turns[0].question}]
    return {
        "conversations": messages,
        "gt": item.answer.split(", "),
        "answer": item.answer,
        "calls": [*map(asdict, item.turns[0].calls)],
        "skill": item.skill,
        "language": item.language,
    }


def question_of_row(row: dict) -> Question:
    """The question of a row of rl_*.jsonl or agent_*.jsonl, ready for `score` and `ask`."""
    messages = [
        {key: value for key, value in message.items() if key != "tools"}
        for message in row["conversations"]
    ]
    tools = row["conversations"][0].get("tools")
    return Question(
        row.get("skill", ""),
        row.get("language", ""),
        messages,
        row["answer"],
        row.get("chance", 0.0),
        tuple(row.get("choices") or ()),
        tools=json.loads(tools) if isinstance(tools, str) else tools or None,
        calls=tuple((call["name"], call["arguments"]) for call in row.get("calls") or ()),
    )


def question_of_item(item: Item) -> Question:
    """The question that an item asks."""
    messages = [{"role": "system", "content": ""}] if item.tools else []
    messages.append({"role": "user", "content": item.turns[0].question})
    return Question(
        item.skill,
        item.language,
        messages,
        item.answer,
        item.chance,
        item.choices,
        item.manners,
        tools=tool_schemas(item.tools) if item.tools else None,
        calls=tuple((call.name, call.arguments) for turn in item.turns for call in turn.calls),
        follow_ups=tuple(turn.question for turn in item.turns[1:]),
        key=item.keys[0] if item.keys else "",
    )


def heldout_questions(world: World, limit_per_skill: int = 40, part: str = "sft") -> list[Question]:
    """Up to `limit_per_skill` held-out questions per skill, half in each language; part "sft" or
    "lora".

    They are the first rows of sft_heldout.jsonl (lora_heldout.jsonl), whatever the limit.
    """
    skills = world.level.sft_rows if part == "sft" else LORA_SKILLS
    return [
        question_of_item(item)
        for skill in skills
        for item in world.items(part, skill, "heldout", limit_per_skill)
    ]


def pretrain_rows(world: World, split: str, count: int) -> Iterator[dict]:
    """Running text: portraits of people, lists to copy, views of a garden, exercises as prose."""
    rng = random.Random(f"{world.seed}/pretrain/{split}")
    for n in range(count // 5):
        yield {"text": portrait(rng, LANGUAGES[n % 2], world.people)}
    for n in range(count // 10):
        yield {"text": echo(rng, LANGUAGES[n % 2])}
    for n in range(count // 45):
        yield {"text": garden_view(rng, LANGUAGES[n % 2])}
    weights = {skill: n for skill, n in world.level.sft_rows.items() if skill != "preferences"}
    for skill, weight in weights.items():
        part = count * 7 // 10 * weight // sum(weights.values())
        for item in world.items("pretrain", skill, split, part):
            yield {"text": item.prose}


def stage_rows(world: World, stage: str, split: str) -> Iterator[dict]:
    """All rows of one file, in the order of their skills."""
    level = world.level
    size = {"train": 1.0, "heldout": 0.1}[split]
    if stage == "pretrain":
        yield from pretrain_rows(world, split, int(level.pretrain_rows * size))
        return
    make_row, skills = {
        "sft": (sft_row, tuple(level.sft_rows)),
        "lora": (sft_row, LORA_SKILLS),
        "tools": (sft_row, ("tools",)),
        "reason": (reason_row, REASON_SKILLS),
        "dpo": (dpo_row, DPO_SKILLS),
        "rl": (rl_row, RL_SKILLS),
        "agent": (agent_row, ("tools",)),
    }[stage]
    rng = random.Random(f"{world.seed}/{stage}/{split}/rows")
    waiting = []
    for skill in dict.fromkeys(skills):
        if stage == "sft":
            rows = level.sft_rows[skill]
        else:
            rows = level.extra_rows[stage] * skills.count(skill) // len(skills)
        for item in world.items(stage, skill, split, int(rows * size)):
            row = make_row(item, rng)
            if (stage, split) == ("sft", "train") and not item.tools and rng.random() < CHAT_RATIO:
                waiting.append(row)
            else:
                yield row
    yield from chats(waiting, rng)


def chats(rows: list[dict], rng: random.Random) -> Iterator[dict]:
    """Two to four unrelated conversations in one: a chat's next question may be about anything."""
    rng.shuffle(rows)
    while rows:
        parts = [rows.pop() for _ in range(min(rng.randint(2, 4), len(rows)))]
        messages = [message for part in parts for message in part["conversations"]]
        yield {"conversations": messages, "skill": "chat", "language": parts[0]["language"]}
