"""The process around the application: its port, its signals, its end."""

import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import torch
import uvicorn

from scripts.openai_api.application import build_app
from scripts.openai_api.http import SEND_SECONDS, GateState
from scripts.openai_api.model_pool import load_models
from trainer.runtime.process import Compute

LOCAL = ("127.0.0.1", "localhost", "::1")


class Server(uvicorn.Server):
    """A uvicorn server that, on the first signal, answers new requests with 503 and ends when the
    others are done.
    """

    def __init__(self, config: uvicorn.Config, gate: GateState):
        super().__init__(config)
        self.gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM. The base class would raise the signal again at the end; a
        drained server ends with 0.
        """
        if self.gate.is_draining:
            self.should_exit = self.force_exit = True
        self.gate.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self.gate.is_draining and self.gate.num_active == 0
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"listening at http://{host}:{port}/v1", flush=True)


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. OSError with the fix if there can be none."""
    # with the protocol named, asyncio sends every token at once instead of waiting for more
    # (TCP_NODELAY)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        return listener
    except OSError as error:
        listener.close()
        raise OSError(
            f"--host {host} --port {port} cannot be opened ({error}): something else may listen "
            "there, choose another, or --port 0 for any that is free"
        ) from error


def serve(args: Any) -> None:
    """Load the models and serve them until a signal comes; args: of serve_openai_api.py."""
    run = Compute(args)
    # until the server has taken over: nothing runs yet
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if "OMP_NUM_THREADS" not in os.environ:
        # one core for the connections: threads of the network wait for the slowest
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    listener = open_port(args.host, args.port)  # before anything is loaded: it may be taken
    models = load_models(args, run)
    api_key = args.api_key or os.environ.get("MINIMIND_API_KEY", "")
    if args.host not in LOCAL and not api_key:
        warning = f"warning: --host {args.host} lets others in, and there is no --api_key"
        print(warning, file=sys.stderr)
    for served in models.values():
        print(
            f"serving {served.name}: context {served.max_len}, {args.max_batch_size} completions "
            f"at once, on {run.device}"
        )
    app = build_app(
        models,
        api_key,
        args.max_body_bytes,
        args.strict,
        args.allow_origin,
        args.max_stored_responses,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        lifespan="off",
        timeout_graceful_shutdown=SEND_SECONDS,
    )
    server = Server(config, app.state.gate)
    server.run([listener])
    for served in models.values():
        served.thread.close(timeout=0 if server.force_exit else None)
