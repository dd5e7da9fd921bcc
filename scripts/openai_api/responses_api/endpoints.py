"""The endpoints of OpenAI's Responses API, on the plans and the engines of chat completions."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from scripts.openai_api.endpoints import begin, check_constraints, find_model
from scripts.openai_api.errors import ApiError
from scripts.openai_api.http import EventStream, read_body, while_connected
from scripts.openai_api.metrics import Clock
from scripts.openai_api.model_pool import Generation
from scripts.openai_api.parsing import parse
from scripts.openai_api.responses_api.live import LiveResponse, sse
from scripts.openai_api.responses_api.requests import ResponseRequest, plan_response
from scripts.openai_api.responses_api.store import Store, page_of

router = APIRouter()


@router.post("/v1/responses", operation_id="create_response")
async def create_response(http: Request) -> Response:
    """Answer a text or a conversation of items: text, reasoning, function calls, or JSON by a
    schema; as a whole or as a stream of typed events.
    """
    state, start = http.app.state, time.perf_counter()
    body = await read_body(http, state.max_body_bytes)
    request = await asyncio.to_thread(parse, ResponseRequest, body)
    served = find_model(http, request.model)
    headers = state.ignored_fields.take(request)
    items = state.store.conversation(request)
    served.check_room(1)
    plan = await asyncio.to_thread(plan_response, request, items, served)
    served.check_room(1)
    live, generation = LiveResponse(request, plan, served), begin(plan, served)
    clock = Clock(state.metrics, served.name, start, generation)
    store = state.store if live.body["store"] else None
    if request.stream:
        parts = stream(live, generation, clock, items, store)
        return EventStream(parts, generation.cancel, headers)
    async with while_connected(http.receive, generation.cancel):
        async for pieces in generation:
            clock.note(pieces)
            for piece in pieces:
                live.take(piece)
    check_constraints(generation)
    finish(live, generation, items, store)
    clock.end()
    return JSONResponse(live.body, headers=headers)


async def stream(
    live: LiveResponse, generation: Generation, clock: Clock, items: list[dict], store: Store | None
) -> AsyncIterator[bytes]:
    """The parts of a streamed response: one for each step of the engine, with all of its events."""
    yield sse(live.begin())
    try:
        async for pieces in generation:
            clock.note(pieces)
            yield sse(event for piece in pieces for event in live.take(piece))
        check_constraints(generation)
        last = finish(live, generation, items, store)
    except ApiError as error:  # too late for a status
        last = live.fail(error)
    clock.end()
    yield sse(last)


def finish(
    live: LiveResponse, generation: Generation, items: list[dict], store: Store | None
) -> list[dict]:
    """The last events; the response is complete, and kept if there is a store for it."""
    events = live.end(generation)
    if store is not None and live.reader.finish_reason != "cancelled":
        store.keep(live.body, items)
    return events


@router.get("/v1/responses/{response_id}", operation_id="retrieve_response", response_model=None)
async def retrieve_response(
    http: Request, response_id: str, stream: bool | None = None
) -> dict[str, Any]:
    """A response that is kept. It cannot be streamed again."""
    if stream:
        raise ApiError(400, "a finished response is not streamed again: leave stream out", "stream")
    return http.app.state.store.find(response_id).body


@router.delete("/v1/responses/{response_id}", operation_id="delete_response", response_model=None)
async def delete_response(http: Request, response_id: str) -> dict[str, Any]:
    """Forget a response that is kept."""
    http.app.state.store.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get(
    "/v1/responses/{response_id}/input_items", operation_id="list_input_items", response_model=None
)
async def list_input_items(
    http: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """The conversation before a response that is kept, with the items of those it continues."""
    return page_of(http.app.state.store.find(response_id).items, limit, order, after)
