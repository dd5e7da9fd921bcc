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
    reply needs one. `reasoning`: the worked solution for `reasoning_content` (default: the last
    reply). `short`: the reply after that reasoning (default: the last reply). `prose`: the same
    knowledge as running text (default: the turns). `wrong`: a reply that is plausible but false.
    """

    skill: str
    language: str
    keys: tuple[str, ...]
    turns: tuple[Turn, ...]
    answer: str
    chance: float = 0.0
    choices: tuple[str, ...] = ()
    manners: tuple[str, ...] = ()
    reasoning: str | None = None
    short: str | None = None
    prose: str | None = None
    wrong: str = ""
    tools: tuple[str, ...] = ()

    def __post_init__(self):
        reply = self.turns[-1].reply
        told = " ".join(f"{turn.question} {turn.reply}" for turn in self.turns)
        for name, default in {"reasoning": reply, "short": reply, "prose": told}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the class is frozen


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


SFT_ROWS = {  # skill -> rows at level mini, at level full
    "arithmetic": (1600, 12_000),
    "comparison": (600, 4000),
    "sorting": (900, 5000),
    "counting": (500, 4000),
    "dates": (700, 4000),
    "units": (400, 3000),
    "word_problems": (900, 10_000),
    "facts": (700, 12_000),
    "facts_read": (0, 4000),
    "identity": (400, 1500),
    "multi_turn": (600, 4000),
    "tools": (500, 5000),
    "preferences": (400, 3000),
    "lookup": (800, 4000),
}

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
    sft_rows={skill: mini for skill, (mini, _) in SFT_ROWS.items() if mini},
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
    tools=(*MINI.tools, "get_price", "days_between", "count_letter"),
    offered_tools=3,
    pretrain_rows=120_000,
    sft_rows={skill: full for skill, (_, full) in SFT_ROWS.items()},
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

Pairs = tuple[tuple[str, str], ...]
Maker = Callable[[random.Random, str], Item]


def pairs(english: str, chinese: str) -> Pairs:
    """Words in both languages: "cat dog", "猫 狗" are (("cat", "猫"), ("dog", "狗"))."""
    return tuple(zip(english.split(), chinese.split(), strict=True))


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


def op_key(a: int, op: str, b: int) -> tuple[str, ...]:
    """Key of `a op b` for op in + - ×, of either order but for -; none for what is known by heart.

    That is round tens, sums of two one-digit numbers and the differences that undo them, and
    products with a factor 0, 1 or 5.
    """
    is_known = a % 10 == 0 or b % 10 == 0
    if op == "×":
        is_known |= a in (1, 5) or b in (1, 5)
    else:
        is_known |= b < 10 and (a if op == "+" else a - b) < 10
    if is_known:
        return ()
    low, high = sorted((a, b))
    keys = {"+": f"add:{low},{high}", "-": f"sub:{a}-{b}", "×": f"mul:{low},{high}"}
    return (keys[op],)


def apply(a: int, op: str, b: int) -> int:
    """The value of `a op b` for op in + - ×."""
    return {"+": a + b, "-": a - b, "×": a * b}[op]
