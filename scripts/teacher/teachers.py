"""The two kinds of teachers: a server with OpenAI's API, and a checkpoint.

`args` are the flags of scripts/make_teacher_rows.py, and `take(job, completion)` gets the result.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import openai

from dataset.chat.format import encode_prompt
from dataset.chat.reply import parse_reply
from model.engine import Engine
from model.sampling import SamplingParams
from scripts.checkpoint import load_checkpoint
from scripts.openai_api.client import as_request, reasoning_of
from scripts.teacher.jobs import Completion, Job
from trainer.runtime.process import Compute

REFUSALS = (400, 413, 422)  # statuses by which a server refuses one request, not all

Take = Callable[[Job, Completion], None]


def as_message(reply: Any) -> dict:
    """The assistant's message of the openai package as one of ours."""
    message = {"role": "assistant", "content": reply.content or ""}
    if reasoning := reasoning_of(reply):
        message["reasoning_content"] = reasoning
    if reply.tool_calls:
        functions = [call.function for call in reply.tool_calls]
        message["tool_calls"] = [{"name": x.name, "arguments": x.arguments} for x in functions]
    return message


async def ask_server(args: Any, jobs: Iterable[Job], take: Take) -> None:
    """Send jobs to the server, `concurrency` at a time; an error lets running requests finish."""
    jobs, failures = iter(jobs), []

    async def worker() -> None:
        for job in jobs:  # all workers share it: each takes the next
            try:
                take(job, await ask(client, args, job))
            except (openai.OpenAIError, ValueError) as error:
                failures.append(error)
            if failures:
                return

    async with openai.AsyncOpenAI(
        base_url=args.base_url, api_key=args.api_key, max_retries=args.retries
    ) as client:
        await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    if failures:
        raise failures[0]


async def ask(client: openai.AsyncOpenAI, args: Any, job: Job) -> Completion:
    """One Completion of the server; the client tries again while the server is busy or away."""
    try:
        reply = await client.chat.completions.create(
            model=args.model,
            temperature=args.temperature,
            max_tokens=args.max_new_tokens,
            seed=job.seed(args.seed),
            **as_request(job.messages),
        )
    except openai.APIStatusError as error:
        if error.status_code in REFUSALS:
            return Completion({}, "refused", error.message)
        raise
    if not reply.choices:
        return Completion({}, "refused", "a response without choices")
    return Completion(as_message(reply.choices[0].message), reply.choices[0].finish_reason)


def ask_checkpoint(engine: Engine, args: Any, jobs: Iterable[Job], take: Take) -> None:
    """Let an Engine complete all jobs, as many at once as it has room for."""
    waiting = {}
    for job in jobs:
        params = SamplingParams(
            temperature=args.temperature, max_tokens=args.max_new_tokens, seed=job.seed(args.seed)
        )
        try:
            waiting[engine.add(encode_prompt(engine.tokenizer, job.messages), params)] = job
        except ValueError as error:
            take(job, Completion({}, "refused", str(error)))
    while waiting:
        for output in engine.step():
            if output.finish_reason:
                job = waiting.pop(output.request)
                message = parse_reply(output.request.text, tools=bool(job.messages[0].get("tools")))
                take(job, Completion(message, output.finish_reason))


def load_engine(args: Any) -> Engine:
    """The Engine of --weight. ValueError if that network was never taught to chat."""
    run = Compute(args)
    model, tokenizer = load_checkpoint(args.weight, args, run.device)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{args.weight} only continues text: take a checkpoint of train_full_sft.py or a later "
            "stage"
        )
    return Engine(model, tokenizer, args.concurrency, args.max_len, run.dtype)


def first_model(args: Any) -> str:
    """The name of the first model that the server serves."""
    with openai.OpenAI(
        base_url=args.base_url, api_key=args.api_key, max_retries=args.retries
    ) as client:
        return client.models.list().data[0].id
