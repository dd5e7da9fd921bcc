"""From a request to the engine's input: prompts, sampling parameters, and how the completion will
be read.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataset.chat.format import (
    canonical_json,
    document_start,
    encode_continuation,
    encode_conversation,
    encode_prompt,
    in_open_reasoning,
    opens_reasoning,
)
from dataset.chat.reply import CALL, END_CALL, END_THINK, THINK
from model.sampling import SamplingParams
from scripts.openai_api.errors import ApiError
from scripts.openai_api.grammars import completion_grammar
from scripts.openai_api.messages import Message, text_of
from scripts.openai_api.model_pool import ServedModel
from scripts.openai_api.requests import (
    ChatRequest,
    CompletionRequest,
    Function,
    GenerationRequest,
    NamedTool,
    Tool,
)

DEFAULT_COMPLETION = 16  # max_tokens of /v1/completions if none is given, as in the original
COLDEST = 1e-4  # a lower temperature is greedy decoding
# fields of the request that are SamplingParams' too
PASSED_ON = (
    *("temperature", "top_p", "min_p", "ignore_eos", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass
class Echo:
    """A prompt that is sent back: its text, its tokens, and, once computed, their log-probs."""

    text: str
    tokens: list[int]
    top: list | None = None


@dataclass
class Plan:
    """A request for the engine: `prompts` (lists of token ids), and the SamplingParams of each
    completion, n for each prompt in turn.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    n: int
    wants_log_probs: bool = False
    in_reasoning: bool = False  # the prompt has opened the think block
    is_begun: bool = False  # the prompt ends within the reasoning or content of a message
    offers_tools: bool = False  # then a grammar makes all calls well-formed
    echoes: list[Echo] = field(default_factory=list)


def plan_chat(request: ChatRequest, served: ServedModel) -> Plan:
    """The Plan of a ChatRequest. ApiError 400 for requests beyond the model."""
    prompt, tools = chat_prompt(request, served)
    in_reasoning, is_begun = end_of_prompt(request, served, prompt)
    thinking = False if is_begun or request.thinking() is False else None
    grammar = choose_grammar(request, tools, in_reasoning or thinking, served)
    limit = request.max_completion_tokens or request.max_tokens or -1
    log_probs = (request.top_logprobs or 0) if request.logprobs else None
    stops = stop_scope(request, served, bool(tools), in_reasoning)
    return Plan(
        [prompt],
        sampling_params(request, served, limit, log_probs, grammar, stops),
        request.n or 1,
        log_probs is not None,
        in_reasoning,
        is_begun,
        bool(tools),
    )


def chat_prompt(
    request: ChatRequest, served: ServedModel, any_length: bool = False
) -> tuple[list[int], list[Tool]]:
    """(ids of the prompt, the tools that it offers). ApiError 400 for prompts beyond the model;
    any_length: except those that are too long for it.
    """
    if not served.chats:
        raise ApiError(
            400,
            f"{request.model} was only pretrained: it has no chat template. Use /v1/completions",
            "model",
        )
    tools = [] if request.tool_choice == "none" else list(request.tools or [])
    if isinstance(request.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == request.tool_choice.function.name]
    offered = [offered_tool(tool) for tool in tools] or None
    messages = [as_template_has_it(message) for message in request.messages]
    if not any_length:
        length = sum(len(message["content"] or "") for message in messages)
        length += len(json.dumps(offered or "", ensure_ascii=False))
        check_characters(length, served, "messages")
    try:
        prompt = encode_chat(request, served, messages, offered)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    if not any_length:
        check_length(prompt, served, "messages")
    return prompt, tools


def encode_chat(
    request: ChatRequest, served: ServedModel, messages: list[dict], tools: list[dict] | None
) -> list[int]:
    """The prompt of a chat request. ValueError for messages that cannot be rendered."""
    if request.continue_final_message:
        return encode_continuation(served.tokenizer, messages, tools)
    if request.add_generation_prompt is False:
        return encode_conversation(served.tokenizer, messages, tools)[0]
    return encode_prompt(served.tokenizer, messages, tools, request.thinking())


def end_of_prompt(
    request: ChatRequest, served: ServedModel, prompt: list[int]
) -> tuple[bool, bool]:
    """(in_reasoning, is_begun) of the Plan."""
    if request.continue_final_message:
        last = as_template_has_it(request.messages[-1])
        return in_open_reasoning(last), bool(last["content"] or "reasoning_content" in last)
    return opens_reasoning(served.tokenizer, prompt), False


def offered_tool(tool: Tool) -> dict[str, Any]:
    """A tool of the request as the template shows it: the fields that are given."""
    function = {name: value for name, value in tool.function if value is not None}
    return {"type": tool.type, "function": function}


def as_template_has_it(message: Message) -> dict[str, Any]:
    """A message of the request as `encode_prompt` takes it."""
    content = text_of(message.content)
    out = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.role == "tool":
        out["content"] = canonical_json(content)
    if message.role == "assistant":
        if message.reasoning_content is not None:
            out["reasoning_content"] = message.reasoning_content
            out["content"] = content or ""
        if message.tool_calls:
            out["tool_calls"] = [
                {"name": call.function.name, "arguments": canonical_json(call.function.arguments)}
                for call in message.tool_calls
            ]
    return out


