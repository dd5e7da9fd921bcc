"""The networks that are served by name, each with an engine in its own thread, and the way from
there to asyncio.

The engine's thread hands over its output once per step, for all completions together; the event
loop then wakes those who wait. Whatever a Request may still change is copied into a `Piece` first.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from model.engine import Engine, Output, Request
from model.engine_thread import EngineThread
from model.model_minimind import MiniMindForCausalLM
from model.sampling import SamplingParams
from scripts.checkpoint import load_checkpoint
from scripts.openai_api.errors import ApiError
from scripts.openai_api.grammars import Grammars
from trainer.runtime.process import Compute
from trainer.runtime.weights import find_weight

SCORE_ROWS = 256  # prompt tokens whose logits [rows, V] are in memory at a time


class Piece(NamedTuple):
    """The output of one step for choice number `index`: text, token (None: none), its log-probs,
    and in the end a reason.
    """

    index: int
    text: str
    token: int | None
    top: tuple | None
    finish_reason: str | None
    error: Exception | None = None


class Generation:
    """All completions of one HTTP request. `async for pieces in generation` gives lists of Pieces
    until the last has ended.
    """

    def __init__(self, served: "ServedModel"):
        self.served, self.unfinished = served, 0
        self.requests: list[Request] = []
        self.arrived: list[Piece] = []
        self.ready = asyncio.Event()

    def add(self, prompt: list[int], params: SamplingParams) -> None:
        """Start one more completion. ValueError if the prompt does not fit."""
        index = len(self.requests)
        self.requests.append(self.served.submit(prompt, params, self, index))
        self.unfinished += 1

    def put(self, piece: Piece) -> None:
        """Called in the event loop with every piece."""
        self.arrived.append(piece)
        if piece.finish_reason or piece.error:
            self.unfinished -= 1
        self.ready.set()

    def cancel(self) -> None:
        """End all completions: nobody reads them any more."""
        for request in self.requests:
            if request.finish_reason is None:
                self.served.thread.cancel(request)

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        while self.unfinished or self.arrived:
            await self.ready.wait()
            self.ready.clear()
            pieces, self.arrived = self.arrived, []
            failed = next((piece.error for piece in pieces if piece.error), None)
            if failed:
                raise ApiError(500, f"the engine has stopped: {failed}")
            yield pieces


class ServedModel:
    """A network under the name by which clients ask for it.

    max_queue: completions that may wait for a slot of the engine.
    """

    def __init__(
        self,
        name: str,
        model: MiniMindForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        max_queue: int,
        parent: str | None = None,
        **engine_options: Any,
    ):
        self.name, self.parent, self.created = name, parent, int(time.time())
        self.tokenizer, self.chats = tokenizer, bool(tokenizer.chat_template)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.engine = Engine(model, tokenizer, **engine_options)
        self.most = len(self.engine.slots) + max_queue  # completions that run or wait
        self.grammars = Grammars(tokenizer, self.engine.end_ids)
        self.names = [
            piece.decode("utf-8", "replace") or tokenizer.convert_ids_to_tokens(token)
            for token, piece in enumerate(self.engine.pieces)
        ]
        self.longest = max(map(len, self.names))  # characters that one token can stand for
        self.loop, self.outbox, self.in_flight = None, [], 0
        self.thread = EngineThread(self.engine, self._hand_over)

    @property
    def max_len(self) -> int:
        """Tokens of prompt and completion together, at most."""
        return self.engine.max_len

    def check_room(self, number: int) -> None:
        """ApiError unless `number` more completions can be accepted now."""
        if number > self.most:
            raise ApiError(
                400,
                f"{number} completions in one request: {self.most} is the most that run and wait "
                "at once",
            )
        if self.in_flight + number > self.most:
            raise ApiError(
                429,
                f"{self.in_flight} completions run or wait already, {self.most} is the most: try "
                "again in a moment",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def submit(
        self, prompt: list[int], params: SamplingParams, generation: Generation, index: int
    ) -> Request:
        """Queue one completion of a Generation; its pieces come in the event loop that runs now."""
        self.loop = asyncio.get_running_loop()

        def on_output(output: Output | Exception) -> None:
            if isinstance(output, Exception):
                piece = Piece(index, "", None, None, None, output)
            else:
                request = output.request
                top = request.top[-1] if output.token is not None and request.top else None
                piece = Piece(index, output.text, output.token, top, request.finish_reason)
            self.outbox.append((generation, piece))

        try:
            request = self.thread.submit(prompt, params, on_output)
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error
        self.in_flight += 1
        return request

    def _hand_over(self) -> None:
        """After a step, in the engine's thread."""
        if self.outbox:
            batch, self.outbox = self.outbox, []
            try:
                self.loop.call_soon_threadsafe(self._deliver, batch)
            except RuntimeError:  # the loop is closed: the program ends, and nobody waits any more
                pass

    def _deliver(self, batch: list[tuple[Generation, Piece]]) -> None:
        for generation, piece in batch:
            self.in_flight -= piece.finish_reason is not None or piece.error is not None
            generation.put(piece)

    async def score(self, prompt: list[int], number: int) -> list[tuple | None]:
        """The bare model's log-probs of a prompt, as in `Request.top`; None for the first token."""
        try:
            future = self.thread.call(lambda: self.score_now(prompt, number))
            return await asyncio.wrap_future(future)
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error

    @torch.inference_mode()
    def score_now(self, prompt: list[int], number: int) -> list[tuple | None]:
        """`score` in the thread of the engine."""
        network = self.engine.network
        ids = torch.tensor([prompt], device=self.engine.device)
        hidden, top = network.model(ids).last_hidden_state[0], [None]
        for start in range(0, len(prompt) - 1, SCORE_ROWS):
            end = min(start + SCORE_ROWS, len(prompt) - 1)
            log_probs = network.lm_head(hidden[start:end]).float().log_softmax(-1)  # rows V
            own = log_probs.gather(1, ids[0, start + 1 : end + 1, None])[:, 0].tolist()
            best, best_ids = log_probs.topk(number)
            top += [(p, list(zip(*row))) for p, *row in zip(own, best_ids.tolist(), best.tolist())]
        return top

    def card(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minimind",
            "root": self.name,
            "parent": self.parent,
            "max_model_len": self.max_len,
        }


