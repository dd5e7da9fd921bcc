"""The supervised stages of scripts/evaluate_stages.py: how each is trained on the toy world, and
what is measured before and after it.

A stage is a function (bench, seed) -> {measurement: (before, after)}. Its training is an ordinary
command of a stage script; the settings here are those that work for `tiny`.
"""

from dataclasses import replace
from pathlib import Path

from dataset.toy.rows import heldout_questions
from scripts.stages.bench import Bench, Results
from trainer import (
    train_distillation,
    train_dpo,
    train_full_sft,
    train_lora,
    train_reason,
    train_reward,
)
from trainer.runtime.data import TOY
from trainer.runtime.metrics import read_metrics

# the skills that are solved in steps
MULTI_STEP = ("arithmetic", "sorting", "counting", "dates", "word_problems")


def first_and_last(folder: Path, name: str) -> tuple[float, float]:
    """(first, last) value of a metric in a run's metrics.jsonl."""
    rows = read_metrics(folder / "metrics.jsonl")
    values = [row[name] for row in rows if row.get(name) is not None]
    return values[0], values[-1]


def lora(bench: Bench, seed: int) -> Results:
    """LoRA teaches a new identity and a small domain, and keeps the old skills."""
    adapter = bench.train(train_lora, f"lora-{seed}", seed, "--from_weight", bench.base)
    engine = bench.engine(bench.base, adapter)
    new = heldout_questions(bench.world, bench.args.limit, "lora")
    old = bench.skills_but("identity")  # which is meant to change
    return {
        "new domain": (bench.before("new domain", new), bench.accuracy(engine, new)),
        "old skills": (bench.before("old skills", old), bench.accuracy(engine, old)),
    }


def dpo(bench: Bench, seed: int) -> Results:
    """Preference pairs make the answers right and polite instead of curt."""
    held_out = bench.pairs("heldout", 3 * bench.args.limit)
    flags = ["--from_weight", bench.base, "--val_path", held_out]
    flags += "--max_seq_len 256 --batch_size 4 --epochs 2 --learning_rate 1e-4".split()
    folder = bench.train(train_dpo, f"dpo-{seed}", seed, *flags, "--sft_weight", 1)
    engine, sampling = bench.engine(folder), dict(temperature=0.7, seed=seed)
    asked, others = bench.skills("preferences"), bench.skills_but("preferences")
    return {
        "held-out pairs": first_and_last(folder, f"val_log_probs/accuracies/{held_out.stem}"),
        "sampled answers": (
            bench.before(f"sampled {seed}", asked, **sampling),
            bench.accuracy(engine, asked, **sampling),
        ),
        "other skills": (bench.before("other skills", others), bench.accuracy(engine, others)),
    }


def reward(bench: Bench, seed: int) -> Results:
    """A reward model scores the preferred answer of a pair higher."""
    held_out = bench.pairs("heldout", 3 * bench.args.limit)
    flags = ["--from_weight", bench.base, "--val_path", held_out]
    flags += ["--data_path", bench.pairs("train", 10_000)]
    flags += "--max_seq_len 256 --batch_size 4 --learning_rate 5e-4 --warmup_ratio 0.1".split()
    folder = bench.train(train_reward, f"reward-{seed}", seed, *flags)
    return {"held-out pairs": first_and_last(folder, f"val_rewards/accuracies/{held_out.stem}")}


def distillation(bench: Bench, seed: int) -> Results:
    """A student with a teacher (after), and without one (before), by the same rows and steps."""
    flags = "--from_weight none --hidden_size 96 --num_hidden_layers 3".split()
    flags += ["--data_path", f"{TOY / 'sft_train.jsonl'}@0.08"]
    flags += ["--val_path", TOY / "sft_heldout.jsonl", *bench.plan["sft"]]
    flags += "--learning_rate 6e-3 --batch_size 1 --epochs 200 --max_steps 1500".split()
    alone = bench.train(train_full_sft, f"alone-{seed}", seed, *flags)
    flags += ["--teacher", bench.base, "--alpha", 1]
    taught = bench.train(train_distillation, f"taught-{seed}", seed, *flags)
    folders = (alone, taught)
    bits = [first_and_last(folder, "val_bpb/sft_heldout")[1] for folder in folders]
    right = [bench.accuracy(bench.engine(folder), bench.questions) for folder in folders]
    return {"held-out bits saved": (0.0, 1 - bits[1] / bits[0]), "all skills": tuple(right)}


def reason(bench: Bench, seed: int) -> Results:
    """One model that thinks (after) or answers at once (before), by the template's switch."""
    flags = "--batch_size 3 --epochs 4 --learning_rate 1e-3 --from_weight".split()
    engine = bench.engine(bench.train(train_reason, f"reason-{seed}", seed, *flags, bench.base))
    asked = bench.skills(*MULTI_STEP)
    direct, thinking = (
        bench.accuracy(engine, asked, enable_thinking=thinks) for thinks in (False, True)
    )
    return {
        "multi-step problems": (direct, thinking),
        "against the SFT model": (bench.before("multi-step", asked), thinking),
    }


def tools(bench: Bench, seed: int) -> Results:
    """Tool calls that are run, after training on more; and the same questions without tools."""
    flags = ["--from_weight", bench.base, *bench.plan["sft"]]
    flags += "--learning_rate 1e-3 --epochs 1 --data_path".split()
    flags += [f"{TOY / 'tools_train.jsonl'}@0.5", f"{TOY / 'sft_train.jsonl'}@0.25"]
    engine = bench.engine(bench.train(train_full_sft, f"tools-{seed}", seed, *flags))
    asked, others = bench.skills("tools"), bench.skills_but("tools")
    bare = [replace(question, tools=None, calls=()) for question in asked]  # only the answer counts
    right = bench.accuracy(engine, asked)
    return {
        "with tools, against none": (bench.accuracy(engine, bare), right),
        "tool questions": (bench.before("tools", asked), right),
        "other skills": (bench.before("all but tools", others), bench.accuracy(engine, others)),
    }


STAGES = {stage.__name__: stage for stage in (lora, dpo, reward, distillation, reason, tools)}
