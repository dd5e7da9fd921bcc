"""The rungs of scripts/ladder.py for reinforcement learning: what each algorithm adds, and how fast.

What is solved already leaves nothing to find, so they start from a model with two bad habits, which a short fine-tuning gave to
the base of the other rungs: 70% of its answers are the result alone, where the steps written out would make it right more
often, and half of its answers to questions for a tool are guesses. That it can do better is for reinforcement learning to find
out. Right answers are what dataset/toy_scorer.py holds for right: the reward in training, and the measure on held-out questions.
"""

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

from dataset.toy_world import RL_SKILLS, agent_row, question_of_item, rl_row, sft_row
from trainer import train_agent, train_full_sft, train_grpo, train_ppo, train_spo
from trainer.metrics import read_metrics

CURT, GUESSED = 0.7, 0.5
TOOL_SKILLS = {"one call": "tools", "two calls": "two_cities"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COMMON = ["--max_new_tokens", 80, "--learning_rate", 1e-4, "--warmup_share", 0.1, "--log_interval", 1]


def habit_rows(world):
    """Half of fine-tuning's rows, CURT of them without their steps, and more with tools, GUESSED of them without the calls."""
    counts = {skill: count // 2 for skill, count in world.level.sft_rows.items()} | {"tools": 2000, "two_cities": 800}
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
def habit_base(bench):
    """The model with the bad habits, from the base of the other rungs; trained once."""
    path = bench.rows("habits", lambda: habit_rows(bench.world))
    return bench.train(train_full_sft, "habits", 42, "--from_weight", bench.base, "--data_path", path, *bench.plan["sft"],
                       "--learning_rate", 1e-3, "--epochs", 1)


def items_of(bench, skills, split, count):
    """Up to so many items of each of these skills; held-out ones are those that are asked in the end."""
    return [item for skill in skills for item in bench.world.items("sft" if split == "heldout" else "rl", skill, split, count)]


def rung(name, doc, module, *flags):
    """A rung (bench, seed) -> {what: (before, after)}: right answers to held-out questions of RL_SKILLS, and of the others."""
    def run(bench, seed):
        base, limit = habit_base(bench), bench.args.limit
        held_out = bench.rows(f"rl_heldout_{limit}", lambda: [rl_row(item, None) for item in
                                                              items_of(bench, RL_SKILLS, "heldout", limit)])
        folder = bench.train(module, f"{name}-{seed}", seed, "--from_weight", base, "--max_seq_len", 256, "--val_path", held_out,
                             *COMMON, *flags)
        asked, engine = bench.skills(*RL_SKILLS), bench.engine(folder)
        others = [question for question in bench.questions if question.skill not in (*RL_SKILLS, "tools")]
        return {"right answers": (bench.of(base, "right", asked), bench.accuracy(engine, asked)),
                "other skills": (bench.of(base, "others", others), bench.accuracy(engine, others))}

    run.__name__, run.__doc__ = name, doc
    return run


def grpo_rung(loss_type, doc, *flags):
    """A member of GRPO's family: 16 prompts, 8 answers to each."""
    return rung(loss_type, doc, train_grpo, "--loss_type", loss_type, "--val_interval", 20, *flags)


def agent(bench, seed):
    """An agent learns that calling the tools pays: one call, and two in one question."""
    base, limit = habit_base(bench), bench.args.limit
    asked = {what: items_of(bench, [skill], "heldout", limit) for what, skill in TOOL_SKILLS.items()}
    training = bench.rows("agent", lambda: [agent_row(item, None) for item in
                                            items_of(bench, TOOL_SKILLS.values(), "train", 1000)])
    held_out = bench.rows(f"agent_heldout_{limit}", lambda: [agent_row(item, None) for part in asked.values() for item in part])
    folder = bench.train(train_agent, f"agent-{seed}", seed, "--from_weight", base, "--data_path", training,
                         "--val_path", held_out, "--max_seq_len", 512, *COMMON, "--max_steps", 20, "--val_interval", 5)
    engine, results = bench.engine(folder), {}
    for what, items in asked.items():
        questions = [question_of_item(item) for item in items]
        results[what] = (bench.of(base, what, questions), bench.accuracy(engine, questions))
    return results


def draw_curves(save_dir, names, seeds, path):
    """Right answers to held-out prompts over the time of training: each rung's mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2), dpi=140, layout="constrained")
    for name, colour in zip(names, COLOURS):
        curves = []
        for seed in seeds:
            rows = read_metrics(next(Path(save_dir).glob(f"{name}-{seed}_*")) / "metrics.jsonl")
            curves.append([(row["seconds"], value) for row in rows for key, value in row.items()
                           if key.startswith("val_reward/answer/")])
        points = [(mean(x for x, _ in at), 100 * mean(y for _, y in at)) for at in zip(*curves)]
        axis.plot(*zip(*points), "o-", color=colour, label=name, linewidth=1.6, markersize=3.5)
    axis.set_xlabel(f"seconds of training, mean of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    axis.set_ylabel("right answers to held-out prompts (%)")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


RL_RUNGS = {one.__name__: one for one in (
    rung("ppo", "PPO: a critic says what was to be expected.", train_ppo, "--max_steps", 40, "--val_interval", 10),
    grpo_rung("grpo", "GRPO: the other answers to a prompt say it.", "--max_steps", 120),
    grpo_rung("dr_grpo", "Dr. GRPO: without the divisions that favour some prompts and lengths.", "--max_steps", 120),
    grpo_rung("dapo", "DAPO: a wider clip, other prompts for groups that say nothing.", "--max_steps", 80),
    grpo_rung("cispo", "CISPO: the weight is clipped, no token loses its gradient.", "--max_steps", 120),
    grpo_rung("gspo", "GSPO: one ratio for an answer.", "--max_steps", 120),
    rung("spo", "SPO: one answer to a prompt, against what it is known to earn.", train_spo, "--max_steps", 60,
         "--val_interval", 10),
    agent,
)}
RL_AIMS = {(name, what): ("gain", 0.10) for name in RL_RUNGS for what in ("right answers", "one call", "two calls")}
