"""How well a model uses tools: its calls are read, run and their results handed back, until it answers.

    python scripts/eval_toolcall.py --weight out/quickstart/full_sft_tiny                # held-out questions of the toy world
    python scripts/eval_toolcall.py --weight full_sft --data_path dataset/toy_mini/agent_heldout.jsonl --without_tools
    python scripts/eval_toolcall.py --weight full_sft --tools my_tools.py --prompt "What is 12 times 31?"

The table has, for each tool and over all questions: how many were answered rightly (success, with its 95% interval), how many
with just the calls that were expected, to the letter (exact), how many without any attempt to call (no call), and what share
of the attempted calls could not be made (invalid: no JSON, no such tool, wrong arguments). --without_tools asks the same
questions once more with no tools on offer. How tools are written: dataset/tools.py.

Rows of --data_path are those of RL with tools: tools on the system message, the question, and "gt", the values that the
final answer must contain; "calls", [{"name", "arguments"}], are the calls that are expected. The tools must be those of
--tools, or of the toy world.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.chat_format import check_conversation, encode_prompt, normalize_conversation
from dataset.chat_reply import CALL
from dataset.jsonl import find_shards, in_share, read_rows
from dataset.tools import load_tools
from dataset.toy_scorer import Question, contains, hold_all, wilson
from dataset.toy_tools import TOY_TOOLS
from dataset.toy_world import make_world, question_of_item
from eval_llm import load
from model.model_minimind import PRESETS
from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.evaluation import evaluation_engine, greedy_texts
from trainer.metrics import write_json
from trainer.run import Compute


@dataclass
class ToolEvalArgs:
    weight: str = arg("full_sft", "which model: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    adapter: list[str] = arg([], "folder of a LoRA adapter (PEFT format) to merge into the weights; of several, the changes are "
                                 "added up", nargs="+")
    preset: str = arg("", "which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "for a .pth file: width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "for a .pth file: layers, in place of the preset's")
    use_moe: bool = arg(False, "for a .pth file: it is a mixture of experts")
    tools: str = arg("", "a Python file with tools of your own (default: those of the toy world)")
    prompt: str | None = arg(None, "put this one question and print the conversation")
    data_path: str = arg("", "put the questions of this file of rows; FILE@0.4: of that share (default: the toy world's "
                             "held-out ones)")
    toy_level: str = arg("mini", "which toy world", choices=["mini", "full"])
    limit: int = arg(100, "put at most so many questions")
    without_tools: bool = arg(False, "put them without any tools too")
    max_rounds: int = arg(3, "how often the results of calls are handed back")
    open_thinking: bool | None = arg(None, "1: think before each reply, 0: reply at once (default: as the model likes)")
    max_new_tokens: int = arg(256, "longest reply, in tokens")
    show: int = arg(0, "print so many of the conversations that failed")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    json: str = arg("", "write the table to this file too")
    mode = "auto"  # no flag: `load` asks for it

    def check(self):
        """ValueError for values out of range and for flags without effect."""
        check_positive(self, "limit", "max_new_tokens")
        check_not_negative(self, "max_rounds", "show")
        if self.tools and self.prompt is None and not self.data_path:
            raise ValueError("--tools FILE needs questions for these tools: give --prompt TEXT or --data_path FILE")
        unused = {"data_path", "toy_level", "limit", "without_tools", "show", "json"} if self.prompt is not None else (
            {"toy_level"} if self.data_path else set())
        for name in sorted(unused & self.given):
            raise ValueError(f"--{name} has no effect with --{'data_path' if self.prompt is None else 'prompt'}: leave it out")


@dataclass(frozen=True)
class Case:
    """A question, the values that its final answer must contain (None: as the toy world's scorer sees it), the calls expected.

    The question of a case with `gt` has no calls: the scorer would make them itself, with the user's tools.
    """

    question: Question
    gt: tuple[str, ...] | None = None
    calls: tuple[tuple[str, dict], ...] = ()

    def is_right(self, right, messages):
        """Whether a dialogue, which the scorer found right or not, has answered it."""
        return right if self.gt is None else all(contains(messages[-1]["content"], value) for value in self.gt)


def read_cases(path, box, limit):
    """The Cases of a file of rows, or of a share of it. ValueError `path:line: what is wrong. way out`."""
    cases = []
    for shard, share in find_shards(path):
        for line_no, row in read_rows(shard):
            if len(cases) == limit:
                return cases
            if not in_share(line_no, share):
                continue
            try:
                cases.append(case_of(row, box))
            except ValueError as error:
                raise ValueError(f"{shard}:{line_no}: {error}") from error
    if not cases:
        raise ValueError(f"{path}: there is no row in that share. Give a larger one.")
    return cases


def case_of(row, box):
    """The Case of a row; ValueError if it has no `gt`, faulty `calls`, or tools that `box` does not have."""
    gt = row.get("gt")
    if not isinstance(gt, list) or not all(isinstance(value, str) for value in gt):
        raise ValueError('no "gt" with a list of strings. Give {"conversations": [...], "gt": ["...", ...]}.')
    check_conversation(row.get("conversations"))
    messages, _ = normalize_conversation(row["conversations"])
    tools = messages[0].get("tools") or []
    names = [schema.get("function", schema).get("name") for schema in tools]
    if unknown := [str(name) for name in names if name not in box.tools]:
        raise ValueError(f"nobody can run {', '.join(unknown)}. Give --tools FILE with functions of these names.")
    if messages[0]["role"] == "system":
        messages = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
    calls = row.get("calls") or []
    if not isinstance(calls, list) or not all(map(is_call, calls)):
        raise ValueError('"calls" is no list of calls. Give [{"name": "...", "arguments": {...}}, ...], or leave it out.')
    language, group = row.get("language", ""), calls[0]["name"] if calls else ""
    question = Question(group, language, messages, ", ".join(gt), tools=tools or None)
    return Case(question, tuple(gt), tuple((call["name"], call["arguments"]) for call in calls))


def is_call(call):
    """Whether this is {"name": text, "arguments": object}."""
    return isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)


def toy_cases(level, limit):
    """Held-out questions of the toy world that need a tool, half in each language."""
    questions = map(question_of_item, make_world(level).items("sft", "tools", "heldout", limit))
    return [Case(replace(question, skill=question.calls[0][0]), calls=question.calls) for question in questions]


def same_calls(made, wanted):
    """Whether two lists of (name, arguments) are the same but for their order."""
    return len(made) == len(wanted) and all(made.count(call) == wanted.count(call) for call in wanted)


def judge(case, right, messages, box):
    """What a dialogue was like: {"success", "exact", "no_call": bool, "calls", "invalid": attempted ones}."""
    said = [message for message in messages if message["role"] == "assistant"]
    calls = [(call["name"], call["arguments"]) for message in said for call in message.get("tool_calls", ())]
    broken = sum(message["content"].count(CALL) for message in said)  # what is no call has remained content
    return {"success": case.is_right(right, messages), "exact": same_calls(calls, list(case.calls)) and not broken,
            "no_call": not calls and not broken, "calls": len(calls) + broken,
            "invalid": broken + sum(box.fault(*call) is not None for call in calls)}


def table_of(cases, judged, without=None):
    """One row per tool, then "overall": n, success with low and high (95%), exact, no_call, calls, invalid (share of them)."""
    rows, tools = [], [case.question.skill for case in cases]
    for tool in [*dict.fromkeys(tools), "overall"]:
        which = [i for i, name in enumerate(tools) if tool in (name, "overall")]
        n, right, calls = len(which), *(sum(judged[i][key] for i in which) for key in ("success", "calls"))
        low, high = wilson(right, n)
        rows.append({"tool": tool or "any", "n": n, "success": right / n, "low": low, "high": high,
                     "exact": sum(judged[i]["exact"] for i in which) / n, "no_call": sum(judged[i]["no_call"] for i in which) / n,
                     "calls": calls, "invalid": sum(judged[i]["invalid"] for i in which) / max(calls, 1)})
        if without:
            rows[-1]["without_tools"] = sum(without[i] for i in which) / n
    return rows


def format_table(rows):
    """The table as aligned text, shares in percent."""
    shares = ["success", "low", "high", "exact", "no_call", "invalid", *(["without_tools"] if "without_tools" in rows[0] else [])]
    lines = [f"{'tool':<16}{'n':>5}" + "".join(f"{name.replace('_', ' '):>{max(9, len(name) + 2)}}" for name in shares)]
    for row in rows:
        cells = "".join(f"{100 * row[name]:>{max(9, len(name) + 2) - 1}.1f}%" for name in shares)
        lines.append(f"{row['tool']:<16}{row['n']:>5}{cells}")
    return "\n".join(lines)


def show(messages):
    """Print a conversation."""
    for message in messages:
        if message.get("reasoning_content"):
            print(f"  {message['role']} thinks: {message['reasoning_content']}")
        for call in message.get("tool_calls", ()):
            print(f"  {message['role']} calls: {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")
        if message["content"]:
            print(f"  {message['role']}: {message['content'].strip()}")


def main(argv=None):
    args = parse_args(ToolEvalArgs, argv)
    run = Compute(args)
    box = load_tools(args.tools) if args.tools else TOY_TOOLS
    if args.prompt is not None:
        cases = [Case(Question("", "", [{"role": "user", "content": args.prompt}], "", tools=box.schemas()), ())]
    else:
        cases = read_cases(args.data_path, box, args.limit) if args.data_path else toy_cases(args.toy_level, args.limit)
    model, tokenizer, chats = load(args, run.device)
    if not chats:
        raise ValueError(f"{args.weight} was only pretrained and cannot chat: fine-tune it first (trainer/train_full_sft.py)")
    engine = evaluation_engine(model, tokenizer, run)

    def replies(requests):
        prompts = [encode_prompt(tokenizer, messages, tools, args.open_thinking) for messages, tools in requests]
        opened = "<think>\n" if args.open_thinking else ""  # by the prompt
        return [opened + text for text in greedy_texts(engine, prompts, args.max_new_tokens)]

    ends = hold_all([case.question for case in cases], replies, box.run, args.max_rounds)
    if args.prompt is not None:
        return show(ends[0][1])
    judged = [judge(case, *end, box) for case, end in zip(cases, ends)]
    without = None
    if args.without_tools:
        bare = [replace(case.question, tools=None, calls=()) for case in cases]
        without = [case.is_right(*end) for case, end in zip(cases, hold_all(bare, replies))]
    failed = [(case, messages) for case, verdict, (_, messages) in zip(cases, judged, ends) if not verdict["success"]]
    for case, messages in failed[:args.show]:
        print(f"--- {case.question.skill}: {case.question.answer} was expected")
        show(messages)
    rows = table_of(cases, judged, without)
    print(format_table(rows))
    if args.json:
        write_json(args.json, {"weight": args.weight, "questions": args.data_path or f"toy {args.toy_level}", "rows": rows})


if __name__ == "__main__":
    command(main)
