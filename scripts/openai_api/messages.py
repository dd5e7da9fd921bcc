"""The messages of a chat request, checked field by field.

Types are strict ("1" is not 1). Null means "not given". A field that no class lists is read and set
aside, for `ignored_fields` to name; a field in NOT_SERVED would change the answer and is refused.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_SERVED = {
    "suffix": "inserting text before a suffix is not supported",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text only",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "there is no web search; offer a tool",
    "conversation": "conversations are not kept; use previous_response_id",
    "prompt": "there are no stored prompts; use instructions and input",
    "context_management": "conversations are not compacted; use truncation",
    "images": "this model reads text only",
    "image_url": "this model reads text only",
    "input_audio": "this model reads text only",
    "file": "this model reads text only",
}

Unused = Field(None, description="Without effect.")
NotServed = Field(None, description="Not served.")


class Body(BaseModel):
    """What all parts of a request have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str
    image_url: None = NotServed
    input_audio: None = NotServed
    file: None = NotServed


Text = str | list[TextPart]


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="A JSON object as text.")
    parsed_arguments: Any = Field(None, description="Without effect; clients add it.")


class ToolCall(Body):
    id: str
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = Unused


class AnyMessage(Body):
    name: str | None = Unused
    audio: None = NotServed
    function_call: None = NotServed
    images: None = NotServed


class PlainMessage(AnyMessage):
    role: Literal["system", "developer", "user"]
    content: Text


class AssistantMessage(AnyMessage):
    role: Literal["assistant"]
    content: Text | None = Field(
        None, description="May be null if there are tool_calls or reasoning_content."
    )
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = Unused
    annotations: list[Any] | None = Unused
    parsed: Any = Field(None, description="Without effect; clients add it.")

    @model_validator(mode="after")
    def says_something(self) -> "AssistantMessage":
        if self.content is None and self.reasoning_content is None and not self.tool_calls:
            raise ValueError(
                "an assistant's message needs content, reasoning_content or tool_calls"
            )
        return self


class ToolMessage(AnyMessage):
    role: Literal["tool"]
    content: Text
    tool_call_id: str = Field(description="The id of a call that was made before.")


Message = Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def text_of(content: Text | None) -> str | None:
    """The content of a message as one text."""
    if isinstance(content, str | None):
        return content
    return "".join(part.text for part in content)


def check_results(messages: Sequence[Message]) -> None:
    """ValueError for a tool's result that belongs to no call."""
    made = set()
    for i, message in enumerate(messages):
        if message.role == "assistant":
            made |= {call.id for call in message.tool_calls or ()}
        elif message.role == "tool" and message.tool_call_id not in made:
            raise ValueError(
                f"messages[{i}].tool_call_id: no call before it has the id {message.tool_call_id!r}"
            )
