"""Conversation -> token ids and the mask of the trained ones, through the tokenizer's own chat
template.

`apply_chat_template` renders a string and tokenizes it, so a user who types `<|im_end|>` ends the
turn. Here the template's special tokens are kept apart from supplied text: in every supplied
string, a special token's spelling loses its first character to a stand-in that occurs nowhere in
the conversation; whatever special spelling is left after rendering is the template's own. On text
without such spellings the ids equal `apply_chat_template`'s, unless an assistant's message begins
with a line break: there the generation prompt ends with one, and the model's completion cannot fuse
with it. `apply_chat_template` fuses the two.
"""

from __future__ import annotations

import json
import re
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from dataset.files.jsonl import check_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
# the compiled template is shared, and holds the spans of the one conversation that it renders
RENDERING = threading.Lock()
OPEN_THINK = "<think>"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINK = re.compile(r"<think>(.*?)</think>\n*(.*)", re.DOTALL)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list | str | None = None,
    **options: bool,
) -> tuple[list[int], list[bool]]:
    """Encode a whole conversation; `options` are the template's.

    Returns (input_ids, is_target), both [T]; is_target marks the template's generation spans: the
    assistant's reasoning, content, calls and `<|im_end|>`, but for messages with "train": False. A
    span is tokenized by itself, so that its ids follow the ids of `encode_prompt` exactly.
    ValueError where `check_conversation` finds a fault.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy

    check_conversation(messages, tools)
    messages, tools = normalize_conversation(messages, tools)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    pattern = _special_pattern(tuple(special))
    content = json.dumps([messages, tools], ensure_ascii=False, default=str)
    check_utf8(content)
    stand_in = _unused_character(content)

    def hide(value):
        if isinstance(value, str):
            return pattern.sub(lambda match: stand_in + match[0][1:], value)
        if isinstance(value, list):
            return [hide(item) for item in value]
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        return value

    hidden = hide(messages)
    if options.get("continue_final_message") and in_open_reasoning(messages[-1]):
        hidden[-1]["content"] = OPEN_THINK + hidden[-1]["content"].partition("think>")[2]
    template = tokenizer.get_chat_template()
    with RENDERING:
        rendered, spans = render_jinja_template(
            conversations=[hidden],
            tools=hide(tools),
            chat_template=template,
            # warns about a template without
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            **options,
        )
    plain = plain_encoder(tokenizer)

    def encode(piece: str) -> list[int]:
        ids = []
        for part in pattern.split(piece):
            is_special = part in special
            ids += [special[part]] if is_special else plain.encode(part.replace(stand_in, "<")).ids
        return ids

    text, position = rendered[0], 0
    spans = spans[0] if spans else []
    input_ids, is_target = [], []
    answers = (message for message in messages if message["role"] == "assistant")
    wanted = [message.get("train", True) for message in answers]
    if all(wanted):
        wanted = [True] * len(spans)
    elif len(wanted) != len(spans):
        raise ValueError(
            "an answer is not to be trained, but the chat template marks no single answers "
            "({% generation %}). Use one that does."
        )
    for (start, end), is_wanted in zip([*spans, (len(text), len(text))], [*wanted, False]):
        for piece, trained in ((text[position:start], False), (text[start:end], is_wanted)):
            ids = encode(piece)
            input_ids += ids
            is_target += [trained] * len(ids)
        position = end
    return input_ids, is_target


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list | str | None = None,
    enable_thinking: bool | None = None,
) -> list[int]:
    """Encode a conversation up to where the assistant writes next: ids [T] that end with the
    generation prompt.

    enable_thinking: True opens a think block, False writes an empty one, None leaves it to the
    model. The conversation with the answer begins with these ids, unless the template drops
    reasoning that one of the two still shows.
    """
    options = {}
    if enable_thinking is not None:  # Qwen's name and that of the minimind tutorials
        options = {"enable_thinking": enable_thinking, "open_thinking": enable_thinking}
    return encode_conversation(tokenizer, messages, tools, add_generation_prompt=True, **options)[0]


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list | str | None = None
) -> list[int]:
    """Encode a conversation up to the end of its last message's content, for the model to continue
    there: ids [T], those of `apply_chat_template(continue_final_message=True)`.

    Content that begins with `<think>` and has no `</think>` is continued within the think block.
    ValueError if the last message has no content.
    """
    return encode_conversation(tokenizer, messages, tools, continue_final_message=True)[0]


def opens_reasoning(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> bool:
    """Whether a prompt ends with an open think block; a template may know no such switch."""
    return tokenizer.decode(prompt[-8:]).rstrip().endswith(OPEN_THINK)


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before a document's first: <|endoftext|>, or the tokenizer's own beginning."""
    start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if start is None else [start]


def in_open_reasoning(message: dict) -> bool:
    """Whether an assistant's message ends within a think block that its content has opened."""
    content = message.get("content") or ""
    is_whole = isinstance(message.get("reasoning_content"), str) or "</think>" in content
    return message["role"] == "assistant" and content.startswith(OPEN_THINK) and not is_whole


