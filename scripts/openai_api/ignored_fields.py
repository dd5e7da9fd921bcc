"""The fields of a request that this server does not know: named once in the log, named in a header
of the response, and counted; or refused with --strict.
"""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

import prometheus_client

from scripts.openai_api.errors import ApiError
from scripts.openai_api.messages import Body
from scripts.openai_api.notices import Notices

HEADER = "X-Ignored-Fields"
LONGEST_NAME = 60  # characters of one field's name
LONGEST_HEADER = 1000
MOST_NAMES = 100  # that are counted each by itself; the others are counted as "other"


def take_unlisted(part: Body, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Remove the fields that no class lists from a part of a request; yields the path of each that
    is not null, such as ("messages", "[0]", "note").
    """
    for name, value in (part.model_extra or {}).items():
        if value is not None:
            yield (*path, quote(name[:LONGEST_NAME], safe="") or '""')
    (part.model_extra or {}).clear()
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Body):
            yield from take_unlisted(value, (*path, name))
        elif isinstance(value, list):
            for i, one in enumerate(value):
                if isinstance(one, Body):
                    yield from take_unlisted(one, (*path, name, f"[{i}]"))


def spelled(path: tuple[str, ...]) -> str:
    """messages[0].note from ("messages", "[0]", "note")."""
    return ".".join(path).replace(".[", "[")


def header_of(paths: list[str]) -> dict[str, str]:
    """The header that names the ignored fields, cut after LONGEST_HEADER; none without fields."""
    if not paths:
        return {}
    value, *rest = paths
    for path in rest:
        if len(value) + len(path) > LONGEST_HEADER:
            return {HEADER: f"{value}, ..."}
        value += f", {path}"
    return {HEADER: value}


class IgnoredFields:
    """What becomes of unlisted fields; `counter` has the labels model and field."""

    def __init__(self, counter: prometheus_client.Counter, is_strict: bool):
        self.counter, self.is_strict = counter, is_strict
        self.notices, self.names = Notices(), set()

    def take(self, request: Body) -> dict[str, str]:
        """Remove the unlisted fields from a request; returns the header that names them. ApiError
        400 with --strict if there are any.
        """
        paths = list(take_unlisted(request))
        spellings = [spelled(path) for path in paths]
        if spellings and self.is_strict:
            raise ApiError(
                400,
                f"{spellings[0]}: there is no such field, or it is not supported; leave it out",
                spellings[0],
                "unsupported_parameter",
            )
        # one name for the same field of all messages
        names = Counter(
            spelled(tuple("[]" if x.startswith("[") else x for x in path)) for path in paths
        )
        for name, number in names.items():
            self._count(name, number, request.model)
        return header_of(spellings)

    def _count(self, name: str, number: int, model: str) -> None:
        if name in self.names or len(self.names) < MOST_NAMES:
            self.names.add(name)
            self.notices.print_once(
                f"ignored: {name} is no field of this server (--strict refuses it)"
            )
        else:
            name = "other"
        self.counter.labels(model, name).inc(number)
