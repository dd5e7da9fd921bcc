"""Questions of the toy world for a model: the protocol, the scorer and the table of accuracies."""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from dataset.chat.final_answer import is_correct, normalise
from dataset.chat.reply import assistant_message, strip_thinking
from dataset.toy.tools import run_tool

MAX_TOOL_ROUNDS = 3
Request = tuple[list[dict], list[dict] | None]  # messages, tools
Generate = Callable[[list[dict], list[dict] | None], str]  # one completion
GenerateAll = Callable[[list[Request]], list[str]]  # completions, in order
RunTool = Callable[[str, dict], str]  # name, arguments -> JSON


@dataclass(frozen=True)
class Question:
    """A held-out question. `messages` is the prompt; `follow_ups` are later user turns; `calls` the
    tool calls (name, arguments) that must be made; `tools` the schemas on offer, None if there are
    none."""

    skill: str
    language: str
    messages: list[dict]
    answer: str
    chance: float = 0.0
    choices: tuple[str, ...] = ()
    manners: tuple[str, ...] = ()
    tools: list[dict] | None = None
    calls: tuple[tuple[str, dict], ...] = ()
    follow_ups: tuple[str, ...] = ()
    key: str = ""


def score(question: Question, completion: str) -> bool:
    """Whether the final answer is right (see `is_correct`), with one of the manners asked for."""
    said = normalise(strip_thinking(completion))
    if question.manners and not any(phrase in said for phrase in question.manners):
        return False
    return is_correct(completion, question.answer, question.choices, bool(question.calls))


def dialogue(
    question: Question, run: RunTool = run_tool, max_rounds: int = MAX_TOOL_ROUNDS
) -> Generator[Request, str, tuple[bool, list[dict]]]:
    """The conversation of a question: yields (messages, tools), is sent the assistant's completion,
    and in the end returns (was it answered rightly, the messages).

    Tool calls in a completion are run and their results appended, at most `max_rounds` times per
    turn; follow-up questions come after the model's own completions. A question with tools is right
    only if the calls it needs were made, in whatever spelling gives their result.
    """
    messages, made = list(question.messages), set()
    for turn in (None, *question.follow_ups):
        if turn is not None:
            messages.append({"role": "user", "content": turn})
        for rounds_left in reversed(range(max_rounds + 1)):
            completion = yield list(messages), question.tools
            messages.append(assistant_message(completion, bool(question.tools)))
            if "tool_calls" not in messages[-1] or not rounds_left:
                break
            for call in messages[-1]["tool_calls"]:
                result = run(call["name"], call["arguments"])
                made.add((call["name"], result))
                messages.append({"role": "tool", "content": result})
    needed = {(name, run(name, arguments)) for name, arguments in question.calls}
    return needed <= made and score(question, messages[-1]["content"]), messages


def ask(question: Question, generate: Generate) -> tuple[bool, list[dict]]:
    """Hold the dialogue of one question with `generate(messages, tools) -> completion`."""
    return hold_all([question], lambda requests: [generate(*requests[0])])[0]


def hold_all(
    questions: Iterable[Question],
    generate_all: GenerateAll,
    run: RunTool = run_tool,
    max_rounds: int = MAX_TOOL_ROUNDS,
) -> list[tuple[bool, list[dict]]]:
    """Hold all dialogues in batches and return the result of each."""
    talks = [dialogue(question, run, max_rounds) for question in questions]
    waiting, ends = {i: next(talk) for i, talk in enumerate(talks)}, {}
    while waiting:
        completions = dict(zip(waiting, generate_all(list(waiting.values())), strict=True))
        for i, completion in completions.items():
            try:
                waiting[i] = talks[i].send(completion)
            except StopIteration as end:
                ends[i] = end.value
                del waiting[i]
    return [ends[i] for i in range(len(talks))]


def ask_all(
    questions: Iterable[Question], generate_all: GenerateAll
) -> list[tuple[Question, bool]]:
    """Each question with whether it was answered rightly; see `hold_all`."""
    questions = list(questions)
    ends = hold_all(questions, generate_all)
    return [(question, right) for question, (right, _) in zip(questions, ends)]


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a ratio (E. B. Wilson, 1927); (0, 1) for no trials."""
    if n == 0:
        return 0.0, 1.0
    ratio = correct / n
    middle = (ratio + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(ratio * (1 - ratio) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_table(results: Iterable[tuple[Question, bool]]) -> list[dict]:
    """A row per skill, then "overall": skill, n, accuracy, mean chance, low and high (95%)."""
    results = list(results)
    groups = defaultdict(list)
    for question, correct in results:
        groups[question.skill].append((question, correct))
    rows = []
    for skill, group in [*groups.items(), ("overall", results)]:
        n, right = len(group), sum(correct for _, correct in group)
        low, high = wilson(right, n)
        chance = sum(question.chance for question, _ in group) / max(n, 1)
        row = {"skill": skill, "n": n, "accuracy": right / max(n, 1), "chance": chance}
        rows.append({**row, "low": low, "high": high})
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows of `accuracy_table` as aligned text, in percent."""
    lines = [f"{'skill':<14} {'n':>5} {'accuracy':>9} {'chance':>7}  95% interval"]
    for row in rows:
        accuracy, chance, low, high = (
            f"{100 * row[name]:.1f}" for name in ("accuracy", "chance", "low", "high")
        )
        numbers = f"{row['n']:>5} {accuracy:>8}% {chance:>6}%  {low} to {high}"
        lines.append(f"{row['skill']:<14} {numbers}")
    return "\n".join(lines)
