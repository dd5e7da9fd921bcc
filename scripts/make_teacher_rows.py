"""Let a teacher answer prompts, and write its answers as rows to train a student on (black-box distillation).

Where a teacher's probabilities cannot be had, because it has another tokenizer or stands behind a server, its answers
still teach (sequence-level distillation: Kim & Rush 2016, section 3.2). This script writes them; train_full_sft.py learns
from them:

    python scripts/make_teacher_rows.py --weight out/quickstart/full_sft_tiny --out dataset/teacher.jsonl --keep_right
    OPENAI_API_KEY=... python scripts/make_teacher_rows.py --base_url https://api.example.com/v1 --model big \\
        --data_path my_prompts.jsonl --temperature 0.7 --num_samples 4 --out dataset/teacher.jsonl
    python trainer/train_full_sft.py --data_path dataset/teacher.jsonl --from_weight pretrain

A row to read is {"prompt": "..."} or {"conversations": [...]}, whose last assistant message, if it ends with one, is what
the teacher writes anew; earlier turns and tools stay. A row that is written has the teacher's content, reasoning and
tool calls, and the other fields of the row that it came from. Answers that --max_new_tokens cut off, that are empty, or
that are wrong by the row's "answer" (--keep_right: rejection sampling, Yuan et al. 2023) go to OUT.dropped.jsonl with the
reason. Whatever stands in one of the two files is not asked again: a run that was interrupted goes on with the same command.
Answers of another teacher, or with other settings, go to a file of their own (--data_path takes several).
Where the teacher's probabilities can be had, trainer/train_distillation.py learns more from each answer.
"""

import asyncio
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import openai
from tqdm import tqdm

from dataset.chat_format import check_conversation, encode_prompt, normalize_conversation
from dataset.chat_reply import parse_reply
from dataset.jsonl import dump_row, find_shards, in_share, parse_row, read_rows
from dataset.outputs import why_unwritable
from dataset.toy_scorer import score
from dataset.toy_world import question_of_row, write_world
from model.engine import Engine
from model.model_minimind import PRESETS
from model.sampling import SamplingParams
from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.metrics import write_json
from trainer.run import Compute
from trainer.weights import read_weight

TOY = ROOT / "dataset" / "toy_mini"
ONE_ROWS_FAULT = (400, 413, 422)  # statuses by which a server says that it will not answer this one request
SETTINGS = ("temperature", "max_new_tokens", "seed", "keep_right")  # of all answers in a file, and written in its rows
MOST_REFUSED = 20  # requests before the first answer: then it is not the rows' fault


