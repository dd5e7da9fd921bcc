"""Responses that are kept in memory, for previous_response_id and for those who ask for them."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.openai_api.errors import ApiError
from scripts.openai_api.responses_api.items import ItemReference, as_kept, message_item
from scripts.openai_api.responses_api.requests import ResponseRequest

MOST_BYTES = 64 << 20  # of all kept responses as JSON, each with its whole conversation


class Kept(NamedTuple):
    """A response as it was sent, the conversation before it, and the bytes of both as JSON."""

    body: dict[str, Any]
    items: list[dict[str, Any]]
    size: int


class Store:
    """Keeps responses by their ids, up to `most` of them and MOST_BYTES; the oldest go first."""

    def __init__(self, most: int):
        self.most, self.kept, self.size = most, {}, 0

    def keep(self, body: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Keep a response and its conversation. One beyond MOST_BYTES by itself is not kept."""
        size = len(json.dumps([body, items], ensure_ascii=False).encode())
        if size > MOST_BYTES:
            return
        self.kept[body["id"]], self.size = Kept(body, items, size), self.size + size
        while len(self.kept) > self.most or self.size > MOST_BYTES:
            self.delete(next(iter(self.kept)))

    def find(self, name: str) -> Kept:
        """The response with this id. ApiError 404 if it is not kept."""
        if name not in self.kept:
            raise ApiError(404, f"there is no response {name!r}: {self._why()}", "response_id")
        return self.kept[name]

    def delete(self, name: str) -> None:
        """Forget a response. ApiError 404 if it is not kept."""
        self.size -= self.find(name).size
        del self.kept[name]

    def conversation(self, request: ResponseRequest) -> list[dict[str, Any]]:
        """The items of a request after those that it continues. ApiError 404 for an unknown id."""
        items = []
        if request.previous_response_id is not None:
            items = self._previous(request.previous_response_id)
        given = request.input or []
        if isinstance(given, str):
            return [*items, message_item("user", given)]
        known = self._items() if any(isinstance(one, ItemReference) for one in given) else {}
        return items + [
            self._look_up(one.id, known) if isinstance(one, ItemReference) else as_kept(one)
            for one in given
        ]

    def _previous(self, name: str) -> list[dict[str, Any]]:
        if name not in self.kept:
            raise ApiError(
                404,
                f"the previous response {name!r} was not found: {self._why()}",
                "previous_response_id",
                "previous_response_not_found",
            )
        kept = self.kept[name]
        return [*kept.items, *kept.body["output"]]

    def _items(self) -> dict[str, dict]:
        kept = self.kept.values()
        return {item["id"]: item for one in kept for item in (*one.items, *one.body["output"])}

    def _look_up(self, name: str, known: dict[str, dict]) -> dict[str, Any]:
        if name not in known:
            raise ApiError(404, f"there is no item {name!r}: {self._why()}", "input")
        return known[name]

    def _why(self) -> str:
        return (
            f"the last {self.most:,} responses are kept in memory while the server runs, without "
            "those of store: false; send the whole conversation as input"
        )


def page_of(items: Sequence[dict], limit: int, order: str, after: str | None) -> dict[str, Any]:
    """A list of items as the API pages it: `limit` of them that come after the item `after`."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    start = 0
    if after is not None:
        # of two with the same id the last: pages must come to an end
        places = {item["id"]: i for i, item in enumerate(ordered)}
        if after not in places:
            raise ApiError(400, f"after: the response has no input item {after!r}", "after")
        start = places[after] + 1
    page = ordered[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(ordered),
    }