def check_conversation(messages: Any, tools: Any = None) -> None:
    """Raise ValueError "what is wrong. fix" unless the chat template can render the messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            "a conversation must be a list of at least one message. Give [{'role': ..., 'content': "
            "...}]."
        )
    _check_tools(tools, "tools")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"message {i} is a {type(message).__name__}. Give {{'role': ..., 'content': ...}}."
            )
        _check_message(i, message)


def check_answers(messages: list[dict]) -> None:
    """Raise ValueError if an assistant's message that is trained on says nothing at all."""
    for i, message in enumerate(messages):
        said = (message.get("content") or "") + (message.get("reasoning_content") or "")
        is_trained = message["role"] == "assistant" and message.get("train", True)
        if is_trained and not message.get("tool_calls") and not said.strip():
            raise ValueError(f"message {i}: the answer is empty. Fill it, or leave it out.")


def _check_message(i: int, message: dict) -> None:
    role, content = message.get("role"), message.get("content")
    if "from" in message and role is None:
        raise ValueError(
            f'message {i} has "from" and "value". Convert the file: '
            "python dataset/prepare_data.py convert FILE --out rows.jsonl"
        )
    if role not in ROLES:
        raise ValueError(f"message {i} has role {role!r}. Use one of {', '.join(ROLES)}.")
    calls = _json_list(message.get("tool_calls"), f"message {i}: tool_calls")
    if calls and role != "assistant":
        raise ValueError(f"message {i}: tool_calls on role {role}. Only the assistant calls tools.")
    for n, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"message {i}: tool_calls[{n}] has no name. Give {{'name': ..., 'arguments': "
                f"{{...}}}}."
            )
        if not isinstance(function.get("arguments"), dict | str | None):
            raise ValueError(
                f"message {i}: tool_calls[{n}] has arguments of another type. Give an object."
            )
    if _check_tools(message.get("tools"), f"message {i}: tools") and (role != "system" or i > 0):
        raise ValueError(
            f"message {i}: tools on role {role}. Put them on a system message that comes first."
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(
            f"message {i} ({role}) has content of type {type(content).__name__}. Give a string."
        )
    if not isinstance(message.get("train", True), bool):
        raise ValueError(f"message {i}: train is {message['train']!r}. Give true or false.")
    if not isinstance(message.get("reasoning_content"), str | None):
        raise ValueError(
            f"message {i}: reasoning_content is no string. Give a string, or leave it out."
        )


def canonical_json(text: Any) -> Any:
    """A JSON object or list as `json.dumps` spells it, with a space behind each comma and colon, as
    the template spells arguments; everything else as it is.

    JavaScript's JSON.stringify, pydantic and orjson write no spaces, which are other tokens: a
    model that has seen one spelling understands the other badly.
    """
    if not isinstance(text, str) or text.strip()[:1] not in ("{", "["):
        return text
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        spelled = json.dumps(value, ensure_ascii=False, allow_nan=False)
        spelled.encode()  # half a surrogate pair is none
        return spelled
    except (ValueError, RecursionError):
        return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _check_tools(value: Any, name: str) -> list:
    tools = _json_list(value, name)
    for n, tool in enumerate(tools):
        if not isinstance(tool, dict | str):
            raise ValueError(
                f"{name}[{n}] is a {type(tool).__name__}. Give the function's JSON schema as an "
                "object."
            )
    return tools


def _json_list(value: Any, name: str) -> list:
    """Return a list that is given as it is, as JSON, or as nothing (None, "", "[]", "null")."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: not JSON ({error.msg} at character {error.pos}). Give a list."
            ) from error
    if not isinstance(value, list | None):
        raise ValueError(
            f"{name}: a {type(value).__name__}. Give a list, or a JSON string of a list."
        )
    return value or []


def normalize_conversation(
    messages: list[dict], tools: list | str | None = None
) -> tuple[list[dict], list | None]:
    """Return (messages, tools) as the template wants them: JSON lists parsed, think blocks in a
    field of their own.

    Assistant content that begins with `<think>...</think>` becomes reasoning_content and content.
    """
    tools = _json_list(tools, "tools") or None
    return [_normalize_message(message) for message in messages], tools


def _normalize_message(message: dict) -> dict:
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("tools", "tool_calls"):
        if key in message:
            message[key] = _json_list(message[key], key)
    if message["role"] == "assistant" and "reasoning_content" not in message:
        if think := THINK.fullmatch(message.get("content", "")):
            message["reasoning_content"], message["content"] = think[1], think[2]
    return message


@lru_cache
def _special_pattern(spellings: tuple[str, ...]) -> re.Pattern:
    assert all(spelling[0] == "<" for spelling in spellings), "the stand-in takes the place of '<'"
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _unused_character(text: str) -> str:
    used = set(text)  # E000: private use begins
    return next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the same byte-level BPE without added tokens: it takes `<|im_end|>` for plain text."""
    full = tokenizer.backend_tokenizer
    plain = Tokenizer(full.model)  # shares the vocabulary, copies nothing
    plain.pre_tokenizer = full.pre_tokenizer
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    return plain
