"""Rewards of reinforcement learning: how good a completion is, `--rewards NAME=WEIGHT ...`.

A verifiable reward asks no opinion: a program compares the completion with the row of data, or
looks at its form. Nobody can talk it round, as a reward model, but a policy can exploit whatever it
overlooks: watch the transcripts. The reward of a sample is the weighted sum of its parts; each part
is logged by its name, unweighted.

    answer         1 if the final answer is the row's: for rows of the toy world (with "skill" and
                   "language") and rows with "choices", the texts that "answer" competes with, as
                   dataset/chat/final_answer.py reads it, so that it is the accuracy on held-out
                   questions; else all values of "gt" must occur in it; else trainer/rl/graders.py
                   compares it with "answer" as maths
    format         1 if the completion ended by itself, with a non-empty answer after at most one
                   closed reasoning, and no stray special token
    think          1 if exactly one non-empty reasoning stands before a non-empty answer
    length         minus the sampled tokens, of all turns of an episode, in units of
                   --max_completion_length
    overlong       from 0 to -1 over the last --overlong_buffer tokens before
                   --max_completion_length, of the longest turn (Yu et al. 2025, DAPO, eq. 13)
    repetition     minus the fraction of the sampled 3-grams of tokens that were there before
    tools          fraction of the row's "calls" that were made; where none is needed, 1 if none was
                   tried, else 0; in a row with tools and "gt" but without "calls", with one
                   expected call for each value of "gt":
                   1 - (|valid - expected| + invalid) / expected, at least 0
    valid_calls    fraction of the attempted calls that name a tool on offer and fit its arguments;
                   1 if there were none
    FILE.py:NAME   the user's own function: NAME(text, row) -> number, of the (last) completion with
                   its special tokens and the row of data
    model:FOLDER   a reward model: of train_reward.py, or any sequence classifier of transformers
                   with one label
    model!:FOLDER  a reward model with get_scores or get_score in its folder's code
                   (InternLM2-Reward's way): that code is run
    judge:URL#MODEL  a grade from 0 to 10 by a model behind OpenAI's API, divided by 10; the key is
                     OPENAI_API_KEY
"""

import json
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat.final_answer import contains, is_correct, normalise, to_number
from dataset.chat.format import normalize_conversation
from dataset.chat.reply import CALL
from dataset.chat.tools import Tool, ToolBox
from trainer.rl.arguments import SOURCES, reward_weights
from trainer.rl.graders import is_right
from trainer.rl.reward_sources import Reward, function_reward, judge_reward, model_reward
from trainer.rl.rollout import Sample, final_answer, last_message
from trainer.runtime.run import Run


class Context(NamedTuple):
    """The parts of a run that a reward needs, besides the sample.

    special_tokens: the tokenizer's, as text. pure_tools: tools without side effects, which a reward
    may run to compare two calls by their results.
    """

    max_completion_length: int
    overlong_buffer: int
    special_tokens: tuple[str, ...]
    pure_tools: ToolBox


def tools_of(row: dict) -> dict[str, dict]:
    """The schemas of the tools that a row offers, {name: {"name", "parameters", ...}}."""
    messages, _ = normalize_conversation(row["conversations"][:1])
    tools = [
        json.loads(tool) if isinstance(tool, str) else tool
        for tool in messages[0].get("tools") or []
    ]
    return {tool["name"]: tool for tool in (tool.get("function", tool) for tool in tools)}


def written_messages(sample: Sample) -> list[dict]:
    """The messages that the model wrote."""
    answers = sample.messages[len(sample.row["conversations"]) :]
    return [message for message in answers if message["role"] == "assistant"]


def answer(sample: Sample, context: Context) -> float:
    """1.0 if the final answer is the row's."""
    row, text = sample.row, final_answer(sample)
    if "answer" in row and (row.get("choices") or {"skill", "language"} <= row.keys()):
        choices, has_calls = row.get("choices") or (), bool(row.get("calls"))
        return float(is_correct(text, str(row["answer"]), choices, has_calls))
    if row.get("gt"):
        return float(all(contains(text, value) for value in row["gt"]))
    return float(is_right(str(row["answer"]), text))


