"""How well a model uses tools: its calls are read and run, and it sees their results until it
answers.

    python scripts/eval_toolcall.py --weight out/quickstart/full_sft_tiny    # toy questions
    python scripts/eval_toolcall.py --weight full_sft --without_tools \\
        --data_path dataset/toy_mini/agent_heldout.jsonl
    python scripts/eval_toolcall.py --weight full_sft --tools my_tools.py --prompt "12 times 31?"

The table has these columns for each tool and over all questions: success, the questions answered
rightly, with its 95% interval; exact, those with exactly the expected calls; no call, those without
any attempt to call; and invalid, the fraction of the attempted calls that could not be made (no
JSON, no such tool, wrong arguments). --without_tools asks the same questions once more with no
tools on offer. dataset/chat/tools.py tells how tools are written.

Rows of --data_path have the format of RL with tools: tools on the system message, the question, and
"gt", the values that the final answer must contain; "calls", [{"name", "arguments"}], are the calls
that are expected. The tools must be in --tools, or in the toy world.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval_llm
from dataset.chat.final_answer import contains
from dataset.chat.reply import CALL
from dataset.chat.tools import ToolBox, load_tools
from dataset.files.jsonl import find_shards, in_fraction, read_rows
from dataset.toy.rows import question_of_item
from dataset.toy.scorer import Question, hold_all, wilson
from dataset.toy.tools import TOY_TOOLS
from dataset.toy.world import make_world
from model.files import as_typed, write_json
from scripts.checkpoint import WeightArgs
from trainer.runtime.arguments import arg, check_not_negative, check_positive, command, parse_args


@dataclass
class ToolEvalArgs(WeightArgs):
    tools: str = arg("", "a Python file with tools of your own (default: those of the toy world)")
    prompt: str | None = arg(None, "ask this one question and print the conversation")
    data_path: str = arg(
        "",
        "ask the questions of this file of rows; FILE@0.4: of that fraction of its rows (default: "
        "the toy world's held-out questions)",
    )
    toy_level: str = arg("mini", "which toy world", choices=["mini", "full"])
    limit: int = arg(100, "ask at most so many questions")
    without_tools: bool = arg(False, "ask them without any tools too")
    max_rounds: int = arg(3, "how often the model sees the results of its calls")
    open_thinking: bool | None = arg(
        None, "1: think before each completion, 0: answer at once (default: the model decides)"
    )
    max_new_tokens: int = arg(256, "longest completion, in tokens")
    show: int = arg(0, "print so many of the conversations that failed")
    json: str = arg("", "write the table to this file too")

    def check(self) -> None:
        self.prompt = as_typed(self.prompt)
        check_positive(self, "limit", "max_new_tokens")
        check_not_negative(self, "max_rounds", "show")
        if self.tools and self.prompt is None and not self.data_path:
            raise ValueError(
                "--tools FILE needs questions for these tools: give --prompt TEXT or --data_path "
                "FILE"
            )
        chosen, unused = "data_path", {"toy_level"} if self.data_path else set()
        if self.prompt is not None:
            chosen = "prompt"
            unused = {"data_path", "toy_level", "limit", "without_tools", "show", "json"}
        for name in sorted(unused & self.given):
            raise ValueError(f"--{name} has no effect with --{chosen}: leave it out")


@dataclass(frozen=True)
class Case:
    """A question, the values that its final answer must contain (None: the toy world's scorer
    decides), and the expected calls.

    The question of a case with `gt` has no calls: the scorer would run them, with the user's tools.
    """

    question: Question
    gt: tuple[str, ...] | None = None
    calls: tuple[tuple[str, dict], ...] = ()

    def is_right(self, right: bool, messages: list[dict]) -> bool:
        """Whether a dialogue answered the question; `right` is the scorer's judgement."""
        if self.gt is None:
            return right
        return all(contains(messages[-1]["content"], value) for value in self.gt)


def read_cases(path: str, box: ToolBox, limit: int) -> list[Case]:
    """The Cases of a file of rows, or of a fraction of it. ValueError `path:line: fault. fix`."""
    cases = []
    for shard, fraction in find_shards(path):
        for line_no, row in read_rows(shard):
            if len(cases) == limit:
                return cases
            if not in_fraction(line_no, fraction):
                continue
            try:
                cases.append(case_of(row, box))
            except ValueError as error:
                raise ValueError(f"{shard}:{line_no}: {error}") from error
    if not cases:
        raise ValueError(f"{path}: there is no row in that fraction. Give a larger one.")
    return cases


def case_of(row: dict, box: ToolBox) -> Case:
    """The Case of a row; ValueError for no `gt`, faulty `calls`, or tools that are not in `box`."""
    from dataset.chat.format import check_conversation, normalize_conversation

    gt = row.get("gt")
    if not isinstance(gt, list) or not all(isinstance(value, str) for value in gt):
        raise ValueError(
            'no "gt" with a list of strings. Give {"conversations": [...], "gt": ["...", ...]}.'
        )
    check_conversation(row.get("conversations"))
    messages, _ = normalize_conversation(row["conversations"])
    tools = messages[0].pop("tools", None) or []  # asked with the question, not in its prompt
    names = [schema.get("function", schema).get("name") for schema in tools]
    if unknown := [str(name) for name in names if name not in box.tools]:
        raise ValueError(
            f"nobody can run {', '.join(unknown)}. Give --tools FILE with functions of these names."
        )
    calls = row.get("calls") or []
    if not isinstance(calls, list) or not all(map(is_call, calls)):
        raise ValueError(
            '"calls" is no list of calls. Give [{"name": "...", "arguments": {...}}, ...], or '
            "leave it out."
        )
    language, group = row.get("language", ""), calls[0]["name"] if calls else ""
    question = Question(group, language, messages, ", ".join(gt), tools=tools or None)
    return Case(question, tuple(gt), tuple((call["name"], call["arguments"]) for call in calls))


