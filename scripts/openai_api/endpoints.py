"""The endpoints: from a request's body to the bytes of its response."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import generate_latest
from starlette.responses import JSONResponse, Response

from scripts.openai_api.errors import ApiError
from scripts.openai_api.http import EventStream, read_body, while_connected
from scripts.openai_api.metrics import Clock
from scripts.openai_api.model_pool import Generation, ServedModel
from scripts.openai_api.parsing import parse
from scripts.openai_api.plans import Plan, plan_chat, plan_completion
from scripts.openai_api.requests import ChatRequest, CompletionRequest, GenerationRequest
from scripts.openai_api.responses import DONE, ChatChoice, Choices, Envelope, TextChoice, usage

router = APIRouter()


@router.post("/v1/chat/completions", operation_id="create_chat_completion")
async def chat_completions(request: Request) -> Response:
    """Complete a conversation: text, reasoning, tool calls, or JSON by a schema; as a whole or as a
    stream.
    """
    return await answer(request, ChatRequest, plan_chat, "chat.completion")


@router.post("/v1/completions", operation_id="create_completion")
async def completions(request: Request) -> Response:
    """Continue texts or token ids; with echo and logprobs, score them."""
    return await answer(request, CompletionRequest, plan_completion, "text_completion")


@router.get("/v1/models", operation_id="list_models", response_model=None)
async def models(request: Request) -> dict[str, Any]:
    """The served models."""
    return {
        "object": "list",
        "data": [served.card() for served in request.app.state.models.values()],
    }


@router.get("/v1/models/{name:path}", operation_id="retrieve_model", response_model=None)
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of the served models."""
    return find_model(request, name).card()


@router.get("/health", operation_id="health")
async def health(request: Request) -> JSONResponse:
    """200 while requests are accepted, else 503."""
    state = request.app.state
    failed = [name for name, served in state.models.items() if served.thread.failure]
    status = "draining" if state.gate.is_draining else "failed" if failed else "ok"
    return JSONResponse({"status": status, "failed": failed}, 200 if status == "ok" else 503)


@router.get("/metrics", operation_id="metrics")
async def metrics(request: Request) -> Response:
    """Counters and gauges in Prometheus' text format."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def find_model(request: Request, name: str) -> ServedModel:
    """The ServedModel of that name. ApiError 404 if there is none."""
    models = request.app.state.models
    if name not in models:
        raise ApiError(
            404,
            f"there is no model {name!r}; served are {', '.join(models)}",
            "model",
            "model_not_found",
        )
    return models[name]


async def answer(
    http: Request,
    model: type[GenerationRequest],
    plan_for: Callable[[Any, ServedModel], Plan],
    kind: str,
) -> Response:
    """The response to a generation request, as a whole or as a stream."""
    state, start = http.app.state, time.perf_counter()
    body = await read_body(http, state.max_body_bytes)
    request = await asyncio.to_thread(parse, model, body)  # a large body takes seconds
    served = find_model(http, request.model)
    headers = state.ignored_fields.take(request)
    served.check_room(request.n or 1)
    # in a thread: long texts and large schemas take their time
    plan = await asyncio.to_thread(plan_for, request, served)
    served.check_room(len(plan.prompts) * plan.n)
    if plan.wants_log_probs and plan.echoes:
        await score(http, plan, served, request.logprobs)
        served.check_room(len(plan.prompts) * plan.n)  # others may have come meanwhile
    generation = begin(plan, served)
    clock = Clock(state.metrics, served.name, start, generation)
    options = request.stream and request.stream_options
    envelope = Envelope(served, kind, with_usage=bool(options and options.include_usage))
    choices = make_choices(plan, served, envelope, kind)
    if request.stream:
        parts = stream(generation, choices, plan, envelope, clock)
        return EventStream(parts, generation.cancel, headers)
    async with while_connected(http.receive, generation.cancel):
        async for pieces in generation:
            clock.note(pieces)
            for piece in pieces:
                choices[piece.index].add(piece)
    check_constraints(generation)
    clock.end()
    whole = [choice.whole() for choice in choices]
    body = envelope.whole(whole, usage(generation.requests, plan, choices))
    return JSONResponse(body, headers=headers)


def begin(plan: Plan, served: ServedModel) -> Generation:
    """Start the completions of a plan."""
    generation = Generation(served)
    try:
        for i, params in enumerate(plan.params):
            generation.add(plan.prompts[i // plan.n], params)
    except BaseException:
        generation.cancel()
        raise
    return generation


async def score(http: Request, plan: Plan, served: ServedModel, number: int) -> None:
    """Give the echoed prompts their log-probs. Each counts as a completion meanwhile; it ends early
    when the client hangs up.
    """
    is_cancelled = asyncio.Event()
    served.in_flight += len(plan.prompts)
    try:
        async with while_connected(http.receive, is_cancelled.set):
            for echo, prompt in zip(plan.echoes, plan.prompts):
                if is_cancelled.is_set():
                    raise ApiError(400, "the client left before its prompts were scored")
                if echo.tokens:
                    top = await served.score(prompt, number)
                    echo.top = top[len(prompt) - len(echo.tokens) :]
    finally:
        served.in_flight -= len(plan.prompts)


def make_choices(plan: Plan, served: ServedModel, envelope: Envelope, kind: str) -> Choices:
    """The choices of a response, as plan.params, or one for each prompt that is only scored."""
    if kind == "chat.completion":
        return [ChatChoice(i, plan, served, envelope) for i in range(plan.n)]
    echoes = plan.echoes or [None] * len(plan.prompts)
    choices = [
        TextChoice(i, plan, served, envelope, echoes[i // plan.n])
        for i in range(len(plan.prompts) * plan.n)
    ]
    if not plan.params:
        for choice in choices:
            choice.finish_reason = "length"
    return choices


async def stream(
    generation: Generation, choices: Choices, plan: Plan, envelope: Envelope, clock: Clock
) -> AsyncIterator[bytes]:
    """The parts of a streamed response: one for each step of the engine, with all of its chunks."""
    try:
        if not generation.requests:  # prompts that are only scored
            yield b"".join([choice.flush() for choice in choices])
        async for pieces in generation:
            clock.note(pieces)
            yield b"".join([choices[piece.index].chunks(piece) for piece in pieces])
        check_constraints(generation)
        if envelope.with_usage:
            yield envelope.last_chunk(usage(generation.requests, plan, choices))
    except ApiError as error:  # too late for a status
        yield f"data: {json.dumps(error.body())}\n\n".encode()
    clock.end()
    yield DONE


def check_constraints(generation: Generation) -> None:
    """ApiError 400 if a grammar turned out to be too complex on the way."""
    for request in generation.requests:
        failure = getattr(request.params.constraint, "failure", "")
        if failure:
            raise ApiError(
                400,
                f"the JSON schema is too complex to be followed: {failure.splitlines()[0]}",
                "response_format",
            )
