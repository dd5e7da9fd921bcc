"""How well a model uses tools: its calls are read and run, and it sees their results until it
answers.

    python scripts/eval_toolcall.py --weight out/quickstart/full_sft_tiny    # toy questions
    python scripts/eval_toolcall.py --weight full_sft --without_tools \\
        --data_path dataset/toy_mini/agent_heldout.jsonl
    python scripts/eval_toolcall.py --weight full_sft --tools my_tools.py --prompt "12 times 31?"
    python scripts/eval_toolcall.py --backend api --api_base_url http://127.0.0.1:11434/v1

The table has these columns for each tool and over all questions: success, the questions answered
rightly, with its 95% interval; exact, those with exactly the expected calls; no call, those without
any attempt to call; and invalid, the fraction of the attempted calls that could not be made (no
JSON, no such tool, wrong arguments). --without_tools asks the same questions once more with no
tools on offer. dataset/chat/tools.py tells how tools are written.

Rows of --data_path have the format of RL with tools: tools on the system message, the question, and
"gt", the values that the final answer must contain; "calls", [{"name", "arguments"}], are the calls
that are expected, and without them nothing is exact. The tools must be in --tools, or in the toy
world and dataset/chat/everyday_tools.py.

--backend api asks any server with OpenAI's API, several questions at once. The tools run here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval_llm
from dataset.chat.tools import ToolBox
from dataset.toy.rows import question_of_item
from dataset.toy.scorer import GenerateAll, Question, hold_all
from dataset.toy.tools import TOY_TOOLS
from dataset.toy.world import make_world
from model.files import as_typed, write_json
from scripts.checkpoint import WeightArgs
from scripts.openai_api import client as api
from scripts.tool_eval.cases import Case, open_tools, read_cases
from scripts.tool_eval.verdicts import format_table, judge, table_of
from trainer.runtime.arguments import (
    arg,
    check_installed,
    check_not_negative,
    check_positive,
    command,
    parse_args,
)

if TYPE_CHECKING:
    from openai import OpenAI

CONCURRENT = 8  # requests that a server gets at once
API_FLAGS = {"api_base_url", "api_key", "api_model", "stream"}


@dataclass
class ToolEvalArgs(WeightArgs):
    tools: str = arg(
        "", "a Python file with tools of your own (default: the toy world's, everyday tools)"
    )
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
    temperature: float = arg(0.0, "0: greedy decoding")
    top_p: float = arg(1.0, "sample from the most probable tokens that together reach this")
    show_speed: bool = arg(False, "print the tokens per second too")
    backend: str = arg(
        "local", "the model of --weight, or a server with OpenAI's API", choices=["local", "api"]
    )
    api_base_url: str = arg(api.DEFAULT_URL, "api: the server")
    api_key: str = arg("", "api: its key, if it asks for one (default: OPENAI_API_KEY)")
    api_model: str = arg("", "api: the model's name there (default: the first that it serves)")
    stream: bool = arg(
        True, "api: get completions as streams, printed as they come with --prompt; 0: as a whole"
    )
    show: int = arg(0, "print so many of the conversations that failed")
    json: str = arg("", "write the table to this file too")

    def check(self) -> None:
        super().check()
        self.prompt = as_typed(self.prompt)
        check_positive(self, "limit", "max_new_tokens")
        check_not_negative(self, "max_rounds", "show", "temperature")
        self.check_backend()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p}: give a probability above 0, up to 1")
        if "top_p" in self.given and not self.temperature:
            raise ValueError("--top_p has no effect with --temperature 0: leave it out")
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

    def check_backend(self) -> None:
        """ValueError for flags of the other backend."""
        if self.backend == "api":
            check_installed("--backend api", "openai")
        unused = {one.name for one in fields(WeightArgs)} if self.backend == "api" else API_FLAGS
        for name in sorted(unused & self.given):
            raise ValueError(f"--{name} has no effect with --backend {self.backend}: leave it out")


def choose_cases(args: ToolEvalArgs) -> tuple[list[Case], ToolBox]:
    """The Cases of --prompt, of --data_path, or of the toy world's held-out questions for tools;
    and the tools that run.
    """
    if args.prompt is not None:
        box = open_tools(args.tools, {})
        messages = [{"role": "user", "content": args.prompt}]
        return [Case(Question("", "", messages, "", tools=box.schemas()), ())], box
    if args.data_path:
        cases = read_cases(args.data_path, args.limit)
        return list(cases.values()), open_tools(args.tools, cases)
    items = make_world(args.toy_level).items("sft", "tools", "heldout", args.limit)
    questions = map(question_of_item, items)  # half in each language
    cases = [
        Case(replace(asked, skill=asked.calls[0][0]), calls=asked.calls) for asked in questions
    ]
    return cases, TOY_TOOLS


@dataclass
class Speed:
    """Counts the tokens of completions and the seconds that they took, batched as they were."""

    tokens: int = 0
    seconds: float = 0.0

    def timed(
        self, complete: GenerateAll, count: Callable[[str], int] | None = None
    ) -> GenerateAll:
        """`complete`, timed; count: tokens of a completion, if it does not count them itself."""

        def timed(requests):
            start = time.perf_counter()
            texts = complete(requests)
            self.seconds += time.perf_counter() - start
            self.tokens += sum(map(count, texts)) if count else 0
            return texts

        return timed

    def __str__(self) -> str:
        if not self.tokens:
            return "speed: the server does not count its tokens"
        rate = self.tokens / self.seconds
        return f"speed: {rate:.1f} tokens/s ({self.tokens:,} tokens in {self.seconds:.1f} s)"


@contextmanager
def local_model(args: ToolEvalArgs, speed: Speed) -> Iterator[GenerateAll]:
    """What completes requests with the model of --weight. ValueError if it cannot chat."""
    from scripts.toy_benchmark import completer, evaluation_engine
    from trainer.runtime.process import Compute

    run = Compute(args)
    model, tokenizer, chats = eval_llm.load(args, run.device)
    if not chats:
        raise ValueError(
            f"{args.weight} was only pretrained and cannot chat: fine-tune it first "
            "(trainer/train_full_sft.py)"
        )
    engine = evaluation_engine(model, tokenizer, run)
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    complete = completer(engine, args.open_thinking, args.max_new_tokens, **sampling)
    yield speed.timed(complete, lambda text: len(tokenizer(text).input_ids))


@contextmanager
def served_model(args: ToolEvalArgs, speed: Speed) -> Iterator[GenerateAll]:
    """What completes requests with the server of --api_base_url, several at once.

    OSError if nobody answers there, ValueError for whatever the server refuses.
    """
    with api.connected(args.api_base_url, args.api_key) as client:
        args.api_model = args.api_model or api.first_model(client)

        def complete(requests):
            with ThreadPoolExecutor(CONCURRENT) as pool:
                replies = list(pool.map(lambda one: ask_server(client, args, *one), requests))
            speed.tokens += sum(reply.num_tokens or 0 for reply in replies)
            return [reply.as_text() for reply in replies]

        yield speed.timed(complete)


def ask_server(
    client: OpenAI, args: ToolEvalArgs, messages: list[dict], tools: list[dict] | None
) -> api.Reply:
    """The server's reply to a conversation; printed as it comes with --prompt and --stream."""
    options = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    options |= {"top_p": args.top_p} if "top_p" in args.given else {}
    options |= {"tools": tools} if tools else {}
    options |= api.thinking_options(args.open_thinking) | api.as_request(messages)
    if not args.stream:
        return api.read_whole(client.chat.completions.create(model=args.api_model, **options))
    options["stream"] = True
    if args.show_speed:  # not every server knows it
        options["stream_options"] = {"include_usage": True}
    chunks = client.chat.completions.create(model=args.api_model, **options)
    return api.read_stream(chunks, show=args.prompt is not None)


