"""A response from its first event to its last: the body that clients get, and the numbered events
of its stream.
"""

import json
import time
from collections.abc import Iterable
from typing import Any

from dataset.chat.reply import Content
from scripts.openai_api.errors import ApiError
from scripts.openai_api.model_pool import Generation, Piece, ServedModel
from scripts.openai_api.plans import Plan
from scripts.openai_api.responses import CompletionReader, usage
from scripts.openai_api.responses_api.items import new_id
from scripts.openai_api.responses_api.output import Output
from scripts.openai_api.responses_api.requests import ResponseRequest

ECHOED = (  # fields of the request that the response repeats as they are
    *("instructions", "previous_response_id", "max_output_tokens", "max_tool_calls", "user"),
    *("prompt_cache_key", "safety_identifier"),
)


def sse(events: Iterable[dict]) -> bytes:
    """Events as the bytes of a stream."""
    return "".join(
        f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events
    ).encode()


class LiveResponse:
    """A response while its completion comes. Its methods return the events that are due."""

    def __init__(self, request: ResponseRequest, plan: Plan, served: ServedModel):
        self.plan, self.reader, self.output = plan, CompletionReader(plan, served), Output()
        self.number = 0  # of the next event
        self.body = first_body(request, served.name)
        self.body["output"] = self.output.items

    def begin(self) -> list[dict]:
        """The events before the first token."""
        return [self._of_response("created"), self._of_response("in_progress")]

    def take(self, piece: Piece) -> list[dict]:
        """Take in a Piece of the completion."""
        was_reasoning = self.reader.parser.in_reasoning
        events = self.reader.take(piece)
        has_text = any(isinstance(event, Content) for event in events)
        told = list(self.output.take(events, self.reader.log_probs if has_text else ()))
        if events or was_reasoning or self.reader.parser.in_reasoning:
            self.reader.log_probs = []  # those of text that is still held back wait for it
        if piece.finish_reason:
            told += self.output.finish(is_whole=self.reader.finish_reason != "length")
        return [self._numbered(event) for event in told]

    def end(self, generation: Generation) -> list[dict]:
        """The last event; the body is complete."""
        status = "incomplete" if self.reader.finish_reason == "length" else "completed"
        if status == "incomplete":
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = int(time.time())
        self.body["usage"] = usage_of(generation, self.plan, self.reader)
        return [self._of_response(status)]

    def fail(self, error: ApiError) -> list[dict]:
        """The last events of a stream that cannot be continued."""
        told = [self._numbered(event) for event in self.output.close("incomplete")]
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.body["error"] = {"code": code, "message": error.message}
        return [*told, self._of_response("failed")]

    def _of_response(self, status: str) -> dict:
        self.body["status"] = "in_progress" if status == "created" else status
        body = {**self.body, "output": list(self.output.items)}
        return self._numbered({"type": f"response.{status}", "response": body})

    def _numbered(self, event: dict) -> dict:
        self.number += 1
        return {**event, "sequence_number": self.number - 1}


def first_body(request: ResponseRequest, model: str) -> dict[str, Any]:
    """The body of a response that has only begun."""
    choice, effort = request.tool_choice, request.reasoning and request.reasoning.effort
    verbosity = (request.text and request.text.verbosity) or "medium"
    choice = choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        **{name: getattr(request, name) for name in ECHOED},
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": shown_format(request), "verbosity": verbosity},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [shown_tool(tool.model_dump()) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
    }


def shown_format(request: ResponseRequest) -> dict[str, Any]:
    """The format of the text as the response repeats it."""
    shown = request.text_format().model_dump(by_alias=True)
    return {**shown, "name": shown["name"] or ""} if "schema" in shown else shown


def shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the response repeats it."""
    return {**tool, "parameters": tool["parameters"] or {}, "strict": bool(tool["strict"])}


def usage_of(generation: Generation, plan: Plan, reader: CompletionReader) -> dict[str, Any]:
    """The usage under the names of this API."""
    counted = usage(generation.requests, plan, [reader])
    cached = counted["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": counted["completion_tokens_details"],
        "total_tokens": counted["total_tokens"],
    }
