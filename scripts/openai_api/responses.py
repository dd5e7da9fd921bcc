"""Responses, whole or as the chunks of a stream, built from the pieces that an engine hands over.

A token of a stream costs one `json.dumps` of its text: everything around it is made once.
"""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from dataset.chat.reply import CallArguments, CallStart, Content, Reasoning, ReplyParser, collect
from model.engine import Request
from scripts.openai_api.model_pool import Piece, ServedModel
from scripts.openai_api.plans import Echo, Plan

LOWEST = -9999.0  # JSON has no minus infinity
FINGERPRINT = "minimind"
DONE = b"data: [DONE]\n\n"


class Envelope:
    """The parts that all chunks and the whole response of one request have in common."""

    def __init__(self, served: ServedModel, kind: str, with_usage: bool = False):
        self.with_usage = with_usage
        prefix = {"chat.completion": "chatcmpl", "text_completion": "cmpl"}[kind]
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": FINGERPRINT,
        }
        streamed = {**self.head, "object": kind + (".chunk" if kind == "chat.completion" else "")}
        self.start = "data: " + json.dumps(streamed)[:-1] + ', "choices": ['
        self.end = "]" + (', "usage": null' if with_usage else "") + "}\n\n"

    def whole(self, choices: list[dict], usage: dict) -> dict[str, Any]:
        """The response as a dict."""
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(self, choice: str) -> bytes:
        """The bytes of a stream's chunk around one choice (JSON text)."""
        return f"{self.start}{choice}{self.end}".encode()

    def last_chunk(self, usage: dict) -> bytes:
        """The chunk without choices that carries the usage."""
        return f'{self.start}], "usage": {json.dumps(usage)}}}\n\n'.encode()


class CompletionReader:
    """Reads one completion of a chat while it comes: events, log-probs, and why it ended."""

    def __init__(self, plan: Plan, served: ServedModel):
        self.plan, self.served = plan, served
        self.parser = ReplyParser(
            plan.in_reasoning,
            tools=plan.offers_tools,
            trust_calls=plan.offers_tools,
            is_begun=plan.is_begun,
        )
        self.log_probs, self.finish_reason = [], None
        self.reasoning_tokens, self.num_calls = 0, 0

    def take(self, piece: Piece) -> list:
        """Take in a Piece; returns the new events."""
        if piece.token is not None:
            self.reasoning_tokens += self.parser.in_reasoning
        if piece.top and piece.token not in self.served.engine.end_ids:
            log_prob, best = piece.top
            top = [self._token(*one) for one in best]
            self.log_probs.append({**self._token(piece.token, log_prob), "top_logprobs": top})
        events = self.parser.feed(piece.text) if piece.text else []
        if piece.finish_reason:
            events += self.parser.finish()
        self.num_calls += sum(isinstance(event, CallStart) for event in events)
        self.finish_reason = piece.finish_reason
        is_cut = self.parser.state == "arguments"  # by a grammar that failed
        if self.num_calls and piece.finish_reason == "stop" and not is_cut:
            self.finish_reason = "tool_calls"
        return events

    def _token(self, token: int, log_prob: float) -> dict:
        piece = self.served.engine.pieces[token] or self.served.names[token].encode()
        return {
            "token": self.served.names[token],
            "logprob": max(log_prob, LOWEST),
            "bytes": list(piece),
        }