def hold_one(case: Case, complete: GenerateAll, box: ToolBox, args: ToolEvalArgs) -> None:
    """Ask the question of --prompt and print the conversation, or what a stream has not printed."""
    from scripts.toy_benchmark import print_conversation

    def run(name, arguments):
        result = box.run(name, arguments)
        if is_shown:
            print(f"{name}({json.dumps(arguments, ensure_ascii=False)}) -> {result}")
        return result

    is_shown = args.backend == "api" and args.stream
    ((_, messages),) = hold_all([case.question], complete, run, args.max_rounds)
    if not is_shown:
        print_conversation(messages)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(ToolEvalArgs, argv)
    from scripts.toy_benchmark import print_conversation

    (cases, box), speed = choose_cases(args), Speed()
    backend, without = served_model if args.backend == "api" else local_model, None
    with backend(args, speed) as complete:
        if args.prompt is not None:
            hold_one(cases[0], complete, box, args)
            return print(speed) if args.show_speed else None
        ends = hold_all([case.question for case in cases], complete, box.run, args.max_rounds)
        if args.without_tools:
            bare = [replace(case.question, tools=None, calls=()) for case in cases]
            without = [case.is_right(*end) for case, end in zip(cases, hold_all(bare, complete))]
    verdicts = [judge(case, *end, box) for case, end in zip(cases, ends)]
    failed = [i for i, verdict in enumerate(verdicts) if not verdict["success"]]
    for i in failed[: args.show]:
        question = cases[i].question
        print(f"--- {question.skill}: {question.answer} was expected")
        print_conversation(ends[i][1])
    rows = table_of(cases, verdicts, without)
    print(format_table(rows))
    if args.show_speed:
        print(speed)
    if args.json:
        questions = args.data_path or f"toy {args.toy_level}"
        model = {"weight": args.weight}
        if args.backend == "api":
            model = {"model": args.api_model, "api_base_url": args.api_base_url}
        write_json(args.json, {**model, "questions": questions, "rows": rows})


if __name__ == "__main__":
    command(main)
