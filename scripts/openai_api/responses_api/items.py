"""The items of a conversation in OpenAI's Responses API, and the chat messages they stand for.

An item is checked as an instance of one of the classes here, and kept as a dict that has an id, as
the API returns it.
"""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from scripts.openai_api.errors import ApiError
from scripts.openai_api.messages import Body, Unused

KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


class ContentPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Unused
    logprobs: list[Any] | None = Unused
    parsed: Any = Field(None, description="Without effect; clients add it.")


Content = str | list[ContentPart]


class AnyItem(Body):
    id: str | None = None
    status: str | None = Unused


class MessageItem(AnyItem):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = Unused


class FunctionCallItem(AnyItem):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object as text.")
    parsed_arguments: Any = Field(None, description="Without effect; clients add it.")


class FunctionOutputItem(AnyItem):
    type: Literal["function_call_output"]
    call_id: str = Field(description="The call_id of a function_call before it.")
    output: Content


class ReasoningPart(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(AnyItem):
    type: Literal["reasoning"]
    summary: list[ReasoningPart] | None = Field(None, description="Read if there is no content.")
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = Unused


class ItemReference(Body):
    type: Literal["item_reference"] | None = None
    id: str = Field(description="The id of an item of a response that is kept.")


def kind_of(item: Any) -> str | None:
    """The type of an item before it is checked; messages and references need not name theirs."""
    if not isinstance(item, dict):
        return None
    return item.get("type") or ("message" if "role" in item else "item_reference")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        kind_of,
        custom_error_type="item_type",
        custom_error_message=f"items of this type are not served, only {', '.join(KINDS)}",
    ),
]


def new_id(prefix: str) -> str:
    """An id as the original's look: msg_..., fc_..., rs_..., resp_..."""
    return f"{prefix}_{uuid.uuid4().hex}"


def joined_text(content: Content | Sequence[ReasoningPart] | None) -> str:
    """Content, or parts of it, as one text."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content or ())


def output_text(text: str, log_probs: list[dict] | None = None) -> dict[str, Any]:
    """The content part of an assistant's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": log_probs or []}


def message_item(role: str, text: str, name: str | None = None) -> dict[str, Any]:
    """A message as it is kept; name: its id, a new one by default."""
    part = output_text(text) if role == "assistant" else {"type": "input_text", "text": text}
    return {
        "id": name or new_id("msg"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [part],
    }


def as_kept(item: Item) -> dict[str, Any]:
    """An item of a request as it is kept and returned. Not for references."""
    if item.type == "function_call":
        return {
            "id": item.id or new_id("fc"),
            "type": item.type,
            "status": "completed",
            "call_id": item.call_id,
            "name": item.name,
            "arguments": item.arguments,
        }
    if item.type == "function_call_output":
        return {
            "id": item.id or new_id("fc"),
            "type": item.type,
            "status": "completed",
            "call_id": item.call_id,
            "output": joined_text(item.output),
        }
    if item.type == "reasoning":
        text = joined_text(item.content) or joined_text(item.summary)
        return {
            "id": item.id or new_id("rs"),
            "type": item.type,
            "summary": [],
            "content": [{"type": "reasoning_text", "text": text}] if text else [],
        }
    return message_item(item.role, joined_text(item.content), item.id)


def as_messages(instructions: str | None, items: Sequence[dict]) -> list[dict[str, Any]]:
    """The messages of a chat request for a conversation of kept items.

    System messages at the beginning become one, for the template gives only the first the place
    that it has in training. ApiError 400 for the output of a call that was never made.
    """
    system, messages, made = [instructions] if instructions else [], [], set()
    for item in items:
        if item["type"] == "function_call_output":
            check_made(item["call_id"], made)
            result = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            messages.append(result)
        elif item["type"] == "message" and item["role"] != "assistant":
            text = item["content"][0]["text"]
            if item["role"] != "user" and not messages:
                system.append(text)
            else:
                messages.append({"role": item["role"], "content": text})
        elif item["type"] != "reasoning" or item["content"]:
            add_to_turn(messages, item)
            made.add(item.get("call_id"))
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return head + messages


def check_made(call_id: str, made: set[str | None]) -> None:
    """ApiError 400 unless a call with this id was made."""
    if call_id not in made:
        raise ApiError(
            400, f"no function_call before its output has the call_id {call_id!r}", "input"
        )


def add_to_turn(messages: list[dict], item: dict) -> None:
    """Add reasoning, a call or the assistant's text to the last message, or begin the next one."""
    kind, last = item["type"], messages[-1] if messages else {}
    is_open = last.get("role") == "assistant" and (
        kind == "function_call" or not (last["content"] or "tool_calls" in last)
    )
    if not is_open:
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif kind == "message":
        last["content"] = item["content"][0]["text"]
    else:
        text = "".join(part["text"] for part in item["content"])
        last["reasoning_content"] = last.get("reasoning_content", "") + text