def split_name(text: str) -> tuple[str, str]:
    """(name, place) of NAME=PLACE, or of a PLACE alone, whose name is its last part."""
    name, found, place = text.partition("=")
    if found:
        return name, place
    return text.rstrip("/").rpartition("/")[2].removesuffix(".pth"), text


def load_models(args: Any, run: Compute) -> dict[str, ServedModel]:
    """{name: ServedModel} of --weight and --adapter of serve_openai_api.py. ValueError for names
    that are used twice and for files that cannot be read.
    """
    options = {
        "max_batch_size": args.max_batch_size,
        "max_len": args.max_len,
        "dtype": run.dtype,
        "int8": args.int8,
        "cuda_graphs": args.cuda_graphs,
    }
    wanted = [(*split_name(weight), []) for weight in args.weight]
    base_name, base = wanted[0][:2]
    wanted += [(name, base, [folder]) for name, folder in map(split_name, args.adapter)]
    served = {}
    for name, weight, adapters in wanted:
        if name in served:
            raise ValueError(
                f"two models would be served as {name!r}: give one of them another name, "
                "NAME=FOLDER"
            )
        # a missing folder is named before anything is loaded from it
        place = str(find_weight(weight, args, run.device).resolve())
        model, tokenizer = load_checkpoint(place, args, run.device, adapters)
        parent = base_name if adapters else None
        served[name] = ServedModel(name, model, tokenizer, args.max_queue, parent, **options)
    return served