def check_row(row: dict, names: Iterable[str]) -> None:
    """ValueError "what is wrong. fix" unless these rewards can judge completions of a row."""
    if "answer" in names:
        check_answer(row)
    if {"tools", "valid_calls"} & set(names):
        try:
            tools_of(row)
            needed_calls(row)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f'its tools or "calls" cannot be read ({type(error).__name__}: {error}). Tools are '
                '{"type": "function", "function": {"name", "description", "parameters"}}, calls '
                '{"name", "arguments"}'
            ) from error


def check_answer(row: dict) -> None:
    """ValueError "what is wrong. fix" unless a row says which answer is right."""
    answer, gt, choices = row.get("answer"), row.get("gt"), row.get("choices")
    is_texts = isinstance(gt, list) and all(isinstance(x, str) and x.strip() for x in gt)
    if gt and not is_texts:
        raise ValueError(
            f'"gt" is {gt!r}: give a list of texts; for calls, take --rewards tools=1 in place of '
            "answer"
        )
    is_value = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if not gt and not (is_value and str(answer).strip()):
        fault = f'neither "answer" nor "gt" among the keys {list(row)}'
        for name in ("gt", "answer"):
            fault = f'"{name}" is {row[name]!r}' if name in row else fault
        raise ValueError(
            f"{fault}: nothing tells whether a completion is right. Give a text or a number as "
            '"answer", or --rewards without answer, such as model:FOLDER=1 (a reward model)'
        )
    if choices and str(answer) not in choices:
        raise ValueError(
            f'"answer" is {answer!r}, which is not among the "choices" {choices!r}. Give the text '
            'of the right one, or another name than "choices"'
        )


def needed_calls(row: dict) -> list[tuple[str, dict]]:
    """[(name, arguments)] of the calls that a row asks for."""
    needed = row.get("calls") or [call for call in row.get("gt") or () if isinstance(call, dict)]
    return [(call["name"], call["arguments"]) for call in needed]


def turns_of(sample: Sample) -> list[list[int]]:
    """The sampled tokens of each turn: between them stands what the environment wrote."""
    return [
        [token for token, _ in run]
        for is_sampled, run in groupby(zip(sample.tokens, sample.is_sampled), lambda x: x[1])
        if is_sampled
    ]


def well_formed(sample: Sample, context: Context) -> float:
    """1.0 if the completion has ended by itself, has an answer, and no message of the conversation
    holds a special token out of its place.
    """
    texts = [
        text
        for message in written_messages(sample)
        for text in (message["content"], message.get("reasoning_content", ""))
    ]
    # faulty calls and a second reasoning have stayed in the content
    is_stray = any(special in text for special in context.special_tokens for text in texts)
    return float(sample.is_complete and not is_stray and bool(final_answer(sample)))


def think(sample: Sample, context: Context) -> float:
    """1.0 if the last completion has one reasoning, closed and not empty, and then an answer."""
    reasoning = last_message(sample).get("reasoning_content", "").strip()
    is_single = sample.text.count("<think>") == sample.text.count("</think>") == 1
    return float(bool(is_single and reasoning and final_answer(sample)))


def length(sample: Sample, context: Context) -> float:
    """Minus the number of sampled tokens, in units of the longest completion."""
    return -sum(sample.is_sampled) / context.max_completion_length


def overlong(sample: Sample, context: Context) -> float:
    """DAPO's soft punishment (eq. 13): 0 up to L_max - buffer tokens, then down to -1 at L_max."""
    longest = max(map(len, turns_of(sample)), default=0)
    room = context.max_completion_length - context.overlong_buffer - longest
    return max(-1.0, min(0, room) / context.overlong_buffer)


def repetition(sample: Sample, context: Context) -> float:
    """Minus the fraction of 3-grams that repeat an earlier one; none spans two turns."""
    grams = [gram for turn in turns_of(sample) for gram in zip(turn, turn[1:], turn[2:])]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def attempted_calls(sample: Sample) -> tuple[list[tuple[str, dict]], int]:
    """([(name, arguments)] of the calls that were made, how many attempts were malformed)."""
    messages = written_messages(sample)
    calls = [
        (call["name"], call["arguments"])
        for message in messages
        for call in message.get("tool_calls", ())
    ]
    return calls, sum(message["content"].count(CALL) for message in messages)  # left as content


