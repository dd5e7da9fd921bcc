"""Between the socket and the endpoints: the API key, limits of the body, clients that hang up."""

import asyncio
import hmac
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.openai_api.errors import ApiError

BODY_SECONDS = 60
SEND_SECONDS = 30  # a client that reads nothing for so long is given up
ALWAYS_OPEN = ("/health", "/metrics")  # while the server drains
WITH_KEY = ("/v1", "/metrics", "/tokenize", "/detokenize", "/apply-template")  # beginnings of paths
REQUEST_ID = "X-Request-Id"
GOOD_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class NobodyReads(Exception):
    """The client has stopped reading its response."""


class GateState:
    """The state of the gate: the key that it asks for, and the requests that it lets in."""

    def __init__(self, api_key: str):
        self.api_key, self.is_draining, self.num_active = api_key, False, 0


def in_time(send: Send) -> Send:
    """`send` that raises NobodyReads after SEND_SECONDS. A timer costs each token less than
    asyncio.wait_for's task does.
    """

    async def send_in_time(message: Message) -> None:
        is_late = False

        def give_up():
            nonlocal is_late
            is_late = True
            task.cancel()

        task = asyncio.current_task()
        timer = asyncio.get_running_loop().call_later(SEND_SECONDS, give_up)
        try:
            await send(message)
        except asyncio.CancelledError:
            if not is_late:
                raise
            raise NobodyReads from None
        finally:
            timer.cancel()

    return send_in_time


class Frame:
    """ASGI middleware around all others: a response has the id of its request, the client's own if
    it sent a good one; HEAD is answered as GET is, without the body.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        key, is_head = REQUEST_ID.lower().encode(), scope["method"] == "HEAD"
        name = dict(scope["headers"]).get(key, b"")
        if not GOOD_ID.fullmatch(name):
            name = f"req_{uuid.uuid4().hex}".encode()

        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (key, name)]}
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app(scope | ({"method": "GET"} if is_head else {}), receive, send_framed)


class Gate:
    """ASGI middleware: refuses requests without the key or while draining, counts the others."""

    def __init__(self, app: ASGIApp, state: GateState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal is not None:
            return await refusal.response()(scope, receive, send)
        self.state.num_active += 1
        try:
            await self.app(scope, receive, in_time(send))
        except NobodyReads:  # the server closes a connection whose response is not complete
            pass
        finally:
            self.state.num_active -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        if self.state.is_draining and path not in ALWAYS_OPEN:
            return ApiError(
                503,
                "the server is shutting down: it finishes running requests and takes no new ones",
                code="draining",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        if self.state.api_key and path.startswith(WITH_KEY):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, b"Bearer " + self.state.api_key.encode()):
                return ApiError(
                    401,
                    "a wrong API key, or none: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None


async def read_body(request: Request, limit: int) -> bytes:
    """The body's bytes. ApiError 400 unless it is declared as JSON, 413 if longer than `limit`, 408
    if it takes too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # a page of another site may send anything else to a server on this machine
    if kind != "application/json":
        raise ApiError(
            400,
            f"the content type is {kind or 'not given'}: send JSON, and say so in the header "
            "Content-Type: application/json",
        )
    too_long = ApiError(
        413,
        f"the body is longer than {limit:,} bytes, the most that this server takes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_long

    async def read():
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except ClientDisconnect as error:
        raise ApiError(400, "the client left before it had sent its request") from error
    except asyncio.TimeoutError as error:
        raise ApiError(
            408,
            f"the body did not come within {BODY_SECONDS} seconds",
            headers={"Connection": "close"},
        ) from error


@asynccontextmanager
async def while_connected(receive: Receive, cancel: Callable[[], object]) -> AsyncIterator[None]:
    """Call `cancel` when the client hangs up, and when this block is left."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        cancel()


class EventStream(StreamingResponse):
    """Server-sent events: the bytes of `parts`, which `cancel` ends when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self, parts: AsyncIterator[bytes], cancel: Callable[[], object], headers: dict[str, str]
    ):
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(parts, headers=own | headers)
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with while_connected(receive, self.cancel):
            await self.stream_response(send)