def is_call(call: object) -> bool:
    """Whether this is {"name": text, "arguments": object}."""
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
    )


def same_calls(made: list[tuple], wanted: list[tuple]) -> bool:
    """Whether two lists of (name, arguments) are the same but for their order."""
    return len(made) == len(wanted) and all(
        made.count(call) == wanted.count(call) for call in wanted
    )


def judge(case: Case, right: bool, messages: list[dict], box: ToolBox) -> dict:
    """The verdict on a dialogue: {"success", "exact", "no_call": bool, "calls": attempted ones,
    "invalid": how many of these could not be made}.
    """
    completions = [message for message in messages if message["role"] == "assistant"]
    calls = [
        (call["name"], call["arguments"])
        for message in completions
        for call in message.get("tool_calls", ())
    ]
    # the content still holds a call that could not be read
    broken = sum(message["content"].count(CALL) for message in completions)
    return {
        "success": case.is_right(right, messages),
        "exact": same_calls(calls, list(case.calls)) and not broken,
        "no_call": not calls and not broken,
        "calls": len(calls) + broken,
        "invalid": broken + sum(box.fault(*call) is not None for call in calls),
    }


def table_of(
    cases: list[Case], verdicts: list[dict], without: list[bool] | None = None
) -> list[dict]:
    """One row per tool, then "overall": n, success with low and high (95%), exact, no_call, calls,
    invalid (fraction of the calls), and without_tools if it was measured.
    """
    rows, tools = [], [case.question.skill for case in cases]
    for tool in [*dict.fromkeys(tools), "overall"]:
        indices = [i for i, name in enumerate(tools) if tool in (name, "overall")]
        n = len(indices)
        total = {key: sum(verdicts[i][key] for i in indices) for key in verdicts[0]}
        low, high = wilson(total["success"], n)
        row = {"tool": tool or "any", "n": n, "success": total["success"] / n}
        row |= {"low": low, "high": high}
        row |= {"exact": total["exact"] / n, "no_call": total["no_call"] / n}
        row |= {"calls": total["calls"], "invalid": total["invalid"] / max(total["calls"], 1)}
        if without:
            row["without_tools"] = sum(without[i] for i in indices) / n
        rows.append(row)
    return rows


def format_table(rows: list[dict]) -> str:
    """The table as aligned text, fractions in percent."""
    names = ["success", "low", "high", "exact", "no_call", "invalid"]
    names += ["without_tools"] if "without_tools" in rows[0] else []
    widths = {name: max(9, len(name) + 2) for name in names}
    titles = "".join(f"{name.replace('_', ' '):>{width}}" for name, width in widths.items())
    lines = [f"{'tool':<16}{'n':>5}{titles}"]
    for row in rows:
        cells = "".join(f"{100 * row[name]:>{width - 1}.1f}%" for name, width in widths.items())
        lines.append(f"{row['tool']:<16}{row['n']:>5}{cells}")
    return "\n".join(lines)


def choose_cases(args: ToolEvalArgs, box: ToolBox) -> list[Case]:
    """The Cases of --prompt, of --data_path, or of the toy world's held-out questions for tools."""
    if args.prompt is not None:
        messages = [{"role": "user", "content": args.prompt}]
        return [Case(Question("", "", messages, "", tools=box.schemas()), ())]
    if args.data_path:
        return read_cases(args.data_path, box, args.limit)
    items = make_world(args.toy_level).items("sft", "tools", "heldout", args.limit)
    questions = map(question_of_item, items)  # half in each language
    return [Case(replace(asked, skill=asked.calls[0][0]), calls=asked.calls) for asked in questions]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(ToolEvalArgs, argv)
    from scripts.toy_benchmark import completer, evaluation_engine, print_conversation
    from trainer.runtime.process import Compute

    run = Compute(args)
    box = load_tools(args.tools) if args.tools else TOY_TOOLS
    cases = choose_cases(args, box)
    model, tokenizer, chats = eval_llm.load(args, run.device)
    if not chats:
        raise ValueError(
            f"{args.weight} was only pretrained and cannot chat: fine-tune it first "
            "(trainer/train_full_sft.py)"
        )
    engine = evaluation_engine(model, tokenizer, run)
    complete = completer(engine, args.open_thinking, args.max_new_tokens)
    ends = hold_all([case.question for case in cases], complete, box.run, args.max_rounds)
    if args.prompt is not None:
        return print_conversation(ends[0][1])
    verdicts = [judge(case, *end, box) for case, end in zip(cases, ends)]
    without = None
    if args.without_tools:
        bare = [replace(case.question, tools=None, calls=()) for case in cases]
        without = [case.is_right(*end) for case, end in zip(cases, hold_all(bare, complete))]
    failed = [i for i, verdict in enumerate(verdicts) if not verdict["success"]]
    for i in failed[: args.show]:
        question = cases[i].question
        print(f"--- {question.skill}: {question.answer} was expected")
        print_conversation(ends[i][1])
    rows = table_of(cases, verdicts, without)
    print(format_table(rows))
    if args.json:
        questions = args.data_path or f"toy {args.toy_level}"
        write_json(args.json, {"weight": args.weight, "questions": questions, "rows": rows})


if __name__ == "__main__":
    command(main)
