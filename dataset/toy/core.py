"""What all parts of the toy world share: items, levels and the split between training and held-out.

The split is a stable hash of canonical keys, not of rows. An item lists the keys of everything in
it that could be held out ("add:17,25" for an unordered pair of summands, "day:2+3" for Wednesday
plus three days, ...), its own key first. It may be trained on only if none of its keys is held out,
and it is a held-out question only if its own key is and the rest is not. Because the hash knows
neither seed nor file, no file of any seed, pretraining text included, contains a key that another
one asks as a held-out question.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

LANGUAGES = ("zh", "en")
HELDOUT_RATIO = 0.15


@dataclass(frozen=True)
class Call:
    """One tool call that an item expects: the tool's name and its arguments."""

    name: str
    arguments: dict


@dataclass(frozen=True)
class Turn:
    """One question and the reply to it; `calls` are the tool calls made in between."""

    question: str
    reply: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Item:
    """One exercise with all that the stages need.

    `keys`: canonical keys, the item's own first; none at all means that it is always training
    material. `turns`: the conversation; the last reply holds the final answer. `answer`: the
    scorer's value. `choices`: the values that `answer` competes with. `manners`: phrases of which a
    reply needs one. `reasoning`: the worked solution for `reasoning_content`. `short`: the reply
    after that reasoning. `prose`: the same knowledge as running text. `wrong`: a reply that is
    plausible but false.
    """

    skill: str
    language: str
    keys: tuple[str, ...]
    turns: tuple[Turn, ...]
    answer: str
    chance: float = 0.0
    choices: tuple[str, ...] = ()
    manners: tuple[str, ...] = ()
    reasoning: str = ""
    short: str = ""
    prose: str = ""
    wrong: str = ""
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """Sizes and ranges of one level. Counts are rows per file, before held-out ones are removed."""

    name: str
    max_sum: int  # sums and differences stay at or below it
    max_factor: int  # products go up to max_factor x max_factor; 0 for none
    worked: bool  # SFT replies show the steps (else only reason_* rows do)
    sort_sizes: tuple[int, ...]
    sort_max: int
    count_sizes: tuple[int, int]
    max_days: int
    num_entities: int
    num_attributes: int
    story_steps: tuple[int, ...]
    lookup_lines: tuple[int, ...]
    tools: tuple[str, ...]
    offered_tools: int  # tools that a prompt offers at most
    pretrain_rows: int
    sft_rows: dict[str, int]  # per skill, both languages together
    extra_rows: dict[str, int]  # per stage: lora, tools, reason, dpo, rl, agent


MINI = Level(
    name="mini",
    max_sum=50,
    max_factor=0,
    worked=True,
    sort_sizes=(3,),
    sort_max=30,
    count_sizes=(2, 7),
    max_days=6,
    num_entities=16,
    num_attributes=3,
    story_steps=(2,),
    lookup_lines=(3, 4, 5),
    tools=("calculator", "get_time", "get_weather", "convert_unit"),
    offered_tools=1,
    pretrain_rows=9000,
    sft_rows={
        "arithmetic": 1600,
        "comparison": 600,
        "sorting": 900,
        "counting": 500,
        "dates": 700,
        "units": 400,
        "word_problems": 900,
        "facts": 700,
        "identity": 400,
        "multi_turn": 600,
        "tools": 500,
        "preferences": 400,
        "lookup": 800,
    },
    extra_rows={"lora": 400, "tools": 2000, "reason": 1000, "dpo": 800, "rl": 1000, "agent": 300},
)

FULL = Level(
    name="full",
    max_sum=999,
    max_factor=12,
    worked=False,
    sort_sizes=(3, 4, 5),
    sort_max=199,
    count_sizes=(4, 14),
    max_days=60,
    num_entities=240,
    num_attributes=5,
    story_steps=(2, 3, 4, 5),
    lookup_lines=(6, 6, 8, 8, 12, 12, 24, 24, 60, 160),
    tools=(
        "calculator",
        "get_time",
        "get_weather",
        "convert_unit",
        "get_price",
        "days_between",
        "count_letter",
    ),
    offered_tools=3,
    pretrain_rows=120_000,
    sft_rows={
        "arithmetic": 12_000,
        "comparison": 4000,
        "sorting": 5000,
        "counting": 4000,
        "dates": 4000,
        "units": 3000,
        "word_problems": 10_000,
        "facts": 12_000,
        "facts_read": 4000,
        "identity": 1500,
        "multi_turn": 4000,
        "tools": 5000,
        "preferences": 3000,
        "lookup": 4000,
    },
    extra_rows={
        "lora": 400,
        "tools": 12_000,
        "reason": 12_000,
        "dpo": 8000,
        "rl": 8000,
        "agent": 3000,
    },
)

LEVELS = {"mini": MINI, "full": FULL}

Maker = Callable[[random.Random, str], Item]


@lru_cache(maxsize=1 << 16)
def is_heldout(key: str, ratio: float = HELDOUT_RATIO) -> bool:
    """Whether a key is among the fixed `ratio` that training never sees; the key alone decides."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return number < ratio * 2**64


def split_of(item: Item) -> str:
    """ "train", "heldout", or "neither" for an item that mixes the two and is used by no file."""
    held = [is_heldout(key) for key in item.keys]
    if not any(held):
        return "train"
    return "heldout" if held[0] and not any(held[1:]) else "neither"


def draw_items(
    maker: Maker, rng: random.Random, language: str, split: str, count: int
) -> Iterator[Item]:
    """Yield up to `count` different items of one split; fewer where the skill has no more."""
    seen, misses = set(), 0
    while len(seen) < count and misses < 400:
        misses += 1
        item = maker(rng, language)
        questions = tuple(turn.question for turn in item.turns)
        if questions not in seen and split_of(item) == split:
            seen.add(questions)
            misses = 0
            yield item


def add_key(a: int, b: int) -> tuple[str, ...]:
    """Key of an unordered pair of summands; none for sums known by heart (see `sub_key`)."""
    if (a < 10 and b < 10) or a % 10 == 0 or b % 10 == 0:
        return ()
    return (f"add:{min(a, b)},{max(a, b)}",)


def sub_key(a: int, b: int) -> tuple[str, ...]:
    """Key of a - b; none for round tens and for the differences that undo a sum of two one-digit
    numbers.
    """
    if (b < 10 and a - b < 10) or a % 10 == 0 or b % 10 == 0:
        return ()
    return (f"sub:{a}-{b}",)


def mul_key(a: int, b: int) -> tuple[str, ...]:
    """Key of an unordered pair of factors; none with a factor 0, 1, 5 or a multiple of ten."""
    if any(n in (0, 1, 5) or n % 10 == 0 for n in (a, b)):
        return ()
    return (f"mul:{min(a, b)},{max(a, b)}",)


def op_key(a: int, op: str, b: int) -> tuple[str, ...]:
    """The key of `a op b` for op in + - ×."""
    return {"+": add_key, "-": sub_key, "×": mul_key}[op](a, b)


def apply(a: int, op: str, b: int) -> int:
    """The value of `a op b` for op in + - ×."""
    return {"+": a + b, "-": a - b, "×": a * b}[op]
