"""The decoding engine: many answers written side by side, one token each per step (continuous batching, Yu et al. 2022).

Every running request owns a slot of the key-value cache. The running ones always sit in the first slots, so that a step
works on plain slices; when one leaves, the last takes its place. A step first lets waiting requests in, which computes
their prompt but for its last token, and then feeds one token of each running request: the prompt's last one or the one
chosen before. A slot that was left keeps its content: a prompt that begins with the same tokens (the conversation's next
turn, another sample for the same prompt) does not compute them again.

    engine = Engine(model, tokenizer)
    for request in engine.generate([prompt_ids], SamplingParams(temperature=0, max_tokens=64)):
        print(request.text, request.finish_reason)

An engine belongs to one thread; `engine_thread.py` runs it for many. Its forward is the network's own.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import torch

from .decoder import Decoder, RecordedDecoder
from .kv_cache import KVCache, PrefillView
from .packed_linear import for_decoding
from .sampling import SamplingParams, edit_logits, sample, top_log_probs
from .text_stream import TextStream, token_bytes

MAX_LEN = 2048  # tokens of prompt and answer, where the caller does not say
WORTH_SHARING = 16  # a shorter common beginning is computed again: copying has its price too


@dataclass(eq=False)
class Request:
    """One answer that is being written; `answer` are its token ids, without the one that ended it."""

    prompt: list[int]
    params: SamplingParams
    stream: TextStream
    random: random.Random
    tokens: list[int] = field(default_factory=list)  # prompt and answer, the ending token included
    num_cached: int = 0  # tokens whose keys and values are in the slot
    num_reused: int = 0  # prompt tokens that were taken over instead of computed
    answer: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # of the sampled distribution, one per sampled token
    top: list = field(default_factory=list)  # with params.logprobs: of the bare model, see `top_log_probs`
    finish_reason: str | None = None  # stop: end token or stop text; length; cancelled
    is_cancelled: bool = False
    on_output: object = None  # who wants to hear of it, see `EngineThread`

    @property
    def text(self):
        """The answer so far, whole characters."""
        return self.stream.text

    @property
    def sampled(self):
        """Ids of all tokens that were sampled, the ending one included: what `log_probs` belong to."""
        return self.tokens[len(self.prompt):]


@dataclass
class Output:
    """What a step did for a request: the new text (may be empty), and why it ended, if it did."""

    request: Request
    text: str
    token: int | None = None  # None: no token, the request ended without one
    finish_reason: str | None = None


def end_ids(model, tokenizer):
    """Ids of the tokens that end an answer: a set."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


class Slot:
    """A place in the cache: what it holds is its owner's, or was left there by the last one."""

    def __init__(self):
        self.owner, self.left, self.last_used = None, [], 0

    @property
    def tokens(self):
        """The tokens whose keys and values are here."""
        return self.owner.tokens[:self.owner.num_cached] if self.owner else self.left

    def release(self, step):
        """Its owner goes, its content stays."""
        self.left, self.owner, self.last_used = self.tokens, None, step