def choose_grammar(
    request: ChatRequest, tools: Sequence[Tool], thinking: bool | None, served: ServedModel
) -> str | None:
    """The grammar of the completion, None without tools or a schema; thinking: that of
    `completion_grammar`. ApiError 400 for schemas that cannot be followed.
    """
    content, must_call = request.content_schema(), request.must_call()
    if content is None and not tools:
        return None
    functions, loose = [tool.function for tool in tools], []
    is_named = isinstance(request.tool_choice, NamedTool)
    parallel = request.parallel_tool_calls is not False and not is_named
    if not must_call:
        loose = [one.name for one in functions if not one.strict and not can_follow(one, served)]
    try:
        grammar = completion_grammar(content, functions, must_call, parallel, thinking, loose)
        served.grammars.constraint(grammar)
    except ValueError as error:
        raise ApiError(
            400, str(error), "response_format" if content is not None else "tools", "invalid_schema"
        ) from error
    return grammar


def can_follow(function: Function, served: ServedModel) -> bool:
    """Whether the schema of a function's arguments can be enforced."""
    try:
        served.grammars.constraint(
            completion_grammar(functions=[function], must_call=True, thinking=False)
        )
    except ValueError:
        return False
    return True


def plan_completion(request: CompletionRequest, served: ServedModel) -> Plan:
    """The Plan of a CompletionRequest. ApiError 400 for prompts that do not fit."""
    prompts, echoes = [], []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            check_characters(len(prompt), served, "prompt")
            own = encode_text(prompt, served)
            ids = with_start(own, served)
            echoes.append(Echo(prompt, own))
        else:
            ids = list(prompt)
            check_ids(ids, served)
            echoes.append(Echo(served.tokenizer.decode(ids), ids))
        check_length(ids, served, "prompt")
        prompts.append(ids)
    if not prompts:
        raise ApiError(
            400, "prompt: an empty list asks for nothing; give at least one prompt", "prompt"
        )
    limit = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
    params = []
    if limit:
        stops = {"stop": stop_texts(request)}
        params = sampling_params(request, served, limit, request.logprobs, None, stops)
        params *= len(prompts)
    wants_log_probs, echoes = request.logprobs is not None, echoes if request.echo else []
    return Plan(prompts, params, request.n or 1, wants_log_probs, echoes=echoes)


def encode_text(text: str, served: ServedModel) -> list[int]:
    """The ids of a text that may spell special tokens."""
    return served.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def with_start(ids: list[int], served: ServedModel) -> list[int]:
    """The ids of a text as a prompt: a document's, unless it begins with a special token."""
    begins_special = ids and ids[0] in served.special_ids
    return ids if begins_special else [*document_start(served.tokenizer), *ids]


def check_ids(ids: Iterable[int], served: ServedModel, field: str = "prompt") -> None:
    """ApiError 400 for token ids that the vocabulary does not have."""
    size = len(served.tokenizer)
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise ApiError(
            400, f"{field}: there is no token {wrong}: ids go from 0 to {size - 1}", field
        )


def check_characters(number: int, served: ServedModel, field: str) -> None:
    """ApiError 400 for a text that cannot fit however it is cut: tokenizing holds up others."""
    if number > served.longest * served.max_len:
        tokens = f"{number // served.longest:,} tokens"
        raise too_long(f"{number:,} characters, which are more than {tokens}", served, field)


def check_length(ids: Sequence[int], served: ServedModel, field: str) -> None:
    """ApiError 400 unless the prompt leaves room for one token."""
    if not ids:
        raise ApiError(
            400,
            "prompt: an empty list of tokens cannot be continued; give at least one token",
            "prompt",
        )
    if len(ids) >= served.max_len:
        raise too_long(f"{len(ids)} tokens", served, field)


def too_long(length: str, served: ServedModel, field: str) -> ApiError:
    """The error for a prompt of this length."""
    return ApiError(
        400,
        f"the prompt has {length}, and this model's context of {served.max_len} holds prompt and "
        "completion: shorten it",
        field,
        "context_length_exceeded",
    )


def stop_texts(request: GenerationRequest) -> tuple[str, ...]:
    """The stop texts of a request."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def stop_scope(
    request: ChatRequest, served: ServedModel, offers_tools: bool, in_reasoning: bool
) -> dict[str, Any]:
    """The fields of SamplingParams by which stop texts are looked for in free content alone."""
    if not request.has_free_text():
        return {}
    switches = {THINK: False, END_THINK: True}
    if offers_tools:
        switches |= {CALL: False, END_CALL: True}
    ids = served.tokenizer.get_added_vocab()
    return {
        "stop": stop_texts(request),
        "stop_switches": {ids[mark]: on for mark, on in switches.items() if mark in ids},
        "in_stop_scope": not in_reasoning,
    }


def sampling_params(
    request: GenerationRequest,
    served: ServedModel,
    max_tokens: int,
    log_probs: int | None,
    grammar: str | None,
    stops: dict[str, Any],
) -> list[SamplingParams]:
    """SamplingParams for each of n completions; with a seed they take seed, seed + 1, ...

    stops: the fields of SamplingParams that concern stop texts.
    """
    given = {name: value for name in PASSED_ON if (value := getattr(request, name)) is not None}
    check_ids(given.get("logit_bias", ()), served, "logit_bias")
    if given.get("temperature", 1) < COLDEST or given.get("top_p") == 0:
        given |= {"temperature": 0, "top_p": 1}
    try:
        return [
            SamplingParams(
                **given,
                top_k=min(max(request.top_k or 0, 0), len(served.tokenizer)),
                **stops,
                max_tokens=served.max_len if max_tokens < 0 else min(max_tokens, served.max_len),
                logprobs=log_probs,
                seed=None if request.seed is None else request.seed + i,
                constraint=served.grammars.constraint(grammar) if grammar else None,
            )
            for i in range(request.n or 1)
        ]
    except ValueError as error:
        raise ApiError(400, str(error)) from error
