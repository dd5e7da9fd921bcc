"""The output of a response while it comes: items, and the typed events that tell of them.

An item is open until an event of another kind comes; what a client has read as events adds up to
the items of the whole response.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from dataset.chat.reply import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from scripts.openai_api.responses import new_call_id
from scripts.openai_api.responses_api.items import new_id, output_text

TEXT, THOUGHT, CALL = "output_text", "reasoning_text", "function_call_arguments"  # of deltas


class Output:
    """The items so far. Its methods yield events as dicts without their sequence numbers."""

    def __init__(self):
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None  # the last of the items, while it grows

    def take(self, events: Sequence[Event], log_probs: Sequence[dict] = ()) -> Iterator[dict]:
        """Take in events of the parser; log_probs: of the tokens of their text."""
        for event in events:
            if isinstance(event, Content):
                yield from self._add_text("message", event.text, list(log_probs))
                log_probs = ()
            elif isinstance(event, Reasoning):
                yield from self._add_text("reasoning", event.text)
            elif isinstance(event, CallStart):
                yield from self.close()
                call = {"call_id": new_call_id(), "name": event.name, "arguments": ""}
                yield self._begin("function_call", "fc", **call)
            elif isinstance(event, CallArguments):
                self.open["arguments"] += event.text
                yield self._tell(f"response.{CALL}.delta", delta=event.text)
            elif isinstance(event, CallEnd):
                yield from self.close()

    def finish(self, is_whole: bool) -> Iterator[dict]:
        """The completion has ended; is_whole: nothing has cut it short.

        A completion without text and calls has an empty message: clients look for one of them.
        """
        if is_whole and all(item["type"] == "reasoning" for item in self.items):
            yield from self._add_text("message", "")
        yield from self.close("completed" if is_whole else "incomplete")

    def close(self, status: str = "completed") -> Iterator[dict]:
        """End the open item, if there is one."""
        item = self.open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield self._tell(f"response.{CALL}.done", arguments=item["arguments"])
        else:
            part = item["content"][0]
            logged = {"logprobs": part["logprobs"]} if part["type"] == TEXT else {}
            place = {"content_index": 0}
            yield self._tell(f"response.{part['type']}.done", text=part["text"], **place, **logged)
            yield self._tell("response.content_part.done", part=part, **place)
        yield self._tell_of_item("done", item)
        self.open = None

    def _add_text(self, kind: str, text: str, log_probs: Sequence[dict] = ()) -> Iterator[dict]:
        if self.open is None or self.open["type"] != kind:
            yield from self.close()
            yield from self._begin_text(kind)
        part = self.open["content"][0]
        part["text"] += text
        logged = {}
        if kind == "message":
            part["logprobs"] += log_probs
            logged = {"logprobs": log_probs}
        if text:
            delta = {"content_index": 0, "delta": text, **logged}
            yield self._tell(f"response.{part['type']}.delta", **delta)

    def _begin_text(self, kind: str) -> Iterator[dict]:
        if kind == "message":
            yield self._begin(kind, "msg", role="assistant", content=[])
            part = output_text("")
        else:
            yield self._begin(kind, "rs", summary=[], content=[])
            part = {"type": THOUGHT, "text": ""}
        self.open["content"] = [part]
        shown = part | ({"logprobs": []} if kind == "message" else {})  # as it is now
        yield self._tell("response.content_part.added", content_index=0, part=shown)

    def _begin(self, kind: str, prefix: str, **fields: Any) -> dict:
        self.open = {"id": new_id(prefix), "type": kind, "status": "in_progress", **fields}
        self.items.append(self.open)
        return self._tell_of_item("added", dict(self.open))

    def _tell_of_item(self, what: str, item: dict) -> dict:
        place = {"output_index": len(self.items) - 1, "item": item}
        return {"type": f"response.output_item.{what}", **place}

    def _tell(self, kind: str, **fields: Any) -> dict:
        place = {"item_id": self.open["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **place, **fields}
