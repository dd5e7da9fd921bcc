"""Rewards of reinforcement learning: what an answer is worth, `--rewards NAME=WEIGHT ...`.

A verifiable reward asks no opinion: a program compares the answer with what the row of data says, or looks at the answer's
form. It cannot be talked round, as a reward model can, but it can be cheated by whatever it overlooks: watch the transcripts.
The reward of a sample is the weighted sum of its parts; each part is logged by its name, unweighted.

    answer         1 if the final answer is the row's: by the toy world's scorer for its rows (with "skill" and "language"), so
                   that it is the accuracy on held-out questions, and where "choices" are the texts that "answer" competes with;
                   else all values of "gt" must occur in it; else trainer/answers.py compares it with "answer" as maths
    format         1 if the reply ended by itself, with a non-empty answer after at most one closed thought, and no stray mark
    think          1 if exactly one non-empty thought stands before a non-empty answer
    length         minus the sampled tokens, of all replies of an episode, in units of --max_new_tokens
    overlong       from 0 to -1 over the last --overlong_buffer tokens before --max_new_tokens, of the longest reply (Yu et al.
                   2025, "DAPO", equation 13)
    repetition     minus the share of the sampled 3-grams of tokens that were there before
    tools          share of the row's "calls" that were made; where none is needed, 1 if none was tried, else 0
    valid_calls    share of the attempted calls that name a tool on offer and fit its arguments; 1 if there were none
    FILE.py:NAME   the user's own function: NAME(text, row) -> number, of the (last) reply with its marks and the row of data
    model:FOLDER   a reward model: of train_reward.py, or any sequence classifier of transformers with one label
    model!:FOLDER  a reward model with get_scores or get_score in its folder's code (InternLM2-Reward's way): that code is run
    judge:URL#MODEL  a grade from 0 to 10 by a model behind OpenAI's API, divided by 10; the key is OPENAI_API_KEY
"""

import json
import math
import re
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from dataset.chat_format import normalize_conversation
from dataset.chat_reply import CALL
from dataset.tools import Tool, ToolBox
from dataset.toy_scorer import assistant_message, contains, normalise, score, strip_thinking, to_number
from dataset.toy_tools import TOY_TOOLS
from dataset.toy_world import question_of_row
from trainer.answers import is_right
from trainer.reward_sources import function_reward, judge_reward, model_reward


class Limits(NamedTuple):
    """What a reward needs to know of the run, besides the sample. marks: the spellings of the tokenizer's special tokens."""

    max_new_tokens: int
    overlong_buffer: int
    marks: tuple[str, ...]


def tools_of(row):
    """The schemas of the tools that a row offers, {name: {"name", "parameters", ...}}."""
    messages, _ = normalize_conversation(row["conversations"][:1])
    tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in messages[0].get("tools") or []]
    return {tool["name"]: tool for tool in (tool.get("function", tool) for tool in tools)}


def last_reply(sample):
    """The last reply as a message: content, reasoning_content, tool_calls."""
    return assistant_message(sample.text, bool(sample.row["conversations"][0].get("tools")))


def final_answer(sample):
    """The last reply without its thought and its calls; empty if the thought never ends."""
    return strip_thinking(last_reply(sample)["content"])


def replies(sample):
    """The messages that the model wrote."""
    return [message for message in sample.messages[len(sample.row["conversations"]):] if message["role"] == "assistant"]


def answer(sample, limits):
    """1.0 if the final answer is the row's. ValueError if the row has none."""
    row, reply = sample.row, final_answer(sample)
    if "answer" in row and (row.get("choices") or {"skill", "language"} <= row.keys()):
        return float(score(question_of_row({**row, "answer": str(row["answer"])}), reply))
    if row.get("gt"):
        return float(all(contains(reply, value) for value in row["gt"]))
    return float(is_right(str(row["answer"]), reply))


