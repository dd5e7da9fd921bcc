"""The networks that are served by name, each with an engine in a thread of its own, and the way from there to asyncio.

The engine's thread hands over what a step wrote once per step, for all answers together; the event loop then wakes those
who wait. Whatever a Request may still change is copied into a `Piece` first.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.engine import Engine
from model.engine_thread import EngineThread
from model.model_lora import merge_adapter
from scripts.openai_api.errors import ApiError, busy
from scripts.openai_api.grammars import Grammars
from trainer.weights import find_weight, read_weight, take_template

SCORE_ROWS = 256  # prompt tokens whose logits [rows, V] are in memory at a time


class Piece(NamedTuple):
    """What one step did for choice number `index`: text, token (None: none), its log-probs, and in the end a reason."""

    index: int
    text: str
    token: int | None
    top: tuple | None
    finish_reason: str | None
    error: Exception | None = None


class Generation:
    """All answers to one HTTP request. `async for pieces in generation` gives lists of Pieces until the last has ended."""

    def __init__(self, served):
        self.served, self.requests, self.arrived, self.ready = served, [], [], asyncio.Event()
        self.unfinished = 0

    def add(self, prompt, params):
        """Start one more answer. ValueError if the prompt does not fit."""
        index = len(self.requests)
        self.requests.append(self.served.submit(prompt, params, self, index))
        self.unfinished += 1

    def put(self, piece):
        """Called in the event loop with every piece."""
        self.arrived.append(piece)
        if piece.finish_reason or piece.error:
            self.unfinished -= 1
        self.ready.set()

    def cancel(self):
        """Let everything end: nobody reads it any more."""
        for request in self.requests:
            if request.finish_reason is None:
                self.served.thread.cancel(request)

    async def __aiter__(self):
        while self.unfinished or self.arrived:
            await self.ready.wait()
            self.ready.clear()
            pieces, self.arrived = self.arrived, []
            failed = next((piece.error for piece in pieces if piece.error), None)
            if failed:
                raise ApiError(500, f"the engine has stopped: {failed}")
            yield pieces


@dataclass(frozen=True)
class Limits:
    """What is served at once; max_queue counts answers that wait for a slot."""

    max_batch_size: int
    max_queue: int

    @property
    def most(self):
        return self.max_batch_size + self.max_queue


class ServedModel:
    """A network under the name by which clients ask for it."""

    def __init__(self, name, model, tokenizer, limits, parent=None, **engine_options):
        self.name, self.parent, self.limits, self.created = name, parent, limits, int(time.time())
        self.tokenizer, self.chats = tokenizer, bool(tokenizer.chat_template)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.engine = Engine(model, tokenizer, max_batch_size=limits.max_batch_size, **engine_options)
        self.grammars = Grammars(tokenizer, self.engine.end_ids)
        self.names = [piece.decode("utf-8", "replace") or tokenizer.convert_ids_to_tokens(token)
                      for token, piece in enumerate(self.engine.pieces)]
        self.longest = max(map(len, self.names))  # characters that one token can stand for
        self.loop, self.outbox, self.in_flight = None, [], 0
        self.thread = EngineThread(self.engine, self._hand_over)

    @property
    def max_len(self):
        return self.engine.max_len

    def check_room(self, number):
        """ApiError unless `number` more answers can be taken in now."""
        if number > self.limits.most:
            raise ApiError(400, f"{number} answers in one request: {self.limits.most} is the most that run and wait at once")
        if self.in_flight + number > self.limits.most:
            raise busy(f"{self.in_flight} answers run or wait already, {self.limits.most} is the most: try again in a moment")

    def submit(self, prompt, params, generation, index):
        """Queue one answer of a Generation; its pieces come in the event loop that runs now."""
        self.loop = asyncio.get_running_loop()

        def on_output(output):
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

    def _hand_over(self):
        """After a step, in the engine's thread."""
        if self.outbox:
            batch, self.outbox = self.outbox, []
            try:
                self.loop.call_soon_threadsafe(self._deliver, batch)
            except RuntimeError:  # the loop is closed: the program ends, and nobody waits any more
                pass

    def _deliver(self, batch):
        for generation, piece in batch:
            self.in_flight -= piece.finish_reason is not None or piece.error is not None
            generation.put(piece)

    async def score(self, prompt, number):
        """The prompt's own log-probs under the bare model, as in `Request.top`, None for the first token."""
        try:
            return await asyncio.wrap_future(self.thread.call(lambda: self._score(prompt, number)))
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error

    @torch.inference_mode()
    def _score(self, prompt, number):
        network = self.engine.network
        ids = torch.tensor([prompt], device=self.engine.device)
        hidden, top = network.model(ids).last_hidden_state[0], [None]
        for start in range(0, len(prompt) - 1, SCORE_ROWS):
            end = min(start + SCORE_ROWS, len(prompt) - 1)
            log_probs = network.lm_head(hidden[start:end]).float().log_softmax(-1)  # rows V
            own = log_probs.gather(1, ids[0, start + 1:end + 1, None])[:, 0].tolist()
            best, best_ids = log_probs.topk(number)
            top += [(p, list(zip(*row))) for p, *row in zip(own, best_ids.tolist(), best.tolist())]
        return top

    def card(self):
        """The entry of /v1/models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "minimind", "root": self.name,
                "parent": self.parent, "max_model_len": self.max_len}


def split_name(text):
    """(name, place) of NAME=PLACE, or of a PLACE alone, whose name is its last part."""
    name, found, place = text.partition("=")
    return (name, place) if found else (text.rstrip("/").rpartition("/")[2].removesuffix(".pth"), text)


def load_models(args, run):
    """{name: ServedModel} of --weight and --adapter. ValueError for names that are used twice and for what cannot be read."""
    limits = Limits(args.max_batch_size, args.max_queue)
    options = {"max_len": args.max_len, "dtype": run.dtype, "int8": args.int8, "cuda_graphs": args.cuda_graphs}
    wanted = [(*split_name(weight), None) for weight in args.weight]
    base_name, base = wanted[0][:2]
    wanted += [(*split_name(adapter)[:1], base, split_name(adapter)[1]) for adapter in args.adapter]
    served = {}
    for name, weight, adapter in wanted:
        if name in served:
            raise ValueError(f"two models would be served as {name!r}: give one of them another name, NAME=FOLDER")
        weight = find_weight(weight, args, run.device)  # a missing folder is named before anything is loaded from it
        model, tokenizer = read_weight(str(weight.resolve()), args, run.device)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        if adapter:
            merge_adapter(model, adapter)
            take_template(tokenizer, [adapter])
        parent = base_name if adapter else None
        served[name] = ServedModel(name, model.to(run.device).eval(), tokenizer, limits, parent, **options)
    return served
