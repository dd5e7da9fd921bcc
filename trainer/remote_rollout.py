"""Rollouts from a vLLM or SGLang server that runs elsewhere, with the interface of trainer/rollout.py.

Token ids go there and token ids come back, with the log-probabilities that the server sampled them by: no text is ever tokenised
again. New weights go over a folder that both machines see, as a checkpoint that the server is told to load in place:

    vLLM     POST /collective_rpc, reload_weights(weights_path=...); then /reset_prefix_cache, for the keys and values of old
             weights. Both are there with VLLM_SERVER_DEV_MODE=1 only
    SGLang   POST /update_weights_from_disk, which also empties the cache

What could go wrong without a word is tested after each load: an answer of the server is scored by the network itself. Other
weights, or log-probabilities before the temperature (vLLM without --logprobs-mode processed_logprobs, SGLang with
SGLANG_RETURN_ORIGINAL_LOGPROB), are a ValueError.

A seed gives the same answer again from vLLM, and from SGLang with --enable-deterministic-inference; otherwise SGLang draws as it
likes. Their random numbers are not ours: the same seed draws another answer here than there.
"""

import copy
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from model.engine import end_ids
from model.model_lora import AdapterOnly, fold_adapters
from model.text_stream import TextStream, token_bytes
from trainer.metrics import writing
from trainer.rollout import Answer, Stopwatch
from trainer.run import evaluating

TRIES, PAUSE = 3, 1.0  # for a request; seconds after the first one that failed, then twice as many
TIME_LIMIT = 600.0  # seconds for one request; a server may let it wait for others
PROBE, PROBE_TOKENS = "What is 1 + 1? 请回答。", 32  # what the server and the network are compared on
TOLERANCE = 0.1  # nats per token between them, on average: bfloat16 stays within it, other weights do not
NOISE = 0.01  # less than that says nothing about the temperature
EVERYTHING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # a server's defaults may cut or change it


