"""A toy world: its people, and the makers of the items of every skill."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dataset.toy import facts, identity, measures, numbers, stories, tools
from dataset.toy.core import LANGUAGES, LEVELS, Item, Level, Maker, draw_items


@dataclass(frozen=True)
class World:
    """A level, a seed, the people who live in it, and the maker of every skill's items."""

    level: Level
    seed: int
    people: facts.People
    makers: dict[str, Maker]

    def items(self, purpose: str, skill: str, split: str, count: int) -> Iterator[Item]:
        """Up to `count` items of a skill, both languages in turn, by purpose and seed alone."""
        streams = []
        for language, half in zip(LANGUAGES, ((count + 1) // 2, count // 2)):
            rng = random.Random(f"{self.seed}/{purpose}/{skill}/{split}/{language}")
            streams.append(draw_items(self.makers[skill], rng, language, split, half))
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
    people = facts.make_people(
        random.Random(f"{seed}/people"), shape.num_entities, shape.num_attributes
    )
    with_level = {
        "arithmetic": numbers.arithmetic,
        "comparison": numbers.comparison,
        "sorting": numbers.sorting,
        "counting": numbers.counting,
        "dates": measures.dates,
        "units": measures.units,
        "word_problems": stories.word_problem,
        "tools": tools.tool_use,
        "two_cities": tools.two_cities,
        "lookup": stories.lookup,
        "multi_turn": partial(stories.multi_turn, people=people),
    }
    makers = {name: partial(maker, level=shape) for name, maker in with_level.items()} | {
        "facts": partial(facts.fact, people=people),
        "facts_read": facts.fact_read,
        "identity": identity.identity,
        "preferences": partial(stories.preference, people=people),
        "lora_identity": identity.garden_identity,
        "lora_facts": identity.garden_fact,
    }
    return World(shape, seed, people, makers)
