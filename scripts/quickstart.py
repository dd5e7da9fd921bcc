"""From nothing to a chat model: build the toy world, pretrain, fine-tune, score, and show what it says.

    bash scripts/quickstart.sh            # makes the environment first
    python scripts/quickstart.py          # in an environment that is there

Run again, it does only what is missing. On a CPU it trains the `tiny` preset on the small level of the toy world, on a
GPU `minimind-3` on the large one.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import eval_llm
from dataset import toy_world
from dataset.chat_format import encode_prompt
from trainer import train_full_sft, train_pretrain
from trainer.arguments import arg, command, parse_args
from trainer.evaluation import evaluation_engine, greedy_texts
from trainer.metrics import write_json

# level of the world, preset, and what each stage is given
CPU = dict(
    level="mini", preset="tiny",
    pretrain=["--optimizer", "muon", "--learning_rate", "3e-3", "--batch_size", "3"],
    sft=["--optimizer", "muon", "--learning_rate", "2e-3", "--batch_size", "3", "--epochs", "2"])
GPU = dict(
    level="full", preset="minimind-3",
    pretrain=["--optimizer", "muon", "--learning_rate", "1e-3", "--batch_size", "8", "--max_seq_len", "2048"],
    sft=["--optimizer", "muon", "--learning_rate", "5e-4", "--batch_size", "8", "--max_seq_len", "2048"])


@dataclass
class QuickstartArgs:
    save_dir: str = arg(str(ROOT / "out" / "quickstart"), "folder for the two runs")
    device: str = arg("auto", "cpu or cuda; auto: the GPU if there is one")
    max_steps: int | None = arg(None, "end each stage after so many steps: to see only that everything works")
    limit: int = arg(40, "questions of each skill when scoring")
    json: str = arg("", "write the times and the accuracies to this file too")


def stage(module, name, args, plan, seconds):
    """Run a training stage, or go on with it, or leave it if it is done; returns its folder."""
    folder = Path(args.save_dir) / f"{name}_{plan['preset']}"
    data = ROOT / "dataset" / f"toy_{plan['level']}" / f"{'pretrain' if name == 'pretrain' else 'sft'}_train.jsonl"
    flags = ["--data_path", str(data), "--save_dir", args.save_dir, "--preset", plan["preset"], "--device", args.device,
             *plan["pretrain" if name == "pretrain" else "sft"]]
    if args.max_steps:
        flags += ["--max_steps", str(args.max_steps)]
    if (folder / "checkpoints").is_dir():
        flags.append("--from_resume")
    print(f"\n== {name}: python trainer/train_{name}.py {' '.join(flags)}".replace(f"{ROOT}/", ""), flush=True)
    start = time.perf_counter()
    module.main(flags)
    seconds[name] = round(time.perf_counter() - start, 1)
    return folder


def score(folder, args, plan):
    """Accuracy on held-out questions, kept beside the weights; measured again only if those are newer."""
    kept = folder / f"toy_{args.limit}.json"
    if not kept.is_file() or kept.stat().st_mtime < (folder / "model.safetensors").stat().st_mtime:
        eval_llm.main(["--weight", str(folder), "--benchmark", "toy", "--toy_level", plan["level"], "--limit", str(args.limit),
                       "--device", args.device, "--json", str(kept)])
    else:
        print(toy_world.format_table(json.loads(kept.read_text(encoding="utf-8"))["rows"]))
    return json.loads(kept.read_text(encoding="utf-8"))["rows"]


def converse(folder, args, plan):
    """Print the conversation about one held-out question of each skill, in turn in Chinese and in English."""
    chat = eval_llm.parse_args(eval_llm.EvalArgs, ["--weight", str(folder), "--device", args.device])
    run = eval_llm.Compute(chat)
    model, tokenizer, _ = eval_llm.load(chat, run.device)
    engine = evaluation_engine(model, tokenizer, run, max_batch_size=1)

    def reply(messages, tools):
        return greedy_texts(engine, [encode_prompt(tokenizer, messages, tools)], 128)[0]

    questions = toy_world.heldout_questions(toy_world.make_world(plan["level"]), 4)
    skills = dict.fromkeys(question.skill for question in questions)
    for number, skill in enumerate(skills):
        language = ("zh", "en")[number % 2]
        question = next(q for q in questions if q.skill == skill and q.language == language)
        right, messages = toy_world.ask(question, reply)
        print(f"--- {skill}, {'right' if right else f'wrong: {question.answer} was expected'}")
        for message in messages:
            for call in message.get("tool_calls") or ():
                print(f"  assistant: calls {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")
            if message["content"]:
                print(f"  {message['role']}: {message['content'].strip()}")


def main(argv=None):
    args = parse_args(QuickstartArgs, argv)
    if args.max_steps and "save_dir" not in args.given:
        args.save_dir += f"_{args.max_steps}_steps"
    has_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    plan, seconds = GPU if has_gpu else CPU, {}

    print(f"== toy world, level {plan['level']}", flush=True)
    start = time.perf_counter()
    toy_world.main(["--level", plan["level"]])
    seconds["world"] = round(time.perf_counter() - start, 1)
    stage(train_pretrain, "pretrain", args, plan, seconds)
    folder = stage(train_full_sft, "full_sft", args, plan, seconds)

    print("\n== accuracy on questions that were held out of training", flush=True)
    start = time.perf_counter()
    rows = score(folder, args, plan)
    seconds["score"] = round(time.perf_counter() - start, 1)
    print("\n== some conversations", flush=True)
    converse(folder, args, plan)

    print("\nseconds: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    print(f"The model is in {folder}. Talk to it:\n\n    .venv/bin/python eval_llm.py --weight {folder}".replace(f"{ROOT}/", ""))
    if args.json:
        write_json(args.json, {"seconds": seconds, "accuracy": rows})


if __name__ == "__main__":
    command(main)