class ChatChoice(CompletionReader):
    """One completion of a chat request, for a whole response or for the chunks of a stream."""

    def __init__(self, index: int, plan: Plan, served: ServedModel, envelope: Envelope):
        super().__init__(plan, served)
        self.index, self.envelope, self.events, self.is_begun = index, envelope, [], False

    def chunks(self, piece: Piece) -> bytes:
        """The chunks of a stream that a Piece makes, as bytes."""
        out = []
        if not self.is_begun:
            self.is_begun = True
            out.append(self._chunk('{"role": "assistant", "content": ""}'))
        deltas = [self._delta(event) for event in self.take(piece)]
        deltas = [delta for delta in deltas if delta]
        if self.log_probs and not deltas:
            deltas = ['{"content": ""}']
        for delta in deltas:
            out.append(self._chunk(delta, self.log_probs))
            self.log_probs = []
        if self.finish_reason:
            out.append(self._chunk("{}", reason=self.finish_reason))
        return b"".join(out)

    def _chunk(self, delta: str, log_probs: Sequence = (), reason: str | None = None) -> bytes:
        shown = json.dumps({"content": log_probs, "refusal": None}) if log_probs else "null"
        return self.envelope.chunk(
            f'{{"index": {self.index}, "delta": {delta}, "logprobs": {shown}, '
            f'"finish_reason": {json.dumps(reason)}}}'
        )

    @staticmethod
    def _delta(event: Any) -> str | None:
        if isinstance(event, Content):
            return f'{{"content": {json.dumps(event.text)}}}'
        if isinstance(event, Reasoning):
            return f'{{"reasoning_content": {json.dumps(event.text)}}}'
        if isinstance(event, CallStart):
            call = {
                "index": event.index,
                "id": new_call_id(),
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
        elif isinstance(event, CallArguments):
            call = {"index": event.index, "function": {"arguments": event.text}}
        else:
            return None
        return json.dumps({"tool_calls": [call]})

    def add(self, piece: Piece) -> None:
        """Take in a Piece of a response that is sent as a whole."""
        self.events += self.take(piece)

    def whole(self) -> dict[str, Any]:
        """The finished choice as a dict."""
        message = {**collect(self.events), "refusal": None}
        for call in message.get("tool_calls", ()):
            call["id"] = new_call_id()
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        log_probs = (
            {"content": self.log_probs, "refusal": None} if self.plan.wants_log_probs else None
        )
        return {
            "index": self.index,
            "message": message,
            "logprobs": log_probs,
            "finish_reason": self.finish_reason,
        }


def new_call_id() -> str:
    """An id for a tool call, as the original's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


class TextChoice:
    """One completion of a text while it comes; with echo after the prompt and its log-probs."""

    def __init__(
        self,
        index: int,
        plan: Plan,
        served: ServedModel,
        envelope: Envelope,
        echoed: Echo | None = None,
    ):
        self.index, self.served, self.envelope, self.plan = index, served, envelope, plan
        self.finish_reason, self.to_send = None, ""
        self.decoder, self.offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        self.fields = self._no_log_probs()
        if echoed:
            self.to_send = echoed.text
            for token, top in zip(echoed.tokens, echoed.top or ()):
                self._note(token, top)

    @staticmethod
    def _no_log_probs() -> dict[str, list]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _note(self, token: int, top: tuple | None) -> None:
        """Add a token with (log-prob, [(alternative, log-prob)]); the first token has None."""
        spelled = self._spell(token)
        log_prob = shown = None
        if top is not None:
            log_prob = max(top[0], LOWEST)
            shown = {self._spell(other): max(p, LOWEST) for other, p in top[1]}
            shown |= {spelled: log_prob}
        self.fields["tokens"].append(spelled)
        self.fields["token_logprobs"].append(log_prob)
        self.fields["top_logprobs"].append(shown)
        self.fields["text_offset"].append(self.offset)
        self.offset += len(self.decoder.decode(self.served.engine.pieces[token]))

    def _spell(self, token: int) -> str:
        """A token as text, `bytes:\\x..` for a part of a character, so that no two are alike."""
        piece = self.served.engine.pieces[token]
        try:
            return piece.decode() if piece else self.served.names[token]
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def add(self, piece: Piece) -> None:
        """Take in a Piece."""
        self.to_send += piece.text
        if piece.top and piece.token not in self.served.engine.end_ids:
            self._note(piece.token, piece.top)
        self.finish_reason = piece.finish_reason

    def chunks(self, piece: Piece) -> bytes:
        """The chunk of a stream that a Piece makes, as bytes; empty if there is none yet."""
        self.add(piece)
        return self.flush() if self.to_send or self.fields["tokens"] or self.finish_reason else b""

    def flush(self) -> bytes:
        """The chunk of all that was not sent yet."""
        choice = json.dumps(self.whole())
        self.to_send, self.fields = "", self._no_log_probs()
        return self.envelope.chunk(choice)

    def whole(self) -> dict[str, Any]:
        """All that was not sent yet, without a stream the finished choice, as a dict."""
        return {
            "text": self.to_send,
            "index": self.index,
            "logprobs": self.fields if self.plan.wants_log_probs else None,
            "finish_reason": self.finish_reason,
        }


Choices = list[ChatChoice] | list[TextChoice]


def usage(
    requests: Sequence[Request], plan: Plan, choices: Choices | list[CompletionReader]
) -> dict[str, Any]:
    """The usage of a finished response; a prompt with n completions counts once, with the cache
    that the first of them found.
    """
    completion = sum(len(request.sampled) for request in requests)
    prompt = sum(map(len, plan.prompts))
    reused = sum(request.num_reused for request in requests[:: plan.n])
    body = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(prompt, reused)},
    }
    if isinstance(choices[0], CompletionReader):
        reasoning = sum(choice.reasoning_tokens for choice in choices)
        body["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return body
