"""The FastAPI application around the served models, and its OpenAPI document."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from scripts.openai_api.endpoints import router
from scripts.openai_api.errors import (
    ApiError,
    answer_api_error,
    answer_bad_query,
    answer_crash,
    answer_http_error,
)
from scripts.openai_api.http import REQUEST_ID, Frame, Gate, GateState
from scripts.openai_api.ignored_fields import HEADER, IgnoredFields
from scripts.openai_api.metrics import Metrics
from scripts.openai_api.model_pool import ServedModel
from scripts.openai_api.requests import ChatRequest, CompletionRequest
from scripts.openai_api.responses_api.endpoints import router as responses_router
from scripts.openai_api.responses_api.requests import ResponseRequest
from scripts.openai_api.responses_api.store import Store
from scripts.openai_api.tokens import DetokenizeRequest, TemplateRequest, TokenizeRequest
from scripts.openai_api.tokens import router as tokens_router

REFUSALS = {
    "400": "The request cannot be served as it is; the message says why.",
    "401": "A wrong API key, or none.",
    "404": "There is no such model, response or item.",
    "408": "The body did not come in time.",
    "413": "The body is too long.",
    "429": "The queue is full; see Retry-After.",
    "500": "The engine has stopped.",
    "503": "The server is shutting down.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
IGNORED = {
    "description": "Fields of the request that this server does not know and has ignored.",
    "schema": {"type": "string"},
}
BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/apply-template": TemplateRequest,
}
MOST_RESPONSES = 1000


def build_app(
    models: dict[str, ServedModel],
    api_key: str = "",
    max_body_bytes: int = 4 << 20,
    strict: bool = False,
    allow_origin: Sequence[str] = (),
    max_stored_responses: int = MOST_RESPONSES,
) -> FastAPI:
    """The application that serves the models, by name.

    strict: unknown fields are refused. allow_origin: web pages from there may use it in a browser.
    max_stored_responses: those of /v1/responses that are kept for later.
    """
    app = FastAPI(
        title="MiniMind",
        description="Chat, completions and responses as OpenAI's clients know them.",
        version="1",
    )
    app.state.models, app.state.max_body_bytes = models, max_body_bytes
    app.state.metrics, app.state.gate = Metrics(models), GateState(api_key)
    app.state.ignored_fields = IgnoredFields(app.state.metrics.ignored_fields, strict)
    app.state.store = Store(max_stored_responses)
    app.include_router(router)
    app.include_router(responses_router)
    app.include_router(tokens_router)
    app.add_middleware(Gate, state=app.state.gate)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_bad_query)
    app.add_exception_handler(Exception, answer_crash)
    app.openapi = lambda: document(app)
    stack = app.build_middleware_stack()
    app.middleware_stack = Frame(open_to_pages(stack, allow_origin) if allow_origin else stack)
    return app


def open_to_pages(stack: ASGIApp, origins: Sequence[str]) -> CORSMiddleware:
    """Let browsers hand the responses to pages from `origins` (CORS; "*": from anywhere).

    Around the gate: errors need the headers too, and a browser sends its preflight without the API
    key.
    """
    return CORSMiddleware(
        stack,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=[HEADER, REQUEST_ID, "Retry-After"],
    )


def document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document, with the bodies that the endpoints read and their errors."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = FastAPI.openapi(app)  # kept in app.openapi_schema, and completed here
    _, definitions = models_json_schema(
        [(model, "validation") for model in BODIES.values()],
        ref_template="#/components/schemas/{model}",
    )
    parts = schema.setdefault("components", {}).setdefault("schemas", {})
    if app.state.ignored_fields.is_strict:
        for part in definitions["$defs"].values():
            part["additionalProperties"] = False
    parts.update(definitions["$defs"], Error=ERROR)
    for name in (model.__name__ for model in BODIES.values()):
        field = parts[name]["properties"]["model"]
        next((one for one in field.get("anyOf", ()) if one["type"] == "string"), field)["enum"] = (
            list(app.state.models)
        )
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            describe(operation, path, bool(app.state.gate.api_key))
    if app.state.gate.api_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def describe(operation: dict[str, Any], path: str, has_key: bool) -> None:
    """Add to one operation its body, its possible errors, and the key that it asks for."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    statuses = {"400", "408", "413", "429", "500"} if path in BODIES else set()
    statuses |= {"404"} if path in BODIES or "{" in path else set()
    statuses |= {"503"} | ({"401"} if has_key and path != "/health" else set())
    statuses |= {"400"} if operation["responses"].pop("422", None) else set()
    operation["responses"] |= {
        status: {"description": REFUSALS[status], "content": error} for status in sorted(statuses)
    }
    if path == "/health":
        operation["responses"]["503"]["content"] = {"application/json": {}}
    if path == "/metrics":
        operation["responses"]["200"]["content"] = {"text/plain": {}}
    if path in BODIES:
        schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
        if "stream" in BODIES[path].model_fields and path.startswith("/v1"):
            operation["responses"]["200"]["content"]["text/event-stream"] = {}
        operation["responses"]["200"]["headers"] = {HEADER: IGNORED}
    if has_key and path != "/health":
        operation["security"] = [{"key": []}]
