"""Text to tokens and back, and the chat template: the endpoints of vLLM's and llama.cpp's servers.

Where the two call one thing by different names, both names are taken.
"""

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from dataset.chat.format import plain_encoder
from scripts.openai_api.endpoints import find_model
from scripts.openai_api.http import read_body
from scripts.openai_api.messages import Body, Message
from scripts.openai_api.model_pool import ServedModel
from scripts.openai_api.parsing import Parsed, parse
from scripts.openai_api.plans import chat_prompt, check_ids, encode_text, with_start
from scripts.openai_api.requests import ChatRequest, TemplateOptions, Tool

router = APIRouter()

IN_CHAT = {  # fields of a TokenizeRequest that are a ChatRequest's too
    *("model", "messages", "tools", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
}


class OfAnyModel(Body):
    model: str | None = Field(None, description="Default: the first that is served.")


class TokenizeRequest(OfAnyModel):
    prompt: str | None = Field(None, description="A text; vLLM's name.")
    content: str | None = Field(None, description="A text; llama.cpp's name.")
    messages: list[Message] | None = Field(None, description="A chat in place of a text.")
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="vLLM's name: begin as /v1/completions does, with <|endoftext|>. Default true "
        "for prompt, false for content.",
    )
    add_special: bool | None = Field(None, description="The same; llama.cpp's name.")
    parse_special: bool | None = Field(
        None, description="Default true; false: special tokens in the text are text."
    )
    return_token_strs: bool | None = Field(
        None, description="vLLM's name: with token_strs, as the vocabulary spells them."
    )
    with_pieces: bool | None = Field(
        None, description="llama.cpp's name: tokens are objects of id and piece."
    )

    @model_validator(mode="after")
    def there_is_one_text(self) -> "TokenizeRequest":
        if sum(one is not None for one in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        if self.messages is not None and (self.starts() or self.parse_special is False):
            raise ValueError("the chat template decides where messages have special tokens")
        return self

    def starts(self) -> bool:
        """Whether the tokens begin as a prompt of /v1/completions."""
        given = self.add_special_tokens if self.add_special is None else self.add_special
        return self.prompt is not None if given is None else given


class DetokenizeRequest(OfAnyModel):
    tokens: list[int]


class TemplateRequest(ChatRequest):
    model: str | None = Field(None, description="Default: the first that is served.")


async def read(http: Request, kind: type[Parsed]) -> tuple[Parsed, ServedModel, dict[str, str]]:
    """(the request, its model, headers of the response)."""
    request = parse(kind, await read_body(http, http.app.state.max_body_bytes))
    if request.model is None:
        request.model = next(iter(http.app.state.models))
    served = find_model(http, request.model)
    return request, served, http.app.state.ignored_fields.take(request)


@router.post("/tokenize", operation_id="tokenize")
async def tokenize(http: Request) -> Response:
    """The tokens of a text, or of a chat's prompt."""
    request, served, headers = await read(http, TokenizeRequest)
    ids = await asyncio.to_thread(tokens_of, request, served)
    names = served.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    body = {
        "count": len(ids),
        "max_model_len": served.max_len,
        "tokens": [with_piece(one, served) for one in ids] if request.with_pieces else ids,
        "token_strs": names,
    }
    return JSONResponse(body, headers=headers)


@router.post("/detokenize", operation_id="detokenize")
async def detokenize(http: Request) -> Response:
    """The text of tokens, as prompt (vLLM's name) and as content (llama.cpp's)."""
    request, served, headers = await read(http, DetokenizeRequest)
    check_ids(request.tokens, served, "tokens")
    text = await asyncio.to_thread(served.tokenizer.decode, request.tokens)
    return JSONResponse({"prompt": text, "content": text}, headers=headers)


@router.post("/apply-template", operation_id="apply_template")
async def apply_template(http: Request) -> Response:
    """The prompt that the chat template makes of a chat request, as text (llama.cpp's endpoint)."""
    request, served, headers = await read(http, TemplateRequest)
    ids, _ = await asyncio.to_thread(chat_prompt, request, served, any_length=True)
    return JSONResponse({"prompt": served.tokenizer.decode(ids)}, headers=headers)


def tokens_of(request: TokenizeRequest, served: ServedModel) -> list[int]:
    """The ids that a request asks for. ApiError 400 for messages that cannot be rendered."""
    if request.messages is not None:
        fields = request.model_dump(include=IN_CHAT, exclude_none=True, by_alias=True)
        chat = parse(ChatRequest, json.dumps(fields).encode())
        return chat_prompt(chat, served, any_length=True)[0]
    text = request.content if request.prompt is None else request.prompt
    if request.parse_special is False:
        ids = plain_encoder(served.tokenizer).encode(text).ids
    else:
        ids = encode_text(text, served)
    return with_start(ids, served) if request.starts() else ids


def with_piece(token: int, served: ServedModel) -> dict[str, Any]:
    """A token as llama.cpp shows it: with its text, or with the bytes of a part of a character."""
    piece = served.engine.pieces[token]
    try:
        return {"id": token, "piece": piece.decode() or served.names[token]}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(piece)}
