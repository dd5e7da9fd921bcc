"""Several ranks of a training stage as processes of this machine, forked from one that has imported
everything already.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from trainer import train_full_sft, train_pretrain
from trainer.runtime.arguments import command
from trainer.runtime.ranks import Ranks

MAIN = {"pretrain": train_pretrain.main, "sft": train_full_sft.main}


def run_ranks(
    count: int,
    stage: str,
    flags: list[str],
    seconds: float = 600,
    poison: tuple[int, int] | None = None,
    launcher: tuple[int, list[int]] | None = None,
    expected: int = 0,
) -> str:
    """Train with `count` ranks, and return the output of rank 0.

    It fails unless all ranks end with the status `expected`. Many arguments: nearly all calls give
    the first three alone. stage: "sft", or the script's name behind train_. seconds: enough for the
    op that DeepSpeed compiles once. poison: (rank, step) of a loss of nan. launcher: (port of a
    store like torchrun's, number of restarts for each rank).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train_full_sft", "trainer.train_pretrain"])
    port, restarts = launcher or (free_port(), None)
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if launcher:
                ours |= {
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(restarts[rank]),
                }
            processes.append(
                context.Process(
                    target=one_rank, args=(ours, stage, flags, poison, f"{folder}/{rank}")
                )
            )
            processes[-1].start()
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                break  # the others wait for it in vain
            time.sleep(0.02)
        for process in processes:
            process.kill() if process.is_alive() and time.monotonic() > end else process.join(10)
            process.kill()
            process.join()
        out = Path(folder, "0").read_text()
    assert [process.exitcode for process in processes] == [expected] * count, out
    return out


def call_in_ranks(count: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """The results of function(ranks) on `count` ranks of a group; it must be of some module's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train_full_sft", "trainer.train_pretrain"])
    port, results = free_port(), context.Queue()
    processes = [
        context.Process(target=one_call, args=(rank, count, port, function, results))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
    return [found[rank] for rank in range(count)]


def one_call(
    rank: int, count: int, port: int, function: Callable[[Ranks], Any], results: Queue
) -> None:
    """The work of one process of `call_in_ranks`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks()
    ranks.start(torch.device("cpu"))
    results.put((rank, function(ranks)))
    ranks.sum(0)  # wait until all are here
    ranks.close()


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_rank(
    environment: dict[str, str],
    stage: str,
    flags: list[str],
    poison: tuple[int, int] | None,
    out: str,
) -> None:
    """The work of one process; it prints into the file `out`."""
    os.environ |= environment
    rank = int(environment["RANK"])
    torch.set_num_threads(1)  # as torchrun does
    if poison:
        seed, backward = train_pretrain.Run.seed, train_pretrain.Run.backward

        def remember(run, step):
            run.step = step
            seed(run, step)

        train_pretrain.Run.seed = remember
        train_pretrain.Run.backward = lambda run, loss: backward(
            run, loss * float("nan") if (rank, run.step) == poison else loss
        )
    with open(out, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            command(
                lambda: (MAIN.get(stage) or import_module(f"trainer.train_{stage}").main)(flags)
            )
        except SystemExit as end:
            print(end.code)
            raise
