"""A request's body -> one of the models of `requests`, or an ApiError with the faulty field."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from scripts.openai_api.errors import ApiError
from scripts.openai_api.messages import NOT_SERVED

FORMATS = (("response_format",), ("text", "format"))
READINGS = ("str", "int", "constrained-int")  # pydantic's names of a field's alternatives

Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(model: type[Parsed], body: bytes) -> Parsed:
    """The request in `body` as an instance of `model`. ApiError 400 unless it is fitting JSON."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """The ApiError of the first fault; of several readings of a field, that of the furthest."""
    faults = error.errors(include_url=False, include_input=False)
    worst = max(faults, key=lambda one: (len(one["loc"]), one["loc"][-1:] == ("type",)))
    where = readable_path(worst["loc"])
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
    field = str(worst["loc"][-1]) if worst["loc"] else ""
    message = worst["msg"].removeprefix("Value error, ")
    is_refused = worst["type"] == "none_required" and field in NOT_SERVED
    if field == "type" and {"content", "output"} & set(worst["loc"]):
        message = "only text parts are supported: this model reads text only"
    elif field == "type" and worst["loc"][0] == "tools":
        message = "only functions are served: this server runs no tools (search, files, computer)"
    elif is_refused:
        message = NOT_SERVED[field]
    return ApiError(
        400,
        f"{where}: {message}" if where else message,
        param=where or None,
        code="unsupported_parameter" if is_refused else "invalid_value",
    )


def readable_path(loc: tuple[str | int, ...]) -> str:
    """messages[0].content from ("messages", 0, "user", "content", "str"): without the names of
    pydantic's alternatives.
    """
    path = ""
    for i, part in enumerate(loc):
        is_tag = loc[:i] in FORMATS or (loc[0], i) in (("messages", 2), ("input", 3))
        if isinstance(part, int):
            path += f"[{part}]"
        elif not is_tag and "[" not in part and part not in READINGS and not part[:1].isupper():
            path += f".{part}" if path else part
    return path