@dataclass
class TeacherArgs:
    data_path: list[str] = arg([], "rows with prompts; FILE@0.4 takes that share of them (default: the toy world's RL rows)",
                               nargs="+")
    out: str = arg("", "the .jsonl file to write; what it holds already is not asked again")
    weight: str = arg("", "the teacher is this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    base_url: str = arg("", "the teacher is behind this server with OpenAI's API, e.g. http://127.0.0.1:8000/v1")
    model: str = arg("", "base_url: the teacher's name there (default: the first that it serves)")
    api_key: str = arg("", "base_url: its key (default: the environment's OPENAI_API_KEY, or none)")
    temperature: float = arg(1.0, "0: always the likeliest token")
    num_samples: int = arg(1, "answers to each prompt")
    max_new_tokens: int = arg(512, "longest answer, in tokens; what is cut off there is dropped")
    keep_right: bool = arg(False, 'drop answers that are wrong by the "answer" of their row, as the toy world scores them; those '
                                  "to rows without one are kept as they are")
    concurrency: int = arg(16, "base_url: requests under way at a time; weight: answers written side by side")
    retries: int = arg(6, "base_url: tries after the first, with growing pauses, while the server is busy or cannot be reached")
    seed: int = arg(42, "of the sampling")
    save_dir: str = arg(str(ROOT / "out"), "weight: folder that holds the folders of all runs")
    preset: str = arg("", "weight: which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "weight: the same by its width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "weight: the same by its layers, in place of the preset's")
    use_moe: bool = arg(False, "weight: the same, a mixture of 4 experts")
    max_len: int | None = arg(None, "weight: tokens of prompt and answer together (default: 2048, or what the model has)")
    device: str = arg("auto", "weight: cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "weight: auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    json: str = arg("", "write the figures to this file too")

    OF = {"weight": ("save_dir", "preset", "hidden_size", "num_hidden_layers", "use_moe", "max_len", "device", "dtype"),
          "base_url": ("model", "api_key", "retries")}

    def check(self):
        """ValueError for values out of range, for no teacher or two, and for flags of the one that is not asked."""
        check_positive(self, "num_samples", "max_new_tokens", "concurrency", "max_len", "hidden_size", "num_hidden_layers")
        check_not_negative(self, "temperature", "retries", "seed")
        if bool(self.weight) == bool(self.base_url):
            raise ValueError("the teacher is either --weight (a checkpoint) or --base_url (a server): give one of them")
        if not self.out.endswith(".jsonl"):
            raise ValueError(f"--out {self.out!r}: give a name that ends in .jsonl")
        other = "base_url" if self.weight else "weight"
        if useless := sorted({*self.OF[other]} & self.given):
            raise ValueError(f"--{' and --'.join(useless)} has an effect with --{other} only: leave it out")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("--num_samples with --temperature 0 gives the same answer each time: give a temperature above 0")


class Job(NamedTuple):
    """One answer to ask for: the row that it came from, the messages before the answer, its number among the samples."""

    where: str
    row: dict
    messages: list
    sample: int

    @property
    def key(self):
        """What tells this answer from all others, also in the next process."""
        return f"{self.sample}:{json.dumps(self.messages, sort_keys=True)}"

    def seed(self, seed):
        """The seed of this one answer."""
        return int.from_bytes(hashlib.blake2b(f"{seed}:{self.key}".encode(), digest_size=4).digest(), "big") >> 1


class Answer(NamedTuple):
    """What the teacher wrote, and how it ended: stop, tool_calls, length, ...; refused: `why` says what it had against it."""

    message: dict
    finish_reason: str
    why: str = ""


def read_jobs(args):
    """(all Jobs of the files, how many rows repeat a prompt and are left out); ValueError "file:line: what is wrong"."""
    jobs, seen, repeated = [], set(), 0
    for path, share in find_shards(args.data_path):
        for line_no, row in read_rows(path):
            if not in_share(line_no, share):
                continue
            try:
                messages = prompt_of(row)
            except ValueError as error:
                raise ValueError(f"{path}:{line_no}: {error}") from error
            several = [Job(f"{path}:{line_no}", row, messages, sample) for sample in range(args.num_samples)]
            repeated += several[0].key in seen
            if several[0].key not in seen:
                seen.add(several[0].key)
                jobs += several
    if args.keep_right and not any("answer" in job.row for job in jobs):
        raise ValueError(f'--keep_right: no row of {" ".join(args.data_path)} has an "answer" to compare with; leave it out')
    return jobs, repeated


def prompt_of(row):
    """The messages that the teacher is to answer. ValueError if there are none."""
    if "prompt" not in row and "conversations" not in row:
        raise ValueError(f'neither "prompt" nor "conversations" among the keys {list(row)}.')
    messages = row.get("conversations", [{"role": "user", "content": row.get("prompt")}])
    check_conversation(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("there is nothing to answer: before the last assistant message must be one of a user or a tool.")
    return messages


class TeacherRows:
    """OUT and OUT.dropped.jsonl, which grow row by row; `done` are the keys of what stands in them."""

    def __init__(self, args, teacher):
        self.args, self.teacher, self.out = args, teacher, Path(args.out)
        self.dropped = self.out.with_suffix(".dropped.jsonl")
        if problem := why_unwritable(self.out.parent):
            raise ValueError(f"--out {self.out}: {problem}")
        self.settings = {name: getattr(args, name) for name in SETTINGS}
        self.done, self.counts, self.refused = set(), Counter(), []
        for path in (self.out, self.dropped):
            for row in whole_rows(path):
                if row.get("teacher") != teacher:
                    raise ValueError(f"{path} holds answers of {row.get('teacher')!r}, not of {teacher!r}: give another --out")
                if row.get("settings") != self.settings:
                    raise ValueError(f"{path} holds answers with the settings {row.get('settings')}, not {self.settings}: "
                                     "give another --out, or set them back")
                self.done.add(Job("", row, row["conversations"][:-1], row["sample"]).key)
        self.found = len(self.done)
        for path in (self.out, self.dropped):  # only now is it known that both are ours
            cut_off_half_row(path)

    def take(self, job, answer):
        """Write an answer into the file where it belongs. ValueError if the teacher refuses everything."""
        if answer.finish_reason == "refused":  # not written: it may be answered next time
            self.refused.append(f"{job.where}: {answer.why}")
            if len(self.refused) >= MOST_REFUSED:
                self.check_answers()
            return
        reason = self.fault(job, answer)
        row = {"conversations": [*job.messages, answer.message], "teacher": self.teacher, "settings": self.settings,
               "sample": job.sample}
        row |= {name: x for name, x in job.row.items() if name not in (*row, "prompt")}
        with open(self.dropped if reason else self.out, "a", encoding="utf-8") as file:
            file.write(dump_row(row | ({"dropped": reason} if reason else {})))
        self.counts[reason or "written"] += 1

    def fault(self, job, answer):
        """Why an answer is no row to learn from; "" if it is one."""
        if answer.finish_reason in ("length", "content_filter"):
            return answer.finish_reason
        content = answer.message["content"] or ""
        if not content.strip() and not answer.message.get("tool_calls"):
            return "empty"
        if self.args.keep_right and "answer" in job.row:
            question = question_of_row({**job.row, "conversations": [{}], "answer": str(job.row["answer"])})
            return "" if score(question, content) else "wrong"
        return ""

    def check_answers(self):
        """ValueError if there was no answer at all, only refusals."""
        if self.refused and not self.counts and not self.found:
            raise ValueError(f"{self.teacher} answers nothing. {self.refused[0]}")


def whole_rows(path):
    """The rows of a file that is written line by line, without the half of one that a killed process may have left.

    ValueError if there is nothing but that: nobody can tell whose it is.
    """
    content = path.read_bytes() if path.is_file() else b""
    if content and b"\n" not in content:
        raise ValueError(f"{path} holds no whole row: delete it, or give another --out")
    for line_no, line in enumerate(content.decode(errors="replace").split("\n")[:-1], 1):
        try:
            yield parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}:{line_no}: {error}") from error


def cut_off_half_row(path):
    """Take from a file what follows its last whole line, so that the next one begins on a line of its own."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def as_request(messages):
    """Our messages as OpenAI's API wants them: {"messages", "tools" if there are any}; calls and their results get ids."""
    messages, _ = normalize_conversation(messages)
    sent, tools, waiting = [], [], []
    for i, message in enumerate(messages):
        one = {"role": message["role"], "content": message.get("content", "")}
        if message.get("tools"):
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in message["tools"]]
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        if message.get("tool_calls"):
            functions = [call.get("function", call) for call in message["tool_calls"]]
            waiting = [f"call_{i}_{n}" for n in range(len(functions))]
            one["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": function["name"], "arguments": as_json(function)}}
                for name, function in zip(waiting, functions)]
        if message["role"] == "tool":
            one["tool_call_id"] = waiting.pop(0) if waiting else "call"
        if one["content"] or message["role"] != "system":
            sent.append(one)
    return {"messages": sent, "tools": tools} if tools else {"messages": sent}


