"""A server with OpenAI's API whose completions are scripted, as a whole and as streams."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE = 7  # letters of a streamed piece
Reply = Callable[[dict], dict]  # a request's body -> "content", "reasoning", "calls", or some


def as_calls(calls: list[tuple[str, Any]]) -> list[dict]:
    """[(name, arguments: object, or text as it is)] in the API's form."""
    functions = [
        {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)}
        for name, given in calls
    ]
    return [
        {"id": f"call_{i}", "type": "function", "function": function}
        for i, function in enumerate(functions)
    ]


def deltas(reply: dict) -> list[dict]:
    """The pieces of a streamed message."""
    found: list[dict] = [{"role": "assistant", "content": ""}]
    for key, name in (("reasoning", "reasoning_content"), ("content", "content")):
        text = reply.get(key, "")
        found += [{name: text[i : i + PIECE]} for i in range(0, len(text), PIECE)]
    for i, call in enumerate(as_calls(reply.get("calls", []))):
        arguments = call["function"]["arguments"]
        head = {**call, "index": i, "function": {**call["function"], "arguments": ""}}
        found.append({"tool_calls": [head]})
        for start in range(0, len(arguments), PIECE):
            piece = {"index": i, "function": {"arguments": arguments[start : start + PIECE]}}
            found.append({"tool_calls": [piece]})
    return found


class FakeApi:
    """Answers with `reply(body)`; counts 10 tokens for each completion. requests: all bodies."""

    def __init__(self, reply: Reply):
        self.reply, self.requests = reply, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.write(json.dumps({"object": "list", "data": [model("scripted")]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({**body, "key": self.headers["Authorization"]})
                outer.answer(self, body)

            def write(self, text, kind="application/json"):
                data = text.encode()
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: Any, body: dict) -> None:
        """Send one completion."""
        reply, base = self.reply(body), {"id": "1", "created": 0, "model": "scripted"}
        usage = {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
        if not body.get("stream"):
            message = {"role": "assistant", "content": reply.get("content", "")}
            message["reasoning_content"] = reply.get("reasoning")
            message["tool_calls"] = as_calls(reply.get("calls", [])) or None
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            whole = {**base, "object": "chat.completion", "choices": choices, "usage": usage}
            return handler.write(json.dumps(whole))
        parts = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas(reply)]
        chunks = [{**base, "object": "chat.completion.chunk", "choices": part} for part in parts]
        chunks.append({**chunks[0], "choices": [], "usage": usage})
        events = [*map(json.dumps, chunks), "[DONE]"]
        handler.write("".join(f"data: {one}\n\n" for one in events), "text/event-stream")

    def __enter__(self) -> "FakeApi":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def model(name: str) -> dict:
    """An entry of the list of models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "us"}
