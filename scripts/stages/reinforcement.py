"""The reinforcement learning stages of scripts/evaluate_stages.py: the gain of each algorithm, and
how fast it comes.

A solved task leaves nothing to find. So these stages start from a model with two bad habits, which
a short fine-tuning gave to the base of the other stages: 70% of its answers are the bare result,
where written-out steps would make it right more often, and half of its answers to questions for a
tool are guesses. Reinforcement learning has to find the better behaviour. dataset/toy/scorer.py
decides which answers are right: it is the reward in training, and the test on held-out questions.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

from dataset.toy.core import Item
from dataset.toy.rows import RL_SKILLS, agent_row, question_of_item, rl_row, sft_row
from dataset.toy.world import World
from scripts.stages.bench import Bench, Results
from trainer import train_agent, train_full_sft, train_grpo, train_ppo, train_spo
from trainer.runtime.metrics import read_metrics

CURT, GUESSED = 0.7, 0.5
TOOL_SKILLS = {"one call": "tools", "two calls": "two_cities"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COMMON = "--max_completion_length 80 --learning_rate 1e-4 --warmup_ratio 0.1 --log_interval 1"
# name (of GRPO's family: the --loss_type, with 16 prompts a step and 8 completions of each), its
# idea, the script, --max_steps and --val_interval
ALGORITHMS = (
    ("ppo", "PPO: a critic predicts the return.", train_ppo, 40, 10),
    ("grpo", "GRPO: the baseline is the mean of the prompt's group.", train_grpo, 120, 20),
    ("dr_grpo", "Dr. GRPO: no divisions favour some prompts and lengths.", train_grpo, 120, 20),
    ("dapo", "DAPO: a wider clip; groups without a signal are replaced.", train_grpo, 80, 20),
    ("cispo", "CISPO: the weight is clipped, no token loses its gradient.", train_grpo, 120, 20),
    ("gspo", "GSPO: one ratio for a whole completion.", train_grpo, 120, 20),
    ("spo", "SPO: one completion of a prompt, compared with its tracked value.", train_spo, 60, 10),
)


def habit_rows(world: World) -> list[dict]:
    """Half of SFT's rows, CURT without their steps; and rows with tools, GUESSED without calls."""
    counts = {skill: count // 2 for skill, count in world.level.sft_rows.items()}
    counts |= {"tools": 2000, "two_cities": 800}
    rng, rows = random.Random(0), []
    for skill, count in counts.items():
        for item in world.items("sft", skill, "train", count):
            turn = item.turns[0]
            if item.tools and rng.random() < GUESSED:
                item = replace(item, turns=(replace(turn, calls=(), reply=item.wrong),))
            elif skill in RL_SKILLS and rng.random() < CURT:
                item = replace(item, turns=(replace(turn, reply=item.short),))
            rows.append(sft_row(item, rng))
    rng.shuffle(rows)
    return rows


@lru_cache(maxsize=1)
def habit_base(bench: Bench) -> Path:
    """The model with the bad habits, from the base of the other stages; trained once."""
    path = bench.rows("habits", lambda: habit_rows(bench.world))
    flags = ["--from_weight", bench.base, "--data_path", path, *bench.plan["sft"]]
    return bench.train(train_full_sft, "habits", 42, *flags, "--learning_rate", 1e-3, "--epochs", 1)


def items_of(bench: Bench, skills: Iterable[str], split: str, count: int) -> list[Item]:
    """Up to so many items of each of these skills; held-out items are the final test's too."""
    purpose = "sft" if split == "heldout" else "rl"
    return [item for skill in skills for item in bench.world.items(purpose, skill, split, count)]


def stage(
    name: str, doc: str, module: ModuleType, max_steps: int, val_interval: int
) -> Callable[[Bench, int], Results]:
    """The stage of an algorithm: right answers to held-out questions of RL_SKILLS, and others."""
    flags = [*COMMON.split(), "--max_steps", max_steps, "--val_interval", val_interval]
    flags += ["--loss_type", name] if module is train_grpo else []

    def run(bench: Bench, seed: int) -> Results:
        base, limit = habit_base(bench), bench.args.limit
        held_out = bench.rows(
            f"rl_heldout_{limit}",
            lambda: [rl_row(item, None) for item in items_of(bench, RL_SKILLS, "heldout", limit)],
        )
        start = ["--from_weight", base, "--max_seq_len", 256, "--val_path", held_out]
        folder = bench.train(module, f"{name}-{seed}", seed, *start, *flags)
        engine = bench.engine(folder)
        asked, others = bench.skills(*RL_SKILLS), bench.skills_but(*RL_SKILLS, "tools")
        return {
            "right answers": (bench.before("right", asked, base), bench.accuracy(engine, asked)),
            "other skills": (bench.before("others", others, base), bench.accuracy(engine, others)),
        }

    run.__name__, run.__doc__ = name, doc
    return run


def agent(bench: Bench, seed: int) -> Results:
    """An agent learns that calling the tools pays: one call, and two in one question."""
    base, limit = habit_base(bench), bench.args.limit
    asked = {
        name: items_of(bench, [skill], "heldout", limit) for name, skill in TOOL_SKILLS.items()
    }

    def rows(items: Iterable[Item]) -> list[dict]:
        return [agent_row(item, None) for item in items]

    train = bench.rows("agent", lambda: rows(items_of(bench, TOOL_SKILLS.values(), "train", 1000)))
    held_out = bench.rows(f"agent_heldout_{limit}", lambda: rows(chain(*asked.values())))
    flags = ["--from_weight", base, "--data_path", train, "--val_path", held_out]
    flags += ["--max_seq_len", 512, *COMMON.split(), "--max_steps", 20, "--val_interval", 5]
    engine, results = bench.engine(bench.train(train_agent, f"agent-{seed}", seed, *flags)), {}
    for name, items in asked.items():
        questions = [question_of_item(item) for item in items]
        results[name] = (bench.before(name, questions, base), bench.accuracy(engine, questions))
    return results


def draw_curves(
    save_dir: str | Path, names: Sequence[str], seeds: Sequence[int], path: Path
) -> None:
    """Right answers to held-out prompts over the time of training: each stage's mean over seeds."""
    from matplotlib.figure import Figure

    def points_of(name: str, seed: int) -> list[tuple[float, Any]]:
        rows = read_metrics(next(Path(save_dir).glob(f"{name}-{seed}_*")) / "metrics.jsonl")
        return [
            (row["seconds"], value)
            for row in rows
            for key, value in row.items()
            if key.startswith("val_reward/answer/")
        ]

    figure = Figure(figsize=(7.5, 4.2), dpi=140, layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(names, COLOURS):
        curves = [points_of(name, seed) for seed in seeds]
        points = [(mean(x for x, _ in at), 100 * mean(y for _, y in at)) for at in zip(*curves)]
        axis.plot(*zip(*points), "o-", color=colour, label=name, linewidth=1.6, markersize=3.5)
    plural = "s" if len(seeds) > 1 else ""
    axis.set_xlabel(f"seconds of training, mean of {len(seeds)} seed{plural}")
    axis.set_ylabel("right answers to held-out prompts (%)")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path)


STAGES = {name: stage(name, *rest) for name, *rest in ALGORITHMS} | {"agent": agent}