def check_row(row, names):
    """ValueError "what is wrong. way out" unless these rewards can judge answers to a row of data."""
    if "answer" in names:
        answer, gt, choices = row.get("answer"), row.get("gt"), row.get("choices")
        if gt and not (isinstance(gt, list) and all(isinstance(value, str) and value.strip() for value in gt)):
            raise ValueError(f'"gt" is {gt!r}: give a list of texts; for calls, take --rewards tools=1 in place of answer')
        if not gt and (isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip()):
            what = f'"answer" is {answer!r}' if "answer" in row else f'neither "answer" nor "gt" among the keys {list(row)}'
            raise ValueError(f"{what}: nothing tells whether a reply is right. Give a text or a number as \"answer\", or "
                             "--rewards without answer")
        if choices and str(answer) not in choices:
            raise ValueError(f'"answer" is {answer!r}, which is not among the "choices" {choices!r}. Give the text of the right '
                             'one, or another name than "choices"')
    if {"tools", "valid_calls"} & set(names):
        try:
            tools_of(row)
            needed_calls(row)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f'its tools or "calls" cannot be read ({type(error).__name__}: {error}). Tools are {{"type": '
                             '"function", "function": {"name", "description", "parameters"}}, calls {"name", "arguments"}'
                             ) from error


def needed_calls(row):
    """[(name, arguments)] of the calls that a row asks for."""
    needed = row.get("calls") or [call for call in row.get("gt") or () if isinstance(call, dict)]
    return [(call["name"], call["arguments"]) for call in needed]


def runs_of(sample):
    """The tokens of each reply, as lists: what stands between them the environment wrote."""
    return [[token for token, _ in run] for is_sampled, run in groupby(zip(sample.tokens, sample.is_sampled), lambda x: x[1])
            if is_sampled]


def well_formed(sample, limits):
    """1.0 if the reply is complete, has an answer, and nothing in any reply of the conversation is a mark out of its place."""
    texts = [text for message in replies(sample) for text in (message["content"], message.get("reasoning_content", ""))]
    is_stray = any(mark in text for mark in limits.marks for text in texts)  # faulty calls and second thoughts remain there
    return float(sample.is_complete and not is_stray and bool(final_answer(sample)))


def think(sample, limits):
    """1.0 if the last reply has one thought, which is closed and not empty, and an answer after it."""
    thought = last_reply(sample).get("reasoning_content", "").strip()
    is_single = sample.text.count("<think>") == sample.text.count("</think>") == 1
    return float(bool(is_single and thought and final_answer(sample)))


def length(sample, limits):
    """Minus the number of sampled tokens, in units of the longest answer."""
    return -sum(sample.is_sampled) / limits.max_new_tokens


def overlong(sample, limits):
    """DAPO's soft punishment (equation 13): 0 up to L_max - buffer tokens, then falling in a line to -1 at L_max."""
    longest = max(map(len, runs_of(sample)), default=0)
    return max(-1.0, min(0, limits.max_new_tokens - limits.overlong_buffer - longest) / limits.overlong_buffer)


def repetition(sample, limits):
    """Minus the share of 3-grams that repeat an earlier one; none reaches over what the environment wrote."""
    grams = [gram for run in runs_of(sample) for gram in zip(run, run[1:], run[2:])]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def attempted_calls(sample):
    """(the calls that were made, [(name, arguments)]; how many attempts were no well-formed call)."""
    said = replies(sample)
    calls = [(call["name"], call["arguments"]) for message in said for call in message.get("tool_calls", ())]
    return calls, sum(message["content"].count(CALL) for message in said)  # what is no call has remained content


def tools(sample, limits):
    """The share of the needed calls that were made, in any order. What they are: "calls", or calls in "gt"."""
    needed = needed_calls(sample.row)
    made, broken = attempted_calls(sample)
    if not needed:
        return float(not made and not broken)
    offered = tools_of(sample.row)
    made = [as_compared(call, offered) for call in made]
    return sum(as_compared(call, offered) in made for call in needed) / len(needed)


