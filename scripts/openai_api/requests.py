"""The bodies of /v1/chat/completions and /v1/completions, checked field by field.

What holds for the fields of messages (see `messages`) holds for these. The fields of other servers
that are listed here mean the same as there.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scripts.openai_api.messages import Body, Message, NotServed, Unused, check_results

MOST_CHOICES = 128
# -1, as in other servers: as many as there is room for
Length = Annotated[int, Field(ge=1)] | Literal[-1]


class Function(Body):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of an object; none: no arguments."
    )
    strict: bool | None = Field(
        None, description="Refuse a schema that cannot be followed exactly."
    )


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = Unused
    description: str | None = Unused
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Without effect: the schema is always followed.")


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        None, description="Without effect: chunks are not padded."
    )


class TemplateOptions(Body):
    enable_thinking: bool | None = None
    open_thinking: bool | None = Field(None, description="The same as enable_thinking.")


class SampledRequest(Body):
    """The fields that all endpoints have which sample completions."""

    model: str
    temperature: float | None = Field(
        None, ge=0, le=2, description="Default 1; 0 is greedy decoding."
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample among the most probable tokens that together have this probability; "
        "0 leaves the most probable one, which is greedy decoding.",
    )
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
    seed: int | None = Field(
        None, description="The same seed gives the same completion; choice i takes seed + i."
    )
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(
        None,
        description="Looked for in free text: not in reasoning, in the arguments of calls, or in "
        "JSON that is enforced.",
    )
    ignore_eos: bool | None = Field(None, description="Extension: continue until max_tokens.")
    stream: bool | None = None
    user: str | None = Unused


class GenerationRequest(SampledRequest):
    """The fields that chat and completions have."""

    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def options_belong_to_streams(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true, or leave it out")
        return self


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_tokens: Length | None = Field(
        None, description="Cut to the room in the context, which is the default; -1: all of it."
    )
    max_completion_tokens: Length | None = Field(
        None, description="The same; it wins where both are given."
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Extension. Default true, the model begins a message of its own; false: it "
        "writes what follows the last message. Must not be true with continue_final_message.",
    )
    continue_final_message: bool | None = Field(
        None, description="Extension: continue the text of the last message, an assistant's."
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
    open_thinking: bool | None = Field(
        None, description="Extension: the same as chat_template_kwargs.enable_thinking."
    )
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, Any] | None = Unused
    store: bool | None = Field(None, description="Without effect: nothing is stored.")
    service_tier: str | None = Unused
    safety_identifier: str | None = Unused
    prompt_cache_key: str | None = Field(
        None, description="Without effect: beginnings in common are always reused."
    )
    verbosity: Literal["low", "medium", "high"] | None = Unused
    suffix: None = NotServed
    functions: None = NotServed
    function_call: None = NotServed
    audio: None = NotServed
    prediction: None = NotServed
    web_search_options: None = NotServed

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
        if self.ignore_eos and (names or self.content_schema() is not None):
            raise ValueError(
                "ignore_eos never ends, but tools and response_format decide the end: choose one"
            )
        if self.continue_final_message:
            self.check_continuation()
        check_results(self.messages)
        self.thinking()
        return self

    def check_continuation(self) -> None:
        """ValueError unless the last message can be continued."""
        last = self.messages[-1]
        if self.add_generation_prompt:
            raise ValueError(
                "continue_final_message continues the last message, add_generation_prompt begins "
                "a new one: set one of them to false"
            )
        if last.role != "assistant":
            raise ValueError(
                f"continue_final_message: the last message has the role {last.role!r}; end with "
                "an assistant's message, whose text will be continued"
            )
        if last.tool_calls:
            raise ValueError(
                "continue_final_message: the last message ends with tool_calls, which cannot be "
                "continued; leave them out, or add their results"
            )
        if not self.has_free_text():
            raise ValueError(
                "continue_final_message: a call or JSON that is enforced cannot begin within a "
                "message; leave out tool_choice or response_format"
            )

    def content_schema(self) -> dict[str, Any] | None:
        """JSON schema of the content; None for free text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return form.json_schema.schema_ if form.type == "json_schema" else {"type": "object"}

    def has_free_text(self) -> bool:
        """Whether the completion may have content that no schema decides."""
        return self.content_schema() is None and not self.must_call()

    def must_call(self) -> bool:
        """Whether the completion has to call a tool."""
        return self.tool_choice not in (None, "none", "auto")

    def thinking(self) -> bool | None:
        """True: think before answering; False: answer at once; None: the model decides."""
        options = self.chat_template_kwargs or TemplateOptions()
        given = {options.enable_thinking, options.open_thinking, self.open_thinking} - {None}
        if self.reasoning_effort is not None:
            given.add(self.reasoning_effort not in ("none", "minimal"))
        if len(given) > 1:
            raise ValueError(
                "chat_template_kwargs, open_thinking and reasoning_effort contradict each other"
            )
        return given.pop() if given else None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="One or several texts or lists of token ids."
    )
    max_tokens: int | None = Field(
        None,
        ge=-1,
        description="Default 16; 0 with echo only scores the prompt; -1: all the room there is.",
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, description="Must be n, if given.")
    suffix: None = NotServed

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