def as_json(function):
    """A call's arguments as JSON text."""
    arguments = function.get("arguments") or {}
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_message(reply):
    """The assistant's message of the openai package as one of ours."""
    message = {"role": "assistant", "content": reply.content or ""}
    reasoning = getattr(reply, "reasoning_content", None) or getattr(reply, "reasoning", None)  # as the servers call it
    if reasoning:
        message["reasoning_content"] = reasoning
    if reply.tool_calls:
        functions = [call.function for call in reply.tool_calls]
        message["tool_calls"] = [{"name": one.name, "arguments": one.arguments} for one in functions]
    return message


async def ask_server(args, jobs, take):
    """Put jobs to the server, `concurrency` at a time. After an error those under way are still waited for."""
    jobs, failures = iter(jobs), []

    async def worker():
        for job in jobs:  # all workers share it: each takes the next
            try:
                take(job, await ask(client, args, job))
            except (openai.OpenAIError, ValueError) as error:
                failures.append(error)
            if failures:
                return

    async with openai.AsyncOpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=args.retries) as client:
        await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    if failures:
        raise failures[0]


async def ask(client, args, job):
    """One Answer of the server; the client itself tries again while the server is busy or away."""
    try:
        reply = await client.chat.completions.create(
            model=args.model, temperature=args.temperature, max_tokens=args.max_new_tokens, seed=job.seed(args.seed),
            **as_request(job.messages))
    except openai.APIStatusError as error:
        if error.status_code in ONE_ROWS_FAULT:
            return Answer({}, "refused", error.message)
        raise
    if not reply.choices:
        return Answer({}, "refused", "a reply without choices")
    return Answer(as_message(reply.choices[0].message), reply.choices[0].finish_reason)


