"""The rungs of scripts/ladder.py: how each stage is trained on the toy world, and what is measured before and after it.

A rung is a function (bench, seed) -> {what is measured: (before, after)}, shares from 0 to 1. Its training is an ordinary
command of a stage script; the settings that were found for `tiny` stand here.
"""

import random
from dataclasses import replace
from pathlib import Path

from dataset.jsonl import dump_row
from dataset.toy_world import DPO_SKILLS, accuracy_table, dpo_row, heldout_questions
from model.model_lora import merge_adapter
from model.model_minimind import MiniMindConfig
from model.native_format import read_config
from scripts.quickstart import CPU, GPU
from trainer import (
    train_distillation,
    train_dpo,
    train_full_sft,
    train_lora,
    train_pretrain,
    train_reason,
    train_reward,
)
from trainer.evaluation import evaluation_engine, toy_answers
from trainer.metrics import read_metrics
from trainer.run import Compute
from trainer.weights import read_weight, shape_name

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "dataset" / "toy_mini"
MULTI_STEP = ("arithmetic", "sorting", "counting", "dates", "word_problems")  # skills with steps to think through

# (rung, what): the side of the table ("after" or "gain") that must be above a value; a gain above 0 with its whole interval
AIMS = {
    ("lora", "new domain"): ("after", 0.95),
    ("lora", "old skills"): ("gain", -0.02),
    ("dpo", "held-out pairs"): ("gain", 0.0),
    ("dpo", "sampled answers"): ("gain", 0.0),
    ("reward", "held-out pairs"): ("after", 0.90),
    ("distillation", "held-out bits saved"): ("gain", 0.0),
    ("distillation", "all skills"): ("gain", 0.0),
    ("reason", "multi-step problems"): ("gain", 0.10),
    ("tools", "with tools, against none"): ("after", 0.90),
}


