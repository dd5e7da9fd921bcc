"""The decoding engine: many completions at once, one token each per step (continuous batching, Yu
et al. 2022).

Every running request owns a slot of the key-value cache. The running ones always sit in the first
slots, so that a step works on plain slices; when one leaves, the last takes its place. A step first
admits waiting requests: it computes their prompts but for the last token. Then it feeds one token
of each running request: the prompt's last one or the one chosen before. A free slot keeps its
content: a prompt that begins with the same tokens (the conversation's next turn, another sample for
the same prompt) does not compute them again.

    engine = Engine(model, tokenizer)
    for request in engine.generate([prompt_ids], SamplingParams(temperature=0, max_tokens=64)):
        print(request.text, request.finish_reason)

An engine belongs to one thread; `engine_thread.py` runs it for many. Its forward is the network's
own.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from .decoder import Decoder, RecordedDecoder
from .kv_cache import AlignedView, KVCache
from .model_minimind import MiniMindForCausalLM
from .packed_linear import for_decoding
from .sampling import SamplingParams, edit_logits, sample, top_log_probs
from .text_stream import TextStream, token_bytes

MAX_LEN = 2048  # tokens of prompt and completion, where the caller does not say
WORTH_SHARING = 16  # a shorter common beginning is computed again: copying has its price too


@dataclass(eq=False)
class Request:
    """A prompt and its completion."""

    prompt: list[int]
    params: SamplingParams
    stream: TextStream
    random: random.Random
    tokens: list[int] = field(default_factory=list)  # prompt and completion, end token included
    num_cached: int = 0  # tokens whose keys and values are in the slot
    num_reused: int = 0  # prompt tokens that a slot held already
    completion: list[int] = field(default_factory=list)  # token ids, without the end token
    log_probs: list[float] = field(default_factory=list)  # one per token of `sampled`
    top: list = field(default_factory=list)  # with params.logprobs: see `top_log_probs`
    finish_reason: str | None = None  # stop: end token or stop text; length; cancelled
    is_cancelled: bool = False
    on_output: Callable[["Output | Exception"], None] | None = None  # see `EngineThread`

    @property
    def text(self) -> str:
        """The completion so far, whole characters."""
        return self.stream.text

    @property
    def sampled(self) -> list[int]:
        """Ids of all tokens that were sampled, the end token included."""
        return self.tokens[len(self.prompt) :]


@dataclass
class Output:
    """A step's result for a request: the new text (may be empty), and why it ended, if it did."""

    request: Request
    text: str
    token: int | None = None  # None: the request ended without one
    finish_reason: str | None = None


