"""The bodies of /v1/chat/completions and /v1/completions, checked field by field.

Types are strict ("1" is not 1), and an unlisted field is refused rather than ignored. `parse` turns
a body into one of the models, or names the faulty field in an ApiError.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scripts.openai_api.errors import ApiError

MOST_CHOICES = 128
NOT_SERVED = {  # fields of the original that would change the completion
    "suffix": "inserting text before a suffix is not supported",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text only",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "there is no web search; offer a tool",
    "image_url": "this model reads text only",
    "input_audio": "this model reads text only",
    "file": "this model reads text only",
}

Unused = Field(None, description="Without effect.")


Parsed = TypeVar("Parsed", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


Text = str | list[TextPart]


class CalledFunction(Strict):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Unused


class PlainMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Text
    name: str | None = Unused


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Text | None = Field(None, description="May be null if there are tool_calls.")
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = Unused
    refusal: str | None = Unused
    annotations: list[Any] | None = Unused
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Text
    tool_call_id: str = Field(description="The id of a call that was made before.")
    name: str | None = Unused


Message = Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of an object; none: no arguments."
    )
    strict: bool | None = Field(
        None, description="Refuse a schema that cannot be followed exactly."
    )


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str = Field("answer", pattern="^[a-zA-Z0-9_-]{1,64}$", description="Without effect.")
    description: str | None = Unused
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Without effect: the schema is always followed.")


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        None, description="Without effect: chunks are not padded."
    )


class TemplateOptions(Strict):
    enable_thinking: bool | None = None
    open_thinking: bool | None = Field(None, description="The same as enable_thinking.")


class GenerationRequest(Strict):
    """The fields that both endpoints have."""

    model: str
    temperature: float | None = Field(
        None, ge=0, le=2, description="Default 1; 0 is greedy decoding."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=-1, description="Extension: sample among the k most probable; 0 and -1: all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Extension: least fraction of the greatest probability."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Extension: above 1, used tokens become rarer."
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id -> bias."
    )
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(
        None, description="The same seed gives the same completion; choice i takes seed + i."
    )
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = Field(None, description="Extension: continue until max_tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Unused

    @model_validator(mode="after")
    def options_belong_to_streams(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true, or leave it out")
        return self


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, description="Cut to the room in the context, which is the default."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The same; it wins where both are given."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: (
        Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="none and minimal answer at once, the others think first."
    )
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = Unused
    store: bool | None = Field(None, description="Without effect: nothing is stored.")
    service_tier: str | None = Unused
    safety_identifier: str | None = Unused
    prompt_cache_key: str | None = Field(
        None, description="Without effect: beginnings in common are always reused."
    )
    verbosity: Literal["medium"] | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the "
                "tools"
            )
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice 'required' needs tools")
        self.ends_agree(names)
        check_results(self.messages)
        self.thinking()
        return self

    def ends_agree(self, tools: Sequence[str]) -> None:
        """ValueError for two fields that disagree about the end of the completion."""
        is_json = self.content_schema() is not None
        if self.ignore_eos and (tools or is_json):
            raise ValueError(
                "ignore_eos never ends, but tools and response_format decide the end: choose one"
            )
        if self.stop and (is_json or self.must_call()):
            raise ValueError(
                "stop would cut off JSON or calls that must be complete: leave it out, or leave "
                "out response_format and the tool_choice that demands a call"
            )

    def content_schema(self) -> dict[str, Any] | None:
        """JSON schema of the content; None for free text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return form.json_schema.schema_ if form.type == "json_schema" else {"type": "object"}

    def must_call(self) -> bool:
        """Whether the completion has to call a tool."""
        return self.tool_choice not in (None, "none", "auto")

    def thinking(self) -> bool | None:
        """True: think before answering; False: answer at once; None: the model decides."""
        options = self.chat_template_kwargs or TemplateOptions()
        given = {options.enable_thinking, options.open_thinking} - {None}
        if self.reasoning_effort is not None:
            given.add(self.reasoning_effort not in ("none", "minimal"))
        if len(given) > 1:
            raise ValueError("chat_template_kwargs and reasoning_effort contradict each other")
        return given.pop() if given else None


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


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="One or several texts or lists of token ids."
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Default 16; 0 with echo only scores the prompt."
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, description="Must be n, if given.")
    suffix: None = None

    @model_validator(mode="after")
    def fields_agree(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo: true, there would be nothing to return")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported: leave it out, or give the value of n")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list of texts and of lists of token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt


def parse(model: type[Parsed], body: bytes) -> Parsed:
    """The request in `body` as an instance of `model`. ApiError 400 unless it is fitting JSON."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """The ApiError of the first fault; of several readings of a field, that of the furthest."""
    faults = error.errors(include_url=False, include_input=False)
    worst = max(faults, key=lambda one: len(one["loc"]))
    where = readable_path(worst["loc"])
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
    field = str(worst["loc"][-1]) if worst["loc"] else ""
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == "extra_forbidden":
        message = NOT_SERVED.get(field, "there is no such field, or it is not supported")
    elif field == "type" and "content" in worst["loc"]:
        message = "only text parts are supported: this model reads text only"
    elif field in NOT_SERVED:
        message = NOT_SERVED[field]
    return ApiError(
        400,
        f"{where}: {message}" if where else message,
        param=where or None,
        code="unsupported_parameter" if worst["type"] == "extra_forbidden" else "invalid_value",
    )


def readable_path(loc: tuple[str | int, ...]) -> str:
    """messages[0].content from ("messages", 0, "user", "content", "str"): without the names of
    pydantic's alternatives.
    """
    path = ""
    for i, part in enumerate(loc):
        is_tag = loc[:i] == ("response_format",) or (i == 2 and loc[0] == "messages")
        if isinstance(part, int):
            path += f"[{part}]"
        elif (
            not is_tag and "[" not in part and part not in ("str", "int") and not part[:1].isupper()
        ):
            path += f".{part}" if path else part
    return path
