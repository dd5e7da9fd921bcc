"""From nothing to a chat model: build the toy world, pretrain, fine-tune, score, and show some
conversations.

    bash scripts/quickstart.sh            # makes the environment first
    python scripts/quickstart.py          # in an environment that is there

Run again, it does only the missing parts. On a CPU it trains the `tiny` preset on the small level
of the toy world, on a GPU `minimind-3` on the large one.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval_llm
from dataset import toy_world
from dataset.toy.rows import heldout_questions
from dataset.toy.scorer import format_table, hold_all
from dataset.toy.world import make_world
from model.files import write_json
from scripts.checkpoint import DeviceArgs
from trainer.runtime.arguments import arg, command, parse_args

# level of the world, preset, and the flags of each stage
CPU = dict(
    level="mini",
    preset="tiny",
    pretrain="--optimizer muon --learning_rate 3e-3 --batch_size 3".split(),
    sft="--optimizer muon --learning_rate 2e-3 --batch_size 3 --epochs 2".split(),
)
GPU = dict(
    level="full",
    preset="minimind-3",
    pretrain="--optimizer muon --learning_rate 1e-3 --batch_size 8 --max_seq_len 2048".split(),
    sft="--optimizer muon --learning_rate 5e-4 --batch_size 8 --max_seq_len 2048".split(),
)


@dataclass
class QuickstartArgs(DeviceArgs):
    save_dir: str = arg(str(ROOT / "out" / "quickstart"), "folder for the two runs")
    max_steps: int | None = arg(None, "a trial run: end each stage after so many steps")
    limit: int = arg(40, "questions of each skill when scoring")
    json: str = arg("", "write the times and the accuracies to this file too")


def train(
    module: ModuleType, name: str, args: QuickstartArgs, plan: dict, seconds: dict[str, float]
) -> Path:
    """Run a training stage, or resume it, or leave it if it is done; returns its folder."""
    kind = "pretrain" if name == "pretrain" else "sft"
    folder = Path(args.save_dir) / f"{name}_{plan['preset']}"
    data = ROOT / "dataset" / f"toy_{plan['level']}" / f"{kind}_train.jsonl"
    flags = ["--data_path", str(data), "--save_dir", args.save_dir]
    flags += ["--preset", plan["preset"], "--device", args.device, *plan[kind]]
    if args.max_steps:
        flags += ["--max_steps", str(args.max_steps)]
    if (folder / "checkpoints").is_dir():
        flags.append("--from_resume")
    command_line = f"python trainer/train_{name}.py {' '.join(flags)}".replace(f"{ROOT}/", "")
    print(f"\n== {name}: {command_line}", flush=True)
    start = time.perf_counter()
    module.main(flags)
    seconds[name] = round(time.perf_counter() - start, 1)
    return folder


def score(folder: Path, args: QuickstartArgs, plan: dict) -> list[dict]:
    """Accuracy on held-out questions, kept in the run's folder until the weights are newer."""
    kept = folder / f"toy_{args.limit}.json"
    if not kept.is_file() or kept.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
        flags = ["--weight", folder, "--benchmark", "toy", "--toy_level", plan["level"]]
        flags += ["--limit", args.limit, "--device", args.device, "--json", kept]
        eval_llm.main([str(flag) for flag in flags])
        return json.loads(kept.read_text(encoding="utf-8"))["rows"]
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    print(format_table(rows))
    return rows


def converse(folder: Path, args: QuickstartArgs, plan: dict) -> None:
    """Print a conversation about a held-out question per skill, Chinese and English in turn."""
    from scripts.toy_benchmark import completer, evaluation_engine, print_conversation
    from trainer.runtime.process import Compute

    chat = parse_args(eval_llm.EvalArgs, ["--weight", str(folder), "--device", args.device])
    run = Compute(chat)
    model, tokenizer, _ = eval_llm.load(chat, run.device)
    complete = completer(evaluation_engine(model, tokenizer, run, max_batch_size=1))
    questions = heldout_questions(make_world(plan["level"]), 4)
    skills = dict.fromkeys(question.skill for question in questions)
    for number, skill in enumerate(skills):
        language = ("zh", "en")[number % 2]
        question = next(q for q in questions if q.skill == skill and q.language == language)
        [(right, messages)] = hold_all([question], complete)
        print(f"--- {skill}, {'right' if right else f'wrong: {question.answer} was expected'}")
        print_conversation(messages)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(QuickstartArgs, argv)
    from trainer import train_full_sft, train_pretrain
    from trainer.runtime.process import choose_device

    if args.max_steps and "save_dir" not in args.given:
        args.save_dir += f"_{args.max_steps}_steps"
    plan, seconds = GPU if choose_device(args.device).type == "cuda" else CPU, {}

    print(f"== toy world, level {plan['level']}", flush=True)
    start = time.perf_counter()
    toy_world.main(["--level", plan["level"]])
    seconds["world"] = round(time.perf_counter() - start, 1)
    train(train_pretrain, "pretrain", args, plan, seconds)
    folder = train(train_full_sft, "full_sft", args, plan, seconds)

    print("\n== accuracy on questions that were held out of training", flush=True)
    start = time.perf_counter()
    rows = score(folder, args, plan)
    seconds["score"] = round(time.perf_counter() - start, 1)
    print("\n== some conversations", flush=True)
    converse(folder, args, plan)

    print("\nseconds: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    talk = f".venv/bin/python eval_llm.py --weight {folder}".replace(f"{ROOT}/", "")
    print(f"The model is in {folder}. Talk to it:\n\n    {talk}".replace(f"{ROOT}/", ""))
    if args.json:
        write_json(args.json, {"seconds": seconds, "accuracy": rows})


if __name__ == "__main__":
    command(main)