def end_ids(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end a completion."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


class Slot:
    """A place in the cache, with the content of its owner or of the last one."""

    def __init__(self):
        self.owner, self.left, self.last_used = None, [], 0

    @property
    def tokens(self) -> list[int]:
        """The tokens whose keys and values are here."""
        return self.owner.tokens[: self.owner.num_cached] if self.owner else self.left

    def release(self, step: int) -> None:
        """Its owner goes, its content stays."""
        self.left, self.owner, self.last_used = self.tokens, None, step


class Engine:
    """Decodes with `model`, which it does not touch, up to `max_batch_size` requests at once.

    max_len: tokens of prompt and completion together, at most the model's positions. dtype: of
    weights and cache (default: the model's own; on a CPU always float32, the fastest there). int8:
    int8 weights on a CPU; single tokens of a completion may then depend on the rest of the batch.
    prefill_chunk: prompt tokens per step, so that a long prompt does not hold up the others.
    cuda_graphs: replay each step's kernels without launching them one by one (a GPU; a mixture of
    experts in bfloat16 only). So many arguments, because each is a choice of the user's own.
    Raises ValueError for sizes and options that do not fit.
    """

    def __init__(
        self,
        model: MiniMindForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_size: int = 8,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        prefill_chunk: int = 256,
        cuda_graphs: bool = False,
    ):
        positions = model.config.max_position_embeddings
        self.max_len = min(MAX_LEN, positions) if max_len is None else max_len
        if not 2 <= self.max_len <= positions:
            raise ValueError(
                f"max_len {self.max_len}: the model has {positions} positions, give 2 to "
                f"{positions}"
            )
        if max_batch_size < 1 or prefill_chunk < 1:
            raise ValueError(
                f"max_batch_size {max_batch_size} and prefill_chunk {prefill_chunk} must be 1 or "
                "more"
            )
        self.model, self.tokenizer = model, tokenizer
        self.int8, self.prefill_chunk = int8, prefill_chunk
        self.device, self.dtype = model.device, dtype or model.dtype
        if self.device.type == "cpu":
            if dtype not in (None, torch.float32):
                raise ValueError(
                    f"dtype {dtype}: on a CPU the engine computes in float32; leave it out, or "
                    "take int8 weights"
                )
            self.dtype = torch.float32
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs: the model is on {self.device}, not on a GPU; leave it out"
            )
        if cuda_graphs and model.config.num_experts and self.dtype != torch.bfloat16:
            raise ValueError(
                "cuda_graphs: a mixture of experts is one kernel in bfloat16 only; choose that, or "
                "leave it out"
            )
        self.decoder_class = RecordedDecoder if cuda_graphs else Decoder
        self.pieces = token_bytes(tokenizer)
        self.end_ids = end_ids(model, tokenizer)
        self.slots = [Slot() for _ in range(max_batch_size)]
        self.waiting, self.running, self.prefilling = deque(), [], None
        self.steps = 0
        self.cache = KVCache(model.config, max_batch_size, self.max_len, self.dtype, self.device)
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's weights as they are now, and forget the cached tokens."""
        is_idle = not self.running and self.prefilling is None
        assert is_idle, "weights change between requests, not within one"
        self.network = for_decoding(self.model, self.dtype, self.int8)
        self.decoder = self.decoder_class(self.network, self.cache)
        for slot in self.slots:
            slot.left = []

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running) + (self.prefilling is not None)

    def new_request(self, prompt: list[int], params: SamplingParams) -> Request:
        """A Request for token ids that is not queued yet. ValueError if the prompt does not fit."""
        size = self.model.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and {self.max_len} is the most for prompt "
                "and completion together: shorten it"
            )
        for token in (*prompt, *params.logit_bias):
            if not 0 <= token < size:
                raise ValueError(f"there is no token {token}: ids go from 0 to {size - 1}")
        scope = params.stop_switches, params.in_stop_scope
        stream = TextStream(self.pieces, params.stop, *scope)
        rng = random.Random(params.seed)
        return Request(list(prompt), params, stream, rng, tokens=list(prompt))

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        """Queue a `new_request` and return it."""
        self.waiting.append(self.new_request(prompt, params))
        return self.waiting[-1]

    def cancel(self, request: Request) -> None:
        """Let a request end before the next step."""
        request.is_cancelled = True

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Request]:
        """The finished Requests of prompts (token ids); params: one for all, or one for each."""
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self.add(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        for request in requests:
            while request.finish_reason is None:
                self.step()
        return requests

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admit requests, choose one token for each running one, release the finished ones."""
        self.steps += 1
        outputs = self._drop_cancelled()
        self._admit()
        if self.running:
            outputs += self._choose(self._decode())
        return outputs

    # ---- joining and leaving

    def _drop_cancelled(self):
        outputs = []
        everyone = [*self.waiting, *self.running, *([self.prefilling] if self.prefilling else [])]
        for request in [request for request in everyone if request.is_cancelled]:
            request.finish_reason = "cancelled"
            if request in self.running:
                self._leave(self.running.index(request))
            elif request is self.prefilling:
                self.slots[len(self.running)].release(self.steps)
                self.prefilling = None
            else:
                self.waiting.remove(request)
            outputs.append(Output(request, "", None, request.finish_reason))
        return outputs

    def _admit(self):
        """Compute up to `prefill_chunk` tokens of prompts; requests whose prompt is done join."""
        room = self.prefill_chunk
        while room > 0:
            if self.prefilling is None:
                if not self.waiting or len(self.running) == len(self.slots):
                    return
                self.prefilling = self._take_slot(self.waiting.popleft())
            request = self.prefilling
            end = min(len(request.prompt) - 1, request.num_cached + room)
            room -= end - request.num_cached
            if end > request.num_cached:
                ids = torch.tensor([request.prompt[request.num_cached : end]], device=self.device)
                view = AlignedView(self.cache, len(self.running), 1, request.num_cached)
                self.network.model(ids, past_key_values=view)
                request.num_cached = end
            if end == len(request.prompt) - 1:
                self.running.append(request)
                self.prefilling = None

    def _take_slot(self, request):
        """Give a request the first free slot, with the part of its prompt that a slot holds."""
        first, places = len(self.running), range(len(self.slots))
        shared = [common_prefix(slot.tokens, request.prompt[:-1]) for slot in self.slots]
        donor = max(places, key=lambda i: (shared[i], i))  # of equal ones a free slot
        free = min(places[first:], key=lambda i: self.slots[i].last_used)
        if shared[donor] < WORTH_SHARING:
            self._swap(first, free)
        elif donor >= first and 2 * shared[donor] >= len(self.slots[donor].left):
            self._swap(first, donor)  # mostly the beginning of this prompt: continue in place
            request.num_cached = shared[donor]
        else:
            donor_slot = self.slots[donor]
            self._swap(first, free)
            if donor_slot is not self.slots[first]:
                self.cache.copy(self.slots.index(donor_slot), first, shared[donor])
            request.num_cached = shared[donor]
        request.num_reused = request.num_cached
        self.slots[first].owner = request
        return request

    def _leave(self, place):
        """Remove a running request, and move the last one to its place; its tokens stay cached."""
        last = len(self.running) - 1
        self.slots[place].release(self.steps)
        self._swap(place, last)
        self.running[place] = self.running[last]
        self.running.pop()
        if self.prefilling is not None:  # it sits right behind the running ones
            self._swap(last, last + 1)

    def _swap(self, a, b):
        longest = max(len(self.slots[a].tokens), len(self.slots[b].tokens))
        if a != b and longest:
            self.cache.swap(a, b, longest)
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]

    # ---- one token for each

    def _decode(self):
        """Feed each running request's next token; returns logits [B, V] for the one after it."""
        positions = [request.num_cached for request in self.running]
        tokens = [request.tokens[n] for request, n in zip(self.running, positions)]
        return self.decoder(tokens, positions)

    def _choose(self, logits):
        """Sample each running request's token from logits [B, V]."""
        params = [request.params for request in self.running]
        edited = [i for i, one in enumerate(params) if one.edits_logits]
        wants_bare = edited and any(one.logprobs is not None for one in params)
        bare = logits.clone() if wants_bare else logits
        for i in edited:
            request = self.running[i]
            edit_logits(logits[i], params[i], request.prompt, request.sampled, self.end_ids)
        uniforms = [request.random.random() for request in self.running]
        tokens, log_probs = (x.tolist() for x in sample(logits, params, uniforms))
        outputs, leaving = [], []
        for i, request in enumerate(self.running):
            if params[i].logprobs is not None:
                request.top.append(top_log_probs(bare[i], tokens[i], params[i].logprobs))
            outputs.append(self._advance(request, tokens[i], log_probs[i]))
            if request.finish_reason:
                leaving.append(i)
        for i in reversed(leaving):
            self._leave(i)
        return outputs

    def _advance(self, request, token, log_prob):
        """Add a token to a request and see whether it ends there."""
        params = request.params
        request.tokens.append(token)
        request.num_cached += 1
        request.log_probs.append(log_prob)
        is_end = token in params.stop_token_ids or (token in self.end_ids and not params.ignore_eos)
        text = ""
        if not is_end:
            request.completion.append(token)
            text = request.stream.push(token)
            if params.constraint is not None:
                params.constraint.accept(token)
        if is_end or request.stream.stopped:
            request.finish_reason = "stop"
        elif len(request.completion) >= params.max_tokens or len(request.tokens) >= self.max_len:
            request.finish_reason = "length"
        if request.finish_reason:
            text += request.stream.finish()
            if request.stream.stopped:
                request.finish_reason = "stop"
        return Output(request, text, token, request.finish_reason)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of tokens that two lists have in common at their beginnings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
