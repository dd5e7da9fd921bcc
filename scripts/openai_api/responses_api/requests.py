"""The body of /v1/responses, checked field by field, and the chat request that it stands for.

What holds for the fields of chat (see `scripts.openai_api.requests`) holds for these.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scripts.openai_api.errors import ApiError
from scripts.openai_api.messages import Body, NotServed, Unused
from scripts.openai_api.model_pool import ServedModel
from scripts.openai_api.parsing import parse
from scripts.openai_api.plans import Plan, chat_prompt, plan_chat
from scripts.openai_api.requests import (
    ChatRequest,
    Function,
    JsonSchema,
    Length,
    PlainFormat,
    SampledRequest,
    TemplateOptions,
)
from scripts.openai_api.responses_api.items import Item, as_messages

LOG_PROBS = "message.output_text.logprobs"
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
]
PARAMS = {"messages": "input", "response_format": "text.format"}  # chat's names -> those of here
PASSED_ON = {*SampledRequest.model_fields, "parallel_tool_calls", "chat_template_kwargs"}


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunctionTool] = Field(description="The others are not offered.")


class NamedSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: Annotated[PlainFormat | NamedSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Unused


class ReasoningOptions(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="none and minimal answer at once, the others think first."
    )
    summary: str | None = Field(None, description="Without effect: the reasoning comes as it is.")
    generate_summary: str | None = Unused


class ObfuscationOptions(Body):
    include_obfuscation: bool | None = Field(
        None, description="Without effect: events are not padded."
    )


class ResponseRequest(SampledRequest):
    input: str | list[Item] | None = Field(
        None, description="A user's text, or items; may be left out with previous_response_id."
    )
    instructions: str | None = Field(
        None, description="The system message; not taken over from a previous response."
    )
    previous_response_id: str | None = Field(
        None, description="Continue the conversation of this response, if it is kept."
    )
    store: bool | None = Field(None, description="Default true: keep the response for later.")
    max_output_tokens: Length | None = Field(
        None, description="Cut to the room in the context, which is the default; -1: all of it."
    )
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | AllowedTools | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: TemplateOptions | None = Field(None, description="Extension.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest turns if the conversation is too long."
    )
    include: list[Included] | None = Field(
        None,
        description=f"{LOG_PROBS}: with log-probs. The others name what this server never has.",
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: ObfuscationOptions | None = None
    metadata: Annotated[dict[str, str | None], Field(max_length=16)] | None = None
    background: bool | None = Field(None, description="Must not be true.")
    max_tool_calls: int | None = Field(
        None, description="Without effect: it counts calls of tools that the server runs."
    )
    service_tier: str | None = Unused
    safety_identifier: str | None = Unused
    prompt_cache_key: str | None = Field(
        None, description="Without effect: beginnings in common are always reused."
    )
    prompt_cache_retention: str | None = Unused
    conversation: None = NotServed
    prompt: None = NotServed
    context_management: None = NotServed

    @field_validator("background")
    @classmethod
    def waits_for_the_end(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("nothing runs in the background: leave it out, and set stream to true")
        return value

    @model_validator(mode="after")
    def fields_agree(self) -> "ResponseRequest":
        if self.top_logprobs and not self.wants_log_probs():
            raise ValueError(f"top_logprobs needs include: [{LOG_PROBS!r}]")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true, or leave it out")
        return self

    def wants_log_probs(self) -> bool:
        """Whether the text comes with log-probs."""
        return LOG_PROBS in (self.include or ())

    def text_format(self) -> PlainFormat | NamedSchemaFormat:
        """The format of the text."""
        given = self.text and self.text.format
        return given or PlainFormat(type="text")


def as_chat(request: ResponseRequest, items: Sequence[dict]) -> ChatRequest:
    """The ChatRequest for a conversation of kept items. ApiError 400 where fields disagree."""
    messages = as_messages(request.instructions, items)
    if not messages:
        raise ApiError(400, "input: give a text, or at least one item", "input")
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, AllowedTools):
        tools, choice = allowed(tools, choice), choice.mode
    elif isinstance(choice, NamedFunctionTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    chat = request.model_dump(include=PASSED_ON, exclude_none=True) | {
        "messages": messages,
        "tools": [in_chat(tool, "function") for tool in tools],
        "tool_choice": choice,
        "response_format": in_chat(request.text_format(), "json_schema"),
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": request.reasoning and effort_in_chat(request.reasoning),
    }
    if request.wants_log_probs():
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return parse(ChatRequest, json.dumps(chat).encode())


def allowed(tools: Sequence[FunctionTool], choice: AllowedTools) -> list[FunctionTool]:
    """The tools that a choice allows. ApiError 400 if it names others."""
    names = {tool.name for tool in choice.tools}
    unknown = names - {tool.name for tool in tools}
    if unknown:
        raise ApiError(
            400, f"tool_choice names {min(unknown)!r}, which is not among the tools", "tool_choice"
        )
    return [tool for tool in tools if tool.name in names]


def in_chat(part: FunctionTool | PlainFormat | NamedSchemaFormat, kind: str) -> dict[str, Any]:
    """A tool or a format in chat's form: the fields of its kind have a place of their own."""
    fields = part.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": part.type, kind: fields} if part.type == kind else {"type": part.type}


def effort_in_chat(reasoning: ReasoningOptions) -> str | None:
    """The reasoning_effort of chat, which does not know the greatest."""
    return "xhigh" if reasoning.effort == "max" else reasoning.effort


def plan_response(request: ResponseRequest, items: Sequence[dict], served: ServedModel) -> Plan:
    """The Plan of a request and its conversation. ApiError 400 for requests beyond the model."""
    try:
        chat = as_chat(request, items)
        if request.truncation == "auto":
            chat = truncate(chat, served)
        return plan_chat(chat, served)
    except ApiError as error:
        error.param = PARAMS.get(error.param, error.param)
        raise


def truncate(request: ChatRequest, served: ServedModel) -> ChatRequest:
    """The request without as many of its oldest turns as it takes to leave room for a completion.

    The system message and the last turn stay; a turn begins with a message of the user. The room:
    the longest completion that is asked for, by default a quarter of the context, at most half.
    """
    messages, limit = request.messages, request.max_completion_tokens or -1
    room = served.max_len // 4 if limit < 0 else min(limit, served.max_len // 2)
    head = messages[:1] if messages[0].role == "system" else []
    starts = [i for i, message in enumerate(messages) if i > len(head) and message.role == "user"]
    cuts = [len(head), *starts]

    def cut(number: int) -> ChatRequest:
        return request.model_copy(update={"messages": [*head, *messages[cuts[number] :]]})

    def fits(number: int) -> bool:
        try:
            return len(chat_prompt(cut(number), served)[0]) + room <= served.max_len
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            return False

    return cut(min(bisect_left(range(len(cuts)), True, key=fits), len(cuts) - 1))