class Engine:
    """Decodes with `model` (a MiniMindForCausalLM on its device, not touched) for up to `max_batch_size` requests at once.

    max_len: tokens of prompt and answer together, at most the model's positions. dtype: of weights and cache (default: the
    model's own; on a CPU always float32, the fastest there). int8: int8 weights on a CPU; an answer may then depend, in
    single tokens, on what is written beside it. prefill_chunk: prompt tokens per step, so that a long prompt does not hold
    up the others. cuda_graphs: replay each step's kernels without launching them one by one (a GPU; a mixture of experts
    in bfloat16 only). Raises ValueError for sizes and options that do not fit.
    """

    def __init__(self, model, tokenizer, max_batch_size=8, max_len=None, dtype=None, int8=False, prefill_chunk=256,
                 cuda_graphs=False):
        positions = model.config.max_position_embeddings
        self.max_len = min(MAX_LEN, positions) if max_len is None else max_len
        if not 2 <= self.max_len <= positions:
            raise ValueError(f"max_len {self.max_len}: the model has {positions} positions, give 2 to {positions}")
        if max_batch_size < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch_size {max_batch_size} and prefill_chunk {prefill_chunk} must be 1 or more")
        self.model, self.tokenizer, self.int8, self.prefill_chunk = model, tokenizer, int8, prefill_chunk
        self.device, self.dtype = model.device, dtype or model.dtype
        if self.device.type == "cpu":
            if dtype not in (None, torch.float32):
                raise ValueError(f"dtype {dtype}: on a CPU the engine computes in float32; leave it out, or take int8 weights")
            self.dtype = torch.float32
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: the model is on {self.device}, not on a GPU; leave it out")
        if cuda_graphs and model.config.num_experts and self.dtype != torch.bfloat16:
            raise ValueError("cuda_graphs: a mixture of experts is one kernel in bfloat16 only; choose that, or leave it out")
        self.decoder_class = RecordedDecoder if cuda_graphs else Decoder
        self.pieces = token_bytes(tokenizer)
        self.end_ids = end_ids(model, tokenizer)
        self.slots = [Slot() for _ in range(max_batch_size)]
        self.waiting, self.running, self.prefilling = deque(), [], None
        self.steps = 0
        self.cache = KVCache(model.config, max_batch_size, self.max_len, self.dtype, self.device)
        self.refresh()

    def refresh(self):
        """Take over the model's weights as they are now; what was computed with the former ones is forgotten."""
        assert not self.running and self.prefilling is None, "weights change between requests, not within one"
        self.network = for_decoding(self.model, self.dtype, self.int8)
        self.decoder = self.decoder_class(self.network, self.cache)
        for slot in self.slots:
            slot.left = []

    @property
    def num_unfinished(self):
        return len(self.waiting) + len(self.running) + (self.prefilling is not None)

    def new_request(self, prompt, params):
        """A Request for a prompt (a list of token ids) that is not queued yet. ValueError if the prompt does not fit."""
        size = self.model.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens, and {self.max_len} is the most for prompt and answer "
                             "together: shorten it")
        wrong = next((token for token in (*prompt, *params.logit_bias) if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(f"there is no token {wrong}: ids go from 0 to {size - 1}")
        stream = TextStream(self.pieces, params.stop)
        return Request(list(prompt), params, stream, random.Random(params.seed), tokens=list(prompt))

    def add(self, prompt, params):
        """Queue a request for a prompt (a list of token ids) and return it. ValueError if the prompt does not fit."""
        self.waiting.append(self.new_request(prompt, params))
        return self.waiting[-1]

    def cancel(self, request):
        """Let a request end before the next step."""
        request.is_cancelled = True

    def generate(self, prompts, params):
        """Answer prompts (lists of token ids), with one SamplingParams for all or one for each: the finished Requests."""
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self.add(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        for request in requests:
            while request.finish_reason is None:
                self.step()
        return requests

    @torch.inference_mode()
    def step(self):
        """Let requests in, write one token for each running one, let the finished ones go: a list of Outputs."""
        self.steps += 1
        outputs = self._drop_cancelled()
        self._admit()
        if self.running:
            logits = self._decode()
            outputs += self._choose(logits)
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
        """Compute prompts, up to `prefill_chunk` tokens of them, and let those that are done join."""
        room = self.prefill_chunk
        while room > 0 and (self.prefilling or (self.waiting and len(self.running) < len(self.slots))):
            if self.prefilling is None:
                self.prefilling = self._take_slot(self.waiting.popleft())
            request = self.prefilling
            end = min(len(request.prompt) - 1, request.num_cached + room)
            room -= end - request.num_cached
            if end > request.num_cached:
                ids = torch.tensor([request.prompt[request.num_cached:end]], device=self.device)
                view = PrefillView(self.cache, len(self.running), 1, request.num_cached)
                self.network.model(ids, past_key_values=view)
                request.num_cached = end
            if end == len(request.prompt) - 1:
                self.running.append(request)
                self.prefilling = None

    def _take_slot(self, request):
        """Give a request the first free slot, with as much of its prompt as some slot already holds."""
        first, places = len(self.running), range(len(self.slots))
        shared = [common_prefix(slot.tokens, request.prompt[:-1]) for slot in self.slots]
        donor = max(places, key=lambda i: (shared[i], i))  # of equal ones a free slot
        free = min(places[first:], key=lambda i: self.slots[i].last_used)
        if shared[donor] < WORTH_SHARING:
            self._swap(first, free)
        elif donor >= first and 2 * shared[donor] >= len(self.slots[donor].left):
            self._swap(first, donor)  # it holds little else than the beginning of this prompt: go on in place
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
        """A running request goes, and the last one takes its place; what it computed stays for others to reuse."""
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
        """Feed each running request's next token; returns the logits [B, V] for the one after it, float32."""
        positions = [request.num_cached for request in self.running]
        return self.decoder([request.tokens[n] for request, n in zip(self.running, positions)], positions)

    def _choose(self, logits):
        params = [request.params for request in self.running]
        edited = [i for i, one in enumerate(params) if one.edits_logits]
        bare = logits.clone() if edited and any(one.logprobs is not None for one in params) else logits
        for i in edited:
            request = self.running[i]
            edit_logits(logits[i], params[i], request.prompt, request.sampled, self.end_ids)
        tokens, log_probs = sample(logits, params, [request.random.random() for request in self.running])
        outputs, leaving = [], []
        for i, (request, token, log_prob) in enumerate(zip(self.running, tokens.tolist(), log_probs.tolist())):
            if request.params.logprobs is not None:
                request.top.append(top_log_probs(bare[i], token, request.params.logprobs))
            outputs.append(self._advance(request, token, log_prob))
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
            request.answer.append(token)
            text = request.stream.push(token)
            if params.constraint is not None:
                params.constraint.accept(token)
        if is_end or request.stream.stopped:
            request.finish_reason = "stop"
        elif len(request.answer) >= params.max_tokens or len(request.tokens) >= self.max_len:
            request.finish_reason = "length"
        if request.finish_reason:
            text += request.stream.finish()
            if request.stream.stopped:
                request.finish_reason = "stop"
        return Output(request, text, token, request.finish_reason)


def common_prefix(a, b):
    """How many tokens two lists have in common at their beginnings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