def as_compared(call, offered):
    """What two calls have in common that do the same: a tool of the toy world's result, else name and arguments."""
    name, arguments = call
    if name in TOY_TOOLS.tools and offered.get(name) == TOY_TOOLS.tools[name].schema["function"]:
        return name, TOY_TOOLS.run(name, arguments)
    return name, plain_value(arguments)  # running a tool of the user's once more could do anything


def plain_value(value):
    """A JSON value for comparison: numbers in texts as numbers, texts without capitals and outer spaces."""
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


def valid_calls(sample, limits):
    """The share of the attempted calls that can be made with the tools on offer."""
    calls, broken = attempted_calls(sample)
    schemas = [{**tool, "parameters": {"properties": {}, **(tool.get("parameters") or {})}}
               for tool in tools_of(sample.row).values()]
    box = ToolBox(Tool({"type": "function", "function": schema}, None) for schema in schemas)
    return sum(box.fault(*call) is None for call in calls) / (len(calls) + broken) if calls or broken else 1.0


REWARDS = {"answer": answer, "format": well_formed, "think": think, "length": length, "overlong": overlong,
           "repetition": repetition, "tools": tools, "valid_calls": valid_calls}  # fmt: skip
SOURCES = {  # pattern of a name -> what makes, of the pattern's groups and a device, a function: samples -> numbers
    r"(.+\.py):(\w+)": function_reward, r"model(!?):(.+)": model_reward, r"judge:(https?://[^#]+)#(.+)": judge_reward,
}  # fmt: skip
KNOWN = ", ".join([*REWARDS, "FILE.py:FUNCTION", "model:FOLDER", "model!:FOLDER", "judge:URL#MODEL"])


def reward_weights(args):
    """{name: weight} of --rewards. ValueError for what cannot be, or has no effect."""
    weights = {}
    for part in args.rewards:
        name, sign, number = part.rpartition("=")
        if not sign:
            raise ValueError(f"--rewards {part}: give NAME=WEIGHT, for example {part}=1")
        if name not in REWARDS and not any(re.fullmatch(pattern, name) for pattern in SOURCES):
            raise ValueError(f"--rewards {name}: there is no such reward. Take of: {KNOWN}")
        if name in weights:
            raise ValueError(f"--rewards {name} is given twice: give it once, with one weight")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"--rewards {part}: {number!r} is no finite number; give a weight like {name}=0.5")
    if "overlong" in weights and not 0 < args.overlong_buffer <= args.max_new_tokens:
        raise ValueError(f"--rewards overlong with --overlong_buffer {args.overlong_buffer}: give the number of tokens before "
                         f"the longest length over which the penalty grows, from 1 to {args.max_new_tokens}")
    if args.overlong_buffer and "overlong" not in weights:
        raise ValueError("--overlong_buffer has an effect with the reward overlong only: add overlong=1 to --rewards, or leave "
                         "it out")
    return weights


class Rewards:
    """What --rewards of a run asks for. `rewards(samples)` -> (totals, {name: parts}), lists of floats as long as `samples`.

    A sample has the fields of trainer.rollout.Sample. ValueError for a mistake in the flag, and where a sample cannot be judged.
    """

    def __init__(self, args, tokenizer, run):
        self.weights = reward_weights(args)
        limits = Limits(args.max_new_tokens, args.overlong_buffer,
                        tuple(token.content for token in tokenizer.added_tokens_decoder.values()))
        self.parts = {name: self.part(name, limits, run.device) for name in self.weights}

    @staticmethod
    def part(name, limits, device):
        """The function samples -> numbers of a name."""
        if name in REWARDS:
            return lambda samples: [REWARDS[name](sample, limits) for sample in samples]
        for pattern, source in SOURCES.items():
            if match := re.fullmatch(pattern, name):
                return source(*match.groups(), device)
        raise AssertionError(name)

    def __call__(self, samples):
        """Judge samples, which may be none."""
        parts = {name: part(samples) if samples else [] for name, part in self.parts.items()}
        totals = [sum(self.weights[name] * values[i] for name, values in parts.items()) for i in range(len(samples))]
        return totals, parts