class Bench:
    """What the rungs share: the world's questions, the SFT model `base` (a folder) and how well it does."""

    def __init__(self, args, world):
        self.args, self.world, self.run = args, world, Compute(args)
        self.plan = GPU if self.run.device.type == "cuda" else CPU
        self.questions = heldout_questions(world, args.limit)
        self.known = {}  # what was measured of models to start from
        self.base = None  # until it is there
        self.base = Path(args.from_weight) if args.from_weight else self.train_base()

    def train(self, module, name, seed, *flags):
        """Run a stage script into SAVE_DIR/name_<shape>, or leave it if it is done there; returns its folder."""
        flags = ["--save_dir", self.args.save_dir, "--save_weight", name, "--seed", seed, "--device", self.args.device,
                 "--log_interval", 20, "--val_interval", 10**6, *flags]
        if self.args.max_steps:
            flags += ["--max_steps", self.args.max_steps]
        flags = [str(flag) for flag in flags]
        folder = Path(self.args.save_dir) / f"{name}_{self.shape_of(flags)}"
        if (folder / "checkpoints").is_dir():
            flags.append("--overwrite" if self.args.overwrite and self.base else "--from_resume")
        print(f"\npython trainer/{module.__name__.split('.')[-1]}.py {' '.join(flags)}".replace(f"{ROOT}/", ""), flush=True)
        module.main(flags)
        return folder

    def shape_of(self, flags):
        """The last part of the run's folder's name: as the shape flags say, else as the checkpoint that it starts from is."""
        if "--hidden_size" in flags:
            return "x".join(flags[flags.index(name) + 1] for name in ("--hidden_size", "--num_hidden_layers"))
        return shape_name(MiniMindConfig(**read_config(self.base))) if self.base else self.plan["preset"]

    def train_base(self):
        """The SFT model that all rungs start from: the quick start's recipe, with more epochs."""
        shape = ["--preset", self.plan["preset"]]
        self.train(train_pretrain, "pretrain", 42, *shape, *self.plan["pretrain"], "--epochs", 3)
        return self.train(train_full_sft, "full_sft", 42, *shape, *self.plan["sft"], "--epochs", 4)

    def engine(self, folder, adapter=None):
        """A decoding engine for a checkpoint folder."""
        model, tokenizer = read_weight(str(folder), self.args, self.run.device)
        if adapter:
            merge_adapter(model, adapter)
        return evaluation_engine(model.to(self.run.device), tokenizer, self.run)

    def accuracy(self, engine, questions, **how):
        """Share of the questions that are answered rightly; `how`: see toy_answers."""
        return accuracy_table(toy_answers(engine, questions, **how))[-1]["accuracy"]

    def of(self, folder, what, questions, **how):
        """`accuracy` of the model in a folder, measured once and then known as `what`."""
        if (folder, what) not in self.known:
            self.known[folder, what] = self.accuracy(self.engine(folder), questions, **how)
        return self.known[folder, what]

    def of_base(self, what, questions, **how):
        """`of` the base."""
        return self.of(self.base, what, questions, **how)

    def skills(self, *names):
        """The held-out questions of these skills."""
        return [question for question in self.questions if question.skill in names]

    def rows(self, name, make):
        """A file of rows in SAVE_DIR/data, written by make() if it is not there."""
        path = Path(self.args.save_dir) / "data" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(map(dump_row, make())), encoding="utf-8")
        return path

    def pairs(self, split, count):
        """A file of up to `count` preference pairs of a split, more than the world's own has."""
        def make():
            rng = random.Random(0)
            share = {skill: count * DPO_SKILLS.count(skill) // len(DPO_SKILLS) for skill in DPO_SKILLS}
            return [dpo_row(item, rng) for skill in share for item in self.world.items("ladder", skill, split, share[skill])]

        return self.rows(f"pairs_{split}_{count}", make)


def first_and_last(folder, name):
    """(first, last) value of a figure in a run's metrics.jsonl."""
    values = [row[name] for row in read_metrics(folder / "metrics.jsonl") if row.get(name) is not None]
    return values[0], values[-1]


def lora(bench, seed):
    """LoRA teaches a new identity and a small domain; what was known before stays."""
    adapter = bench.train(train_lora, f"lora-{seed}", seed, "--from_weight", bench.base)
    engine, new = bench.engine(bench.base, adapter), heldout_questions(bench.world, bench.args.limit, "lora")
    old = [question for question in bench.questions if question.skill != "identity"]  # which is what changes
    return {"new domain": (bench.of_base("new domain", new), bench.accuracy(engine, new)),
            "old skills": (bench.of_base("old skills", old), bench.accuracy(engine, old))}


def dpo(bench, seed):
    """Preference pairs make the answers right and polite instead of curt."""
    held_out = bench.pairs("heldout", 3 * bench.args.limit)
    folder = bench.train(train_dpo, f"dpo-{seed}", seed, "--from_weight", bench.base, "--val_path", held_out,
                         "--max_seq_len", 256, "--batch_size", 4, "--epochs", 2, "--learning_rate", 1e-4, "--sft_weight", 1)
    asked, how = bench.skills("preferences"), dict(temperature=0.7, seed=seed)
    others, engine = [q for q in bench.questions if q.skill != "preferences"], bench.engine(folder)
    return {"held-out pairs": first_and_last(folder, f"val_log_probs/accuracies/{held_out.stem}"),
            "sampled answers": (bench.of_base(f"sampled {seed}", asked, **how), bench.accuracy(engine, asked, **how)),
            "other skills": (bench.of_base("other skills", others), bench.accuracy(engine, others))}


def reward(bench, seed):
    """A reward model tells the preferred answer of a pair."""
    held_out = bench.pairs("heldout", 3 * bench.args.limit)
    folder = bench.train(train_reward, f"reward-{seed}", seed, "--from_weight", bench.base, "--val_path", held_out,
                         "--data_path", bench.pairs("train", 10_000), "--max_seq_len", 256, "--batch_size", 4,
                         "--learning_rate", 5e-4, "--warmup_share", 0.1)
    return {"held-out pairs": first_and_last(folder, f"val_rewards/accuracies/{held_out.stem}")}


def distillation(bench, seed):
    """A small student with a teacher (after) against the same student alone (before): the same rows and steps."""
    shape = ["--from_weight", "none", "--hidden_size", 96, "--num_hidden_layers", 3, "--data_path",
             f"{TOY / 'sft_train.jsonl'}@0.08", "--val_path", TOY / "sft_heldout.jsonl", *bench.plan["sft"],
             "--learning_rate", 6e-3, "--batch_size", 1, "--epochs", 200, "--max_steps", 1500]
    alone = bench.train(train_full_sft, f"alone-{seed}", seed, *shape)
    taught = bench.train(train_distillation, f"taught-{seed}", seed, *shape, "--teacher", bench.base, "--alpha", 1)
    bits = [first_and_last(folder, "val_bpb/sft_heldout")[1] for folder in (alone, taught)]
    return {"held-out bits saved": (0.0, 1 - bits[1] / bits[0]),
            "all skills": tuple(bench.accuracy(bench.engine(folder), bench.questions) for folder in (alone, taught))}


def reason(bench, seed):
    """One model, thinking (after) against answering at once (before), by the template's switch."""
    engine = bench.engine(bench.train(train_reason, f"reason-{seed}", seed, "--from_weight", bench.base,
                                      "--batch_size", 3, "--epochs", 4, "--learning_rate", 1e-3))
    asked = bench.skills(*MULTI_STEP)
    direct, thinking = (bench.accuracy(engine, asked, enable_thinking=thinks) for thinks in (False, True))
    return {"multi-step problems": (direct, thinking), "against the SFT model": (bench.of_base("multi-step", asked), thinking)}


def tools(bench, seed):
    """Tool calls, run for real, after training on more of them; without tools on offer for comparison."""
    folder = bench.train(train_full_sft, f"tools-{seed}", seed, "--from_weight", bench.base, *bench.plan["sft"],
                         "--learning_rate", 1e-3, "--epochs", 1,
                         "--data_path", f"{TOY / 'tools_train.jsonl'}@0.5", f"{TOY / 'sft_train.jsonl'}@0.25")
    engine, asked = bench.engine(folder), bench.skills("tools")
    bare = [replace(question, tools=None, calls=()) for question in asked]  # only the answer counts
    others = [question for question in bench.questions if question.skill != "tools"]
    right = bench.accuracy(engine, asked)
    return {"with tools, against none": (bench.accuracy(engine, bare), right),
            "tool questions": (bench.of_base("tools", asked), right),
            "other skills": (bench.of_base("all but tools", others), bench.accuracy(engine, others))}


RUNGS = {rung.__name__: rung for rung in (lora, dpo, reward, distillation, reason, tools)}