def ask_checkpoint(engine, args, jobs, take):
    """Let an Engine write the answers to all jobs, as many side by side as it has room for."""
    waiting = {}
    for job in jobs:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens, seed=job.seed(args.seed))
        try:
            waiting[engine.add(encode_prompt(engine.tokenizer, job.messages), params)] = job
        except ValueError as error:
            take(job, Answer({}, "refused", str(error)))
    while waiting:
        for output in engine.step():
            if output.finish_reason:
                job = waiting.pop(output.request)
                message = parse_reply(output.request.text, tools=bool(job.messages[0].get("tools")))
                take(job, Answer(message, output.finish_reason))


def load_engine(args):
    """The Engine of --weight. ValueError if that network was never taught to chat."""
    run = Compute(args)
    model, tokenizer = read_weight(args.weight, args, run.device)
    if not tokenizer.chat_template:
        raise ValueError(f"{args.weight} only continues text: take a checkpoint of train_full_sft.py or a later stage")
    return Engine(model.to(run.device), tokenizer, args.concurrency, args.max_len, run.dtype)


def first_model(args):
    """The name of the first model that the server serves."""
    with openai.OpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=args.retries) as client:
        return client.models.list().data[0].id


def main(argv=None):
    args = parse_args(TeacherArgs, argv)
    args.api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not args.data_path:
        write_world("mini", TOY)
        args.data_path = [str(TOY / "rl_train.jsonl")]
    jobs, repeated = read_jobs(args)
    try:
        if args.base_url:
            args.model = args.model or first_model(args)
        rows = TeacherRows(args, args.weight or args.model)
        missing = [job for job in jobs if job.key not in rows.done]
        with tqdm(total=len(missing), unit="answer", disable=not sys.stderr.isatty()) as bar:
            def take(job, answer):
                rows.take(job, answer)
                bar.update()

            if args.base_url:
                asyncio.run(ask_server(args, missing, take))
            elif missing:
                ask_checkpoint(load_engine(args), args, missing, take)
        rows.check_answers()
    except openai.OpenAIError as error:
        raise OSError(f"{args.base_url}: {getattr(error, 'message', error)} (--retries {args.retries}). What was answered so "
                      f"far is in {args.out}: go on with the same command") from error
    report(args, rows, jobs, repeated)


def report(args, rows, jobs, repeated):
    """Say what became of everything that was asked, and write it to --json."""
    dropped = {reason: count for reason, count in rows.counts.items() if reason != "written"}
    print(f"{args.out}: {rows.counts['written']} rows written; {rows.found} of {len(jobs)} answers were there before; "
          f"{repeated} rows repeat a prompt; dropped: {', '.join(f'{n} {reason}' for reason, n in dropped.items()) or 'none'}; "
          f"refused: {len(rows.refused)}{f' ({rows.refused[0]})' if rows.refused else ''}")
    if args.json:
        write_json(args.json, {"written": rows.counts["written"], "there_before": rows.found, "answers": len(jobs),
                               "repeated_prompts": repeated, "dropped": dropped, "refused": len(rows.refused)})


if __name__ == "__main__":
    command(main)
