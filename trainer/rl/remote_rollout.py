"""Rollouts from a vLLM or SGLang server that runs elsewhere, with the interface of
trainer/rl/rollout.py.

Token ids go there and token ids come back, with the log-probabilities that the server sampled them
by: no text is ever tokenised again. New weights go through a folder that both machines see, as a
checkpoint that the server is told to load in place:

    vLLM     POST /collective_rpc, reload_weights(weights_path=...); then /reset_prefix_cache, for
             the keys and values of old weights. Both are there with VLLM_SERVER_DEV_MODE=1 only
    SGLang   POST /update_weights_from_disk, which also empties the cache

Silent mistakes are looked for after each load: the network itself scores a completion of the
server. Other weights, or log-probabilities before the temperature (vLLM without --logprobs-mode
processed_logprobs, SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB), are a ValueError.

A seed gives the same completion again from vLLM, and from SGLang with
--enable-deterministic-inference; otherwise SGLang draws as it likes. Their random numbers are not
ours: the same seed draws another completion here than there.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PreTrainedTokenizerBase

from model.engine import end_ids
from model.files import writing
from model.model_lora import AdapterOnly, fold_adapters
from model.text_stream import TextStream, token_bytes
from trainer.rl.rollout import Completion, Stopwatch
from trainer.runtime.process import evaluating
from trainer.runtime.run import Run

TRIES, PAUSE = 3, 1.0  # for a request; seconds after the first failure, then twice as many
TIME_LIMIT = 600.0  # seconds for one request; a server may let it wait for others
PROBE, PROBE_TOKENS = "What is 1 + 1? 请回答。", 32  # the server and the network are compared on it
# nats per token between them, on average: bfloat16 stays within it, other weights do not
TOLERANCE = 0.1
NOISE = 0.01  # less than that says nothing about the temperature
# a server's defaults may cut or change the distribution
FULL_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

Post = Callable[[str, dict], str]


class VLLM:
    """vLLM's protocol; 0.32 is tested."""

    start = "VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --logprobs-mode processed_logprobs"

    @staticmethod
    def load(post: Post, folder: str) -> None:
        """Let the server take over the weights of a checkpoint folder."""
        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        post("/reset_prefix_cache", {})

    @staticmethod
    def request(
        prompt: list[int], seed: int, max_tokens: int, temperature: float, ends: list[int]
    ) -> tuple[str, dict]:
        """(path, body) that asks for a completion; without ids `ends` its length alone ends it."""
        return "/v1/completions", FULL_DISTRIBUTION | {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": ends,
            "ignore_eos": not ends,
        }

    @staticmethod
    def read(reply: dict) -> tuple[list[int], list[float]]:
        """(token ids, log-probability of each) of a completion."""
        choice = reply["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


class SGLang:
    """SGLang's protocol, from its documentation and source, with the methods of VLLM."""

    start = "python -m sglang.launch_server --model-path {folder} --enable-deterministic-inference"

    @staticmethod
    def load(post: Post, folder: str) -> None:
        post("/update_weights_from_disk", {"model_path": folder})

    @staticmethod
    def request(
        prompt: list[int], seed: int, max_tokens: int, temperature: float, ends: list[int]
    ) -> tuple[str, dict]:
        params = {
            "max_new_tokens": max_tokens,
            "temperature": temperature,
            "sampling_seed": seed % 2**31,  # it keeps 32 bits
            "stop_token_ids": ends,
            "ignore_eos": not ends,
        }
        body = {"input_ids": prompt, "return_logprob": True}
        return "/generate", body | {"sampling_params": FULL_DISTRIBUTION | params}

    @staticmethod
    def read(reply: dict) -> tuple[list[int], list[float]]:
        written = reply["meta_info"]["output_token_logprobs"]
        return [token for _, token, _ in written], [log_prob for log_prob, _, _ in written]


PROTOCOLS = {"vllm": VLLM, "sglang": SGLang}


@torch.no_grad()
def shake(network: torch.nn.Module) -> torch.nn.Module:
    """Change each weight by about half of itself; returns the network."""
    random = torch.Generator().manual_seed(0)
    for x in network.parameters():
        x.mul_(1 + 0.5 * torch.randn(x.shape, generator=random).to(x.device))
    return network


class RemoteRollout:
    """Completions from the server at --rollout_url, whose weights are at most --max_staleness
    updates old.

    saved: as `load_policy` gives it; an adapter goes to the server merged into the network. All
    ranks make it and call `refresh` together; rank 0 writes the weights to a new folder in
    --rollout_dir, which is this run's alone, and the last folder stays there. ConnectionError if
    the server is not there or breaks down, ValueError if it refuses or samples from another network
    than this one.
    """

    def __init__(
        self, run: Run, model: torch.nn.Module, saved: Any, tokenizer: PreTrainedTokenizerBase
    ):
        args = run.args
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.temperature, self.max_len = args.temperature, args.max_seq_len
        self.is_adapter, self.max_staleness = isinstance(saved, AdapterOnly), args.max_staleness
        self.protocol = PROTOCOLS[args.rollout_backend]
        self.url, self.dir = args.rollout_url.rstrip("/"), Path(args.rollout_dir).resolve()
        # nobody knows which weights the server has
        self.age, self.is_proven, self.folder = math.inf, False, self.dir
        self.pieces, self.ends = token_bytes(tokenizer), sorted(end_ids(model, tokenizer))
        self.client = httpx.Client(
            timeout=httpx.Timeout(TIME_LIMIT, connect=10),
            trust_env=False,  # no proxy between the two
            limits=httpx.Limits(max_connections=None),
        )
        self.pool, self.watch = ThreadPoolExecutor(args.rollout_batch_size), Stopwatch()

    def refresh(self, now: bool = False) -> None:
        """Note an update; hand the weights over if the server's are too old. All ranks call.

        now: hand them over in any case.
        """
        self.age += 1
        if now or self.age > self.max_staleness:
            self.folder = self.run.ranks.from_main(self.push)
            self.age = 0

    def __call__(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        max_completion_length: int,
        temperature: float | None = None,
    ) -> list[Completion]:
        """A Completion of each prompt (a list of ids), drawn with its seed.

        temperature: default the run's; 0 is greedy.
        """
        if self.age == math.inf:
            self.refresh()
        temperature = self.temperature if temperature is None else temperature
        same = repeat(max_completion_length), repeat(temperature)
        with self.watch:
            return list(self.pool.map(self.complete, prompts, seeds, *same))

    def complete(
        self, prompt: list[int], seed: int, max_completion_length: int, temperature: float
    ) -> Completion:
        """One Completion; a greedy one's log-probabilities are 0, as it is certain."""
        longest = min(max_completion_length, self.max_len - len(prompt))
        tokens, log_probs = self.ask(prompt, seed, longest, temperature, self.ends)
        is_complete = tokens[-1] in self.ends
        stream = TextStream(self.pieces)
        for token in tokens[:-1] if is_complete else tokens:
            stream.push(token)
        stream.finish()
        log_probs = log_probs if temperature else [0.0] * len(tokens)
        return Completion(tokens, log_probs, stream.text, is_complete)

    # ---- weights

    def push(self) -> Path:
        """Write the weights to a new folder and let the server load them; returns the folder.

        The first time other weights, much changed, go there in between: if the server keeps some of
        its old ones, that shows now, and not when training has come far.
        """
        old = sorted(self.dir.glob("policy-[0-9]*"))
        number = 1 + int(old[-1].name.split("-")[1]) if old else 1
        self.folder = self.dir / f"policy-{number:06d}"
        network = copy.deepcopy(self.model)
        if self.is_adapter:
            fold_adapters(network)
        # vLLM on a CPU keeps the old head of a network that it knows as tied
        network.config.tie_word_embeddings = False
        self.write(network, self.folder)
        self.load(network, self.folder)
        if not self.is_proven:
            shaken, folder = shake(copy.deepcopy(network)), self.dir / "shaken"
            self.write(shaken, folder)
            self.load(shaken, folder)
            self.load(network, self.folder)
            old, self.is_proven = [*old, folder], True
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        return self.folder

    def write(self, network: torch.nn.Module, folder: Path) -> None:
        """A checkpoint folder of an untied network, with the tokenizer: servers can start on it."""
        state = network.state_dict()
        state["lm_head.weight"] = state["lm_head.weight"].clone()
        with writing(folder):
            network.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)

    def load(self, network: torch.nn.Module, folder: Path) -> None:
        """Let the server load a folder; ValueError unless it then samples as `network` would."""
        self.protocol.load(self.post, str(folder))
        prompt = self.tokenizer(PROBE).input_ids
        longest = min(PROBE_TOKENS, self.max_len - len(prompt))
        tokens, theirs = self.ask(prompt, 0, longest, self.temperature, [])
        with evaluating(network):
            out = network(torch.tensor([prompt + tokens], device=network.device))
        logits = out.logits[0, len(prompt) - 1 : -1].float().cpu()
        theirs, tokens = torch.tensor(theirs), torch.tensor(tokens)[:, None]

        def distance(temperature: float) -> float:
            ours = (logits / temperature).log_softmax(-1).gather(1, tokens)[:, 0]
            return (theirs - ours).abs().mean().item()

        off = distance(self.temperature)
        if off > NOISE and distance(1.0) < off / 2:
            problem = (
                f"reports the log-probabilities of temperature 1, but samples with "
                f"{self.temperature}. vLLM wants --logprobs-mode processed_logprobs, SGLang no "
                "SGLANG_RETURN_ORIGINAL_LOGPROB; or train with --temperature 1"
            )
            raise ValueError(self.explained("", problem))
        if not off <= TOLERANCE:
            problem = (
                f"has loaded {folder}, yet differs from the network by {off:.2f} nats per token: "
                "it has kept some of its old weights, computes in another way, or samples from "
                "something else"
            )
            raise ValueError(self.explained("", problem))

    # ---- requests

    def ask(
        self, prompt: list[int], seed: int, max_tokens: int, temperature: float, ends: list[int]
    ) -> tuple[list[int], list[float]]:
        """(ids, their log-probabilities) of a completion; ValueError for another vocabulary."""
        path, body = self.protocol.request(prompt, seed, max_tokens, temperature, ends)
        text = self.post(path, body)
        try:
            tokens, log_probs = self.protocol.read(json.loads(text))
            is_whole = len(tokens) == len(log_probs) > 0 and all(map(math.isfinite, log_probs))
        except (ValueError, LookupError, TypeError):
            is_whole = False
        if not is_whole:
            problem = f"answered without token ids and their log-probabilities: {text[:200]!r}"
            raise ValueError(self.explained(path, problem))
        size = self.model.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < size]:
            problem = (
                f"answered with token {wrong[0]}, and the network's go up to {size - 1}: it serves "
                "another vocabulary"
            )
            raise ValueError(self.explained(path, problem))
        return tokens, log_probs

    def post(self, path: str, body: dict) -> str:
        """The reply's text; ConnectionError after TRIES failures, ValueError for a refusal."""
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

    def explained(self, path: str, problem: str) -> str:
        """An error's message, with the command that starts the server rightly."""
        return (
            f"the rollout server {self.url}{path} {problem}. Check --rollout_url, and that both "
            "machines see --rollout_dir; start the server with: "
            f"{self.protocol.start.format(folder=self.folder)}"
        )