def tools(sample: Sample, context: Context) -> float:
    """The fraction of the needed calls that were made, in any order.

    Needed are those in "calls", or the calls in "gt". If the row has neither, each value of "gt" is
    expected to take one valid call.
    """
    row, needed = sample.row, needed_calls(sample.row)
    made, broken = attempted_calls(sample)
    if not needed and row.get("calls") is None and row.get("gt") and tools_of(row):
        expected, valid = len(row["gt"]), num_valid(sample)
        gap = abs(valid - expected) + len(made) + broken - valid
        return max(0.0, 1 - gap / expected)
    if not needed:
        return float(not made and not broken)
    offered = tools_of(sample.row)
    made = [as_compared(call, offered, context.pure_tools) for call in made]
    found = [as_compared(call, offered, context.pure_tools) in made for call in needed]
    return sum(found) / len(needed)


def as_compared(
    call: tuple[str, dict], offered: dict[str, dict], pure_tools: ToolBox
) -> tuple[str, Any]:
    """Equal for two calls that do the same: the result of a pure tool, else name and arguments."""
    name, arguments = call
    pure = pure_tools.tools.get(name)
    if pure and offered.get(name) == pure.schema["function"]:
        return name, pure_tools.run(name, arguments)
    return name, plain_value(arguments)  # running a tool of the user's once more could do anything


def plain_value(value: Any) -> Any:
    """A JSON value for comparison: numbers in texts as numbers, texts without capitals and outer
    spaces.
    """
    if isinstance(value, dict):
        return {key: plain_value(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain_value(one) for one in value]
    if isinstance(value, float):
        return Fraction(str(value)) if math.isfinite(value) else value
    if not isinstance(value, str):
        return value
    text = normalise(value).strip().casefold()
    number = to_number(text)
    return text if number is None else number


def valid_calls(sample: Sample, context: Context) -> float:
    """The fraction of the attempted calls that can be made with the tools on offer."""
    calls, broken = attempted_calls(sample)
    attempts = len(calls) + broken
    return num_valid(sample) / attempts if attempts else 1.0


def num_valid(sample: Sample) -> int:
    """How many of the attempted calls can be made with the tools on offer."""
    schemas = [
        {**tool, "parameters": {"properties": {}, **(tool.get("parameters") or {})}}
        for tool in tools_of(sample.row).values()
    ]
    box = ToolBox(Tool({"type": "function", "function": schema}, None) for schema in schemas)
    return sum(box.fault(*call) is None for call in attempted_calls(sample)[0])


REWARDS = {
    "answer": answer,
    "format": well_formed,
    "think": think,
    "length": length,
    "overlong": overlong,
    "repetition": repetition,
    "tools": tools,
    "valid_calls": valid_calls,
}
MAKERS = {"function": function_reward, "model": model_reward, "judge": judge_reward}


class Rewards:
    """The rewards of --rewards. `rewards(samples)` -> (totals, {name: parts}), lists of floats as
    long as `samples`.

    pure_tools: see Context. ValueError for a mistake in the flag, and where a sample cannot be
    judged.
    """

    def __init__(
        self, run: Run, tokenizer: PreTrainedTokenizerBase, pure_tools: ToolBox | None = None
    ):
        args = run.args
        self.weights = reward_weights(args)
        special = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        self.context = Context(
            args.max_completion_length, args.overlong_buffer, special, pure_tools or ToolBox()
        )
        self.parts = {name: self.part(name, run.device) for name in self.weights}

    def part(self, name: str, device: torch.device) -> Reward:
        """The function samples -> numbers of a name."""
        if name in REWARDS:
            return lambda samples: [REWARDS[name](sample, self.context) for sample in samples]
        for kind, pattern in SOURCES.items():
            if match := re.fullmatch(pattern, name):
                return MAKERS[kind](*match.groups(), device)
        raise AssertionError(name)

    def __call__(self, samples: list[Sample]) -> tuple[list[float], dict[str, list[float]]]:
        """Judge samples, which may be none."""
        parts = {name: part(samples) if samples else [] for name, part in self.parts.items()}
        totals = [
            sum(self.weights[name] * values[i] for name, values in parts.items())
            for i in range(len(samples))
        ]
        return totals, parts

    def rate(self, samples: list[Sample]) -> list[Sample]:
        """The samples, with their rewards noted in them: {name of a part: number, "total": sum}."""
        totals, parts = self(samples)
        for i, sample in enumerate(samples):
            sample.rewards = {name: values[i] for name, values in parts.items()}
            sample.rewards["total"] = totals[i]
        return samples
