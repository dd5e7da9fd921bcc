"""Questions for a model that calls tools: from files of rows, with the tools that they offer."""

from dataclasses import dataclass

from dataset.chat.final_answer import contains
from dataset.chat.spellings import read_messages
from dataset.chat.tools import EVERYDAY_TOOLS, ToolBox, everyday_tools, load_tools
from dataset.files.jsonl import find_shards, in_fraction, read_rows
from dataset.prompt_dataset import prompt_row
from dataset.toy.scorer import Question
from dataset.toy.tools import TOY_TOOLS
from scripts.openai_api.client import as_tools
from trainer.runtime.arguments import ROOT


@dataclass(frozen=True)
class Case:
    """A question, the values that its final answer must contain (None: the toy world's scorer
    decides), and the expected calls (None: not known).

    The question of a case with `gt` has no calls: the scorer would run them, with the user's tools.
    """

    question: Question
    gt: tuple[str, ...] | None = None
    calls: tuple[tuple[str, dict], ...] | None = ()

    def is_right(self, right: bool, messages: list[dict]) -> bool:
        """Whether a dialogue answered the question; `right` is the scorer's judgement."""
        if self.gt is None:
            return right
        return all(contains(messages[-1]["content"], value) for value in self.gt)


def read_cases(path: str, limit: int) -> dict[str, Case]:
    """{"path:line": Case} of a file of rows, or of a fraction of it.

    ValueError `path:line: fault. fix`.
    """
    cases = {}
    for shard, fraction in find_shards(path):
        for line_no, row in read_rows(shard):
            if len(cases) == limit:
                return cases
            if not in_fraction(line_no, fraction):
                continue
            try:
                cases[f"{shard}:{line_no}"] = case_of(row)
            except ValueError as error:
                raise ValueError(f"{shard}:{line_no}: {error}") from error
    if not cases:
        raise ValueError(f"{path}: there is no row in that fraction. Give a larger one.")
    return cases


def case_of(row: dict) -> Case:
    """The Case of a row; ValueError for no `gt` or faulty `calls`."""
    from dataset.chat.format import normalize_conversation

    row, _ = prompt_row(row)
    gt, calls = row.get("gt"), row.get("calls")
    if not gt or not isinstance(gt, list) or not all(isinstance(value, str) for value in gt):
        raise ValueError(
            'no "gt" with a list of strings. Give {"conversations": [...], "gt": ["...", ...]}.'
        )
    if calls is not None and not (isinstance(calls, list) and all(map(is_call, calls))):
        raise ValueError(
            '"calls" is no list of calls. Give [{"name": "...", "arguments": {...}}, ...], or '
            "leave it out."
        )
    messages, _ = normalize_conversation(read_messages(row["conversations"]))
    tools = messages[0].pop("tools", None)  # asked with the question, not in its prompt
    tools = as_tools(tools) if tools else None
    language, group = row.get("language", ""), calls[0]["name"] if calls else ""
    question = Question(group, language, messages, ", ".join(gt), tools=tools)
    if calls is not None:
        calls = tuple((call["name"], call["arguments"]) for call in calls)
    return Case(question, tuple(gt), calls)


def open_tools(path: str, cases: dict[str, Case]) -> ToolBox:
    """The tools of a file, by default the toy world's and the everyday ones that cases offer.

    ValueError `path:line: fault. fix` for a case that offers others.
    """
    box = load_tools(path) if path else TOY_TOOLS
    missing = {}  # {name: path:line of the first that offers it}
    for where, case in cases.items():
        for schema in case.question.tools or ():
            if (name := str(schema["function"].get("name"))) not in box.tools:
                missing.setdefault(name, where)
    everyday, file = everyday_tools(missing), EVERYDAY_TOOLS.relative_to(ROOT)
    if everyday and not path:
        print(f"tools of {file}, because rows offer them: {', '.join(missing)}")
        return ToolBox([*box.tools.values(), *everyday])
    if missing:
        where, hint = next(iter(missing.values())), f" ({file} has them)" if everyday else ""
        raise ValueError(
            f"{where}: nobody can run {', '.join(missing)}. Give --tools FILE with functions of "
            f"these names{hint}."
        )
    return box


def is_call(call: object) -> bool:
    """Whether this is {"name": text, "arguments": object}."""
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
    )
