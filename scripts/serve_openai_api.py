"""Serve checkpoints to every program that can talk to OpenAI's API: chat, completions, tools, JSON by a schema.

    python scripts/serve_openai_api.py                                             # out/full_sft_*, at 127.0.0.1:8000
    python scripts/serve_openai_api.py --weight chat=out/full_sft_tiny base=out/pretrain_tiny
    python scripts/serve_openai_api.py --weight full_sft --adapter poet=out/lora_poet --api_key SECRET --host 0.0.0.0

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "full_sft", "messages": [{"role": "user", "content": "Who are you?"}], "stream": true}'

The base URL for clients is http://127.0.0.1:8000/v1, the model is the name given with --weight (or its folder's).
scripts/chat_api.py is such a client, /docs lists the fields, /metrics is for Prometheus. What is particular here:

- max_tokens above what the context has room for is cut to that; without it an answer may fill the context.
- response_format and tool calls are enforced while sampling, so the JSON fits its schema. If max_tokens ends it early,
  finish_reason is "length". A schema that cannot be enforced is an error; of a tool that may but need not be called it is
  not, unless it is strict: then the arguments are just some JSON object.
- stop texts are looked for in the raw reply, reasoning and tool calls included; with response_format or a call that must be
  made they are refused, and where one cuts off a call that may be made, finish_reason is "stop".
- logprobs are those of the bare model, before temperature and penalties, for all tokens of the raw reply.
- Where JSON or a call is enforced, the model thinks before it only if it is asked to.
- Thinking is switched by chat_template_kwargs: {"enable_thinking": true} or by reasoning_effort, and comes as
  reasoning_content. Extensions: top_k, min_p, repetition_penalty, ignore_eos.
- A completion's text may hold special tokens (`<|im_start|>`); one that does not begin with one gets <|endoftext|> before it.
- On a CPU one core is left to the connections, unless OMP_NUM_THREADS says how many the networks take. Where uvloop and
  httptools are installed, they are used.
- SIGTERM or Ctrl-C: what runs is finished, new requests get 503, then the program ends; a second signal ends it at once. A
  client that takes nothing of its reply for 30 seconds is given up.
"""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import uvicorn

from model.model_minimind import PRESETS
from scripts.openai_api.application import build_app
from scripts.openai_api.http import SEND_SECONDS
from scripts.openai_api.model_pool import load_models
from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.run import Compute

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeArgs:
    weight: list[str] = arg(["full_sft"], "what to serve: names of runs in SAVE_DIR, checkpoint folders or .pth files; with "
                            "NAME=FOLDER clients call it NAME", nargs="+")
    adapter: list[str] = arg([], "NAME=FOLDER: LoRA adapters (PEFT format) to serve too, on the first --weight", nargs="+")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    preset: str = arg("", "which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "for a .pth file: width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "for a .pth file: layers, in place of the preset's")
    use_moe: bool = arg(False, "for a .pth file: it is a mixture of experts")
    host: str = arg("127.0.0.1", "who may connect: 127.0.0.1 this machine alone, 0.0.0.0 everyone in the network")
    port: int = arg(8000, "where to listen; 0: any free port")
    api_key: str = arg("", "clients must send it as Bearer token (default: the environment's MINIMIND_API_KEY, or none)")
    max_batch_size: int = arg(16, "answers of one model that are written side by side")
    max_len: int | None = arg(None, "tokens of prompt and answer together (default: 2048, or what the model has)")
    max_queue: int = arg(256, "answers of one model that may wait; beyond that clients get 429")
    max_body_bytes: int = arg(4 << 20, "longest body of a request; beyond that clients get 413")
    int8: bool = arg(False, "int8 weights on a CPU: less memory, a little less exact; what else runs may then change a rare "
                       "token of an answer (seeds are exact in float32 only)")
    cuda_graphs: bool = arg(False, "on a GPU: replay the kernels of a step instead of launching them one by one")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "max_batch_size", "max_len", "max_body_bytes")
        check_not_negative(self, "max_queue")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: give one from 0 (any that is free) to 65535")
        for one in self.adapter:
            if "=" not in one:
                raise ValueError(f"--adapter {one}: give it a name, NAME={one}")


class Server(uvicorn.Server):
    """A uvicorn server that, on the first signal, answers new requests with 503 and ends when the others are done."""

    def __init__(self, config, gate):
        super().__init__(config)
        self.gate = gate

    def handle_exit(self, sig, frame):
        """Called for SIGINT and SIGTERM. The base class would raise the signal again in the end; a drained server ends with 0."""
        if self.gate.is_draining:
            self.should_exit = self.force_exit = True
        self.gate.is_draining = True

    async def on_tick(self, counter):
        self.should_exit |= self.gate.is_draining and self.gate.num_active == 0
        return await super().on_tick(counter)

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)


def open_port(host, port):
    """A socket that listens. OSError, saying what to change, if there can be none."""
    # with the protocol named, asyncio sends every token at once instead of waiting for more (TCP_NODELAY)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        return listener
    except OSError as error:
        listener.close()
        raise OSError(f"--host {host} --port {port} cannot be opened ({error}): something else may listen there, choose "
                      "another, or --port 0 for any that is free") from error


def main(argv=None):
    args = parse_args(ServeArgs, argv)
    run = Compute(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server has taken over: nothing runs yet
    if "OMP_NUM_THREADS" not in os.environ:  # one core for the connections: threads of the network wait for the slowest
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    listener = open_port(args.host, args.port)  # before anything is loaded: it may be taken
    models = load_models(args, run)
    api_key = args.api_key or os.environ.get("MINIMIND_API_KEY", "")
    if args.host not in LOCAL and not api_key:
        print(f"warning: --host {args.host} lets others in, and there is no --api_key", file=sys.stderr)
    for served in models.values():
        print(f"serving {served.name}: context {served.max_len}, {args.max_batch_size} answers at once, on {run.device}")
    app = build_app(models, api_key, args.max_body_bytes)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30, lifespan="off",
                            timeout_graceful_shutdown=SEND_SECONDS)
    server = Server(config, app.state.gate)
    server.run([listener])
    for served in models.values():
        served.thread.close(timeout=0 if server.force_exit else None)


if __name__ == "__main__":
    command(main)