class VLLM:
    """How vLLM is spoken to; 0.32 is tested."""

    start = "VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --logprobs-mode processed_logprobs"

    @staticmethod
    def load(post, folder):
        """Let the server take over the weights of a checkpoint folder."""
        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        post("/reset_prefix_cache", {})

    @staticmethod
    def request(prompt, seed, max_new_tokens, temperature, ends):
        """(path, body) that asks for one answer; ends: ids that end it, none: its length alone does."""
        return "/v1/completions", EVERYTHING | {
            "prompt": prompt, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "logprobs": 0,
            "return_token_ids": True, "stop_token_ids": ends, "ignore_eos": not ends}

    @staticmethod
    def read(reply):
        """(token ids, log-probability of each) of an answer."""
        choice = reply["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


class SGLang:
    """How SGLang is spoken to, as its documentation and source describe it."""

    start = "python -m sglang.launch_server --model-path {folder} --enable-deterministic-inference"

    @staticmethod
    def load(post, folder):
        """Let the server take over the weights of a checkpoint folder."""
        post("/update_weights_from_disk", {"model_path": folder})

    @staticmethod
    def request(prompt, seed, max_new_tokens, temperature, ends):
        """(path, body) that asks for one answer; ends: ids that end it, none: its length alone does."""
        return "/generate", {"input_ids": prompt, "return_logprob": True, "sampling_params": EVERYTHING | {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "sampling_seed": seed % 2**31,  # it keeps 32 bits
            "stop_token_ids": ends, "ignore_eos": not ends}}

    @staticmethod
    def read(reply):
        """(token ids, log-probability of each) of an answer."""
        written = reply["meta_info"]["output_token_logprobs"]
        return [token for _, token, _ in written], [log_prob for log_prob, _, _ in written]


BACKENDS = {"vllm": VLLM, "sglang": SGLang}


@torch.no_grad()
def shake(network):
    """Change each weight by about half of itself; returns the network."""
    random = torch.Generator().manual_seed(0)
    for x in network.parameters():
        x.mul_(1 + 0.5 * torch.randn(x.shape, generator=random).to(x.device))
    return network


class RemoteRollout:
    """Answers from the server at --rollout_url, whose weights are at most --max_staleness updates old.

    saved: what load_policy says that a checkpoint saves; an adapter goes to the server merged into the network. All ranks make
    it and call `refresh` together; the first one writes the weights to a new folder in --rollout_dir, which is this run's
    alone, and the last folder stays there. ConnectionError if the server is not there or breaks down, ValueError if it refuses
    or answers otherwise than this network would.
    """

    def __init__(self, saved, model, tokenizer, run, args):
        self.model, self.tokenizer, self.run, self.temperature = model, tokenizer, run, args.temperature
        self.is_adapter, self.max_len = isinstance(saved, AdapterOnly), args.max_seq_len
        self.backend, self.url = BACKENDS[args.rollout_backend], args.rollout_url.rstrip("/")
        self.dir, self.max_staleness = Path(args.rollout_dir).resolve(), args.max_staleness
        self.age, self.is_proven, self.folder = math.inf, False, self.dir  # nobody knows what the server has
        self.pieces, self.ends = token_bytes(tokenizer), sorted(end_ids(model, tokenizer))
        self.client = httpx.Client(timeout=httpx.Timeout(TIME_LIMIT, connect=10), trust_env=False,  # no proxy between the two
                                   limits=httpx.Limits(max_connections=None))
        self.pool, self.watch = ThreadPoolExecutor(args.rollout_batch_size), Stopwatch()

    def refresh(self, now=False):
        """Note an update of the weights, and hand them to the server if its own would be too old; of all ranks together.

        now: hand them over in any case.
        """
        self.age += 1
        if now or self.age > self.max_staleness:
            self.folder = self.run.ranks.from_first(self.push)
            self.age = 0

    def __call__(self, prompts, seeds, max_new_tokens, temperature=None):
        """An Answer for each prompt (a list of ids), drawn with its seed; temperature: default the run's, 0 for the likeliest."""
        if self.age == math.inf:
            self.refresh()
        temperature = self.temperature if temperature is None else temperature
        with self.watch:
            return list(self.pool.map(lambda prompt, seed: self.answer(prompt, seed, max_new_tokens, temperature), prompts,
                                      seeds))

    def answer(self, prompt, seed, max_new_tokens, temperature):
        """One Answer; the likeliest's log-probabilities are 0, as it is certain."""
        tokens, log_probs = self.ask(prompt, seed, min(max_new_tokens, self.max_len - len(prompt)), temperature, self.ends)
        is_complete = tokens[-1] in self.ends
        stream = TextStream(self.pieces)
        for token in tokens[:-1] if is_complete else tokens:
            stream.push(token)
        stream.finish()
        return Answer(tokens, log_probs if temperature else [0.0] * len(tokens), stream.text, is_complete)

    # ---- weights

    def push(self):
        """Write the weights to a new folder and let the server load them; returns the folder.

        The first time other weights go there in between, much changed: what the server keeps of old ones is seen then, not
        when training has come far.
        """
        there = sorted(self.dir.glob("policy-[0-9]*"))
        self.folder = self.dir / f"policy-{1 + int(there[-1].name.split('-')[1]) if there else 1:06d}"
        network = copy.deepcopy(self.model)
        if self.is_adapter:
            fold_adapters(network)
        network.config.tie_word_embeddings = False  # vLLM on a CPU keeps the old head of a network that it knows as tied
        self.write(network, self.folder)
        self.load(network, self.folder)
        if not self.is_proven:
            shaken, folder = shake(copy.deepcopy(network)), self.dir / "shaken"
            self.write(shaken, folder)
            self.load(shaken, folder)
            self.load(network, self.folder)
            there, self.is_proven = [*there, folder], True
        for old in there:
            shutil.rmtree(old, ignore_errors=True)
        return self.folder

    def write(self, network, folder):
        """A checkpoint folder of an untied network, with the tokenizer: the server can be started on it."""
        state = network.state_dict()
        with writing(folder):
            network.save_pretrained(folder, state_dict=state | {"lm_head.weight": state["lm_head.weight"].clone()})
            self.tokenizer.save_pretrained(folder)

    def load(self, network, folder):
        """Let the server load a folder. ValueError unless it then finds its own answer as likely as `network` does."""
        self.backend.load(self.post, str(folder))
        prompt = self.tokenizer(PROBE).input_ids
        tokens, theirs = self.ask(prompt, 0, min(PROBE_TOKENS, self.max_len - len(prompt)), self.temperature, [])
        with evaluating(network):
            logits = network(torch.tensor([prompt + tokens], device=network.device)).logits[0, len(prompt) - 1 : -1].float().cpu()
        theirs, tokens = torch.tensor(theirs), torch.tensor(tokens)[:, None]

        def distance(temperature):
            return (theirs - (logits / temperature).log_softmax(-1).gather(1, tokens)[:, 0]).abs().mean().item()

        off, off_at_one = distance(self.temperature), distance(1.0)
        if off > NOISE and off_at_one < off / 2:
            raise ValueError(self.explained("", f"reports the log-probabilities of temperature 1, not of {self.temperature}, by "
                                            "which it samples. vLLM wants --logprobs-mode processed_logprobs, SGLang no "
                                            "SGLANG_RETURN_ORIGINAL_LOGPROB; or train with --temperature 1"))
        if not off <= TOLERANCE:
            raise ValueError(self.explained("", f"has loaded {folder}, yet differs from the network by {off:.2f} nats per token: "
                                            "it has kept some of its old weights, computes in another way, or samples from "
                                            "something else"))

    # ---- requests

    def ask(self, prompt, seed, max_new_tokens, temperature, ends):
        """(token ids, their log-probabilities) of one answer. ValueError if it is not one of this vocabulary."""
        path, body = self.backend.request(prompt, seed, max_new_tokens, temperature, ends)
        text = self.post(path, body)
        try:
            tokens, log_probs = self.backend.read(json.loads(text))
            is_whole = len(tokens) == len(log_probs) > 0 and all(map(math.isfinite, log_probs))
        except (ValueError, LookupError, TypeError):
            is_whole = False
        if not is_whole:
            raise ValueError(self.explained(path, f"answered without token ids and their log-probabilities: {text[:200]!r}"))
        wrong = next((token for token in tokens if not 0 <= token < self.model.config.vocab_size), None)
        if wrong is not None:
            raise ValueError(self.explained(path, f"answered with token {wrong}, and the network's go up to "
                                            f"{self.model.config.vocab_size - 1}: it serves another vocabulary"))
        return tokens, log_probs

    def post(self, path, body):
        """The reply's text. ConnectionError after TRIES requests that failed, ValueError if the server refuses this one."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                reply = self.client.post(self.url + path, json=body)
            except httpx.TransportError as error:
                problem = f"gave no answer ({error or type(error).__name__})"
                continue
            if reply.is_success:
                return reply.text
            problem = f"answered {reply.status_code}: {reply.text[:300].strip()}"
            if reply.status_code < 500:
                raise ValueError(self.explained(path, problem))
        raise ConnectionError(self.explained(path, f"{problem}, {TRIES} times"))

    def explained(self, path, problem):
        """An error's message, with how the server is to be started."""
        return (f"the rollout server {self.url}{path} {problem}. Check --rollout_url, and that both machines see --rollout_dir; "
                f"start the server with: {self.backend.start.format(folder=self.folder)}")
