"""A server that answers as vLLM and as SGLang do, with this project's engine, on the weights that
it was told to load.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transformers import AutoTokenizer

from model.engine import Engine
from model.model_minimind import MiniMindForCausalLM
from model.sampling import SamplingParams


class FakeServer:
    """A server on a free port of 127.0.0.1, started with the weights of `folder`; a context
    manager.

    paths: of the requests. failures: so many of the next requests get a 500. is_deaf: a load is
    confirmed, but not done. keeps_head: but for the last layer. is_raw: log-probabilities are of
    temperature 1. offset: is added to each token. max_len: of prompt and completion together.
    """

    def __init__(self, folder: Path, max_len: int = 64):
        self.max_len = max_len
        self.paths, self.loaded, self.lock = [], [], threading.Lock()
        self.failures = self.offset = 0
        self.is_deaf = self.keeps_head = self.is_raw = False
        self.load(folder)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    status, reply = fake.reply(self.path, body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def load(self, folder: Path | str) -> None:
        """Take the weights of a folder; ValueError if they have another shape."""
        model = MiniMindForCausalLM.from_pretrained(folder)
        if self.loaded and model.config.vocab_size != self.engine.model.config.vocab_size:
            raise ValueError("the embedding has another size")
        if self.keeps_head:
            model.lm_head.weight = self.engine.model.lm_head.weight
        self.engine = Engine(model, AutoTokenizer.from_pretrained(folder), max_len=self.max_len)
        self.loaded.append(str(folder))

    def reply(self, path: str, body: dict) -> tuple[int, dict]:
        """(status, JSON) of a request."""
        self.paths.append(path)
        if self.failures:
            self.failures -= 1
            return 500, {"error": "out of memory"}
        try:
            if path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                return self.reload(body["kwargs"]["weights_path"])
            if path == "/reset_prefix_cache":
                return 200, {}
            if path == "/update_weights_from_disk":
                return self.reload(body["model_path"])
            return 200, {"/v1/completions": self.as_vllm, "/generate": self.as_sglang}[path](body)
        except ValueError as error:
            return 500, {"error": str(error)}
        except KeyError:
            return 404, {"detail": "Not Found"}

    def reload(self, folder: str) -> tuple[int, dict]:
        if not self.is_deaf:
            self.load(folder)
        return 200, {"success": True}

    def as_vllm(self, body: dict) -> dict:
        tokens, log_probs = self.write(body["prompt"], body["seed"], body["max_tokens"], body)
        assert body["return_token_ids"] and body["logprobs"] == 0
        return {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}}]}

    def as_sglang(self, body: dict) -> dict:
        params = body["sampling_params"]
        tokens, log_probs = self.write(
            body["input_ids"], params["sampling_seed"], params["max_new_tokens"], params
        )
        assert body["return_logprob"]
        return {
            "meta_info": {
                "output_token_logprobs": [[p, token, None] for token, p in zip(tokens, log_probs)]
            }
        }

    def write(
        self, prompt: list[int], seed: int, max_tokens: int, params: dict
    ) -> tuple[list[int], list[float]]:
        """Token ids, log-probabilities of a completion; with the end token, as on both servers."""
        plain = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
        assert plain == {name: params[name] for name in plain}
        (request,) = self.engine.generate(
            [prompt],
            SamplingParams(
                params["temperature"],
                max_tokens=max_tokens,
                seed=seed,
                ignore_eos=params["ignore_eos"],
                logprobs=0,
                stop_token_ids=tuple(params["stop_token_ids"]),
            ),
        )
        log_probs = (
            [log_prob for log_prob, _ in request.top]
            if self.is_raw or not params["temperature"]
            else request.log_probs
        )
        return [token + self.offset for token in request.sampled], log_probs
