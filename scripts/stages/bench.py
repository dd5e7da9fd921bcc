"""The common parts of all stage evaluations: the toy world's questions, the SFT model that the
stages start from, training, and the accuracy of a model.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from dataset.files.jsonl import dump_row
from dataset.toy.rows import DPO_SKILLS, dpo_row, heldout_questions
from dataset.toy.scorer import Question, accuracy_table
from dataset.toy.world import World
from model.engine import Engine
from model.model_minimind import MiniMindConfig
from model.native_format import read_config
from scripts.checkpoint import ShapeArgs, load_checkpoint
from scripts.quickstart import CPU, GPU
from scripts.toy_benchmark import evaluation_engine, toy_answers
from trainer import train_full_sft, train_pretrain
from trainer.runtime.arguments import ROOT
from trainer.runtime.process import Compute
from trainer.runtime.run_folder import shape_name

Results = dict[str, tuple[float, float]]  # name of a measurement: (before, after), from 0 to 1


class Bench:
    """The world's questions, the SFT model `base` (a folder), and its accuracies."""

    def __init__(self, args: Any, world: World):  # evaluate_stages.StageArgs
        self.args, self.world, self.run = args, world, Compute(args)
        self.plan = GPU if self.run.device.type == "cuda" else CPU
        self.questions = heldout_questions(world, args.limit)
        self.known: dict[tuple[Path, str], float] = {}  # accuracies of models to start from
        self.base = None  # until it is there
        self.base = Path(args.from_weight) if args.from_weight else self.train_base()

    def train(self, module: ModuleType, name: str, seed: int, *flags: Any) -> Path:
        """Run a stage script into SAVE_DIR/name_<shape>, unless it is done; returns the folder."""
        args = self.args
        first = ["--save_dir", args.save_dir, "--save_weight", name, "--seed", seed]
        first += ["--device", args.device, "--log_interval", 20, "--val_interval", 10**6]
        first += [] if "--data_path" in flags else ["--data_path", "toy"]
        flags = [str(flag) for flag in (*first, *flags)]
        if args.max_steps:
            flags += ["--max_steps", str(args.max_steps)]
        folder = Path(args.save_dir) / f"{name}_{self.shape_of(flags)}"
        if (folder / "checkpoints").is_dir():
            flags.append("--overwrite" if args.overwrite and self.base else "--from_resume")
        script = f"trainer/{module.__name__.split('.')[-1]}.py"
        print(f"\npython {script} {' '.join(flags)}".replace(f"{ROOT}/", ""), flush=True)
        module.main(flags)
        return folder

    def shape_of(self, flags: list[str]) -> str:
        """The end of a run's folder name, by the shape flags or the checkpoint it starts from."""
        if "--hidden_size" in flags:
            shape = ("--hidden_size", "--num_hidden_layers")
            return "x".join(flags[flags.index(name) + 1] for name in shape)
        if self.base:
            return shape_name(MiniMindConfig(**read_config(self.base)))
        return self.plan["preset"]

    def train_base(self) -> Path:
        """The SFT model that all stages start from: the quick start's recipe, with more epochs."""
        shape = ["--preset", self.plan["preset"]]
        self.train(train_pretrain, "pretrain", 42, *shape, *self.plan["pretrain"], "--epochs", 3)
        return self.train(train_full_sft, "full_sft", 42, *shape, *self.plan["sft"], "--epochs", 4)

    def engine(self, folder: Path, adapter: Path | None = None) -> Engine:
        """A decoding engine for a checkpoint folder, with an adapter merged into it."""
        adapters = [adapter] if adapter else []
        model, tokenizer = load_checkpoint(str(folder), ShapeArgs(), self.run.device, adapters)
        return evaluation_engine(model, tokenizer, self.run)

    def accuracy(self, engine: Engine, questions: list[Question], **options: Any) -> float:
        """Fraction of right answers; options: those of `toy_benchmark.completer`."""
        return accuracy_table(toy_answers(engine, questions, **options))[-1]["accuracy"]

    def before(
        self, name: str, questions: list[Question], folder: Path | None = None, **options: Any
    ) -> float:
        """`accuracy` of a model to start from (the base), measured once and known under `name`."""
        folder = folder or self.base
        if (folder, name) not in self.known:
            self.known[folder, name] = self.accuracy(self.engine(folder), questions, **options)
        return self.known[folder, name]

    def skills(self, *names: str) -> list[Question]:
        """The held-out questions of these skills."""
        return [question for question in self.questions if question.skill in names]

    def skills_but(self, *names: str) -> list[Question]:
        """The held-out questions of all other skills."""
        return [question for question in self.questions if question.skill not in names]

    def rows(self, name: str, make: Callable[[], Iterable[dict]]) -> Path:
        """A file of rows in SAVE_DIR/data; make() makes them if it is not there."""
        path = Path(self.args.save_dir) / "data" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(map(dump_row, make())), encoding="utf-8")
        return path

    def pairs(self, split: str, count: int) -> Path:
        """A file of up to `count` preference pairs of a split, more than the world's own has."""

        def make():
            rng = random.Random(0)
            for skill in dict.fromkeys(DPO_SKILLS):
                per_skill = count * DPO_SKILLS.count(skill) // len(DPO_SKILLS)
                # "ladder" seeds the rows: another name would be other rows
                for item in self.world.items("ladder", skill, split, per_skill):
                    yield dpo_row(item, rng)

        return self.rows(f"pairs_{split}_{count}", make)
