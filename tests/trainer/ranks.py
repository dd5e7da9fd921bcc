"""Several ranks of a training stage as processes of this machine, forked from one that has imported everything already."""

import multiprocessing
import os
import socket
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import torch

from trainer import train_full_sft, train_pretrain
from trainer.arguments import command

MAIN = {"pretrain": train_pretrain.main, "sft": train_full_sft.main}


def run_ranks(count, stage, flags, seconds=120, poison=None, launcher=None, expected=0):
    """Train with `count` ranks; fails unless all end with the status `expected`. Returns what rank 0 prints.

    stage: one of MAIN, or what follows train_ in the script's name. poison: (rank, step) whose loss is made nan. launcher:
    (the port of a store that outlives us, as torchrun's does, and what each rank is told of restarts).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train_full_sft", "trainer.train_pretrain"])
    port, restarts = launcher or (free_port(), None)
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if launcher:
                ours |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts[rank])}
            processes.append(context.Process(target=one_rank, args=(ours, stage, flags, poison, f"{folder}/{rank}")))
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


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_rank(environment, stage, flags, poison, out):
    """What one of the processes does; it prints into the file `out`."""
    os.environ |= environment
    rank = int(environment["RANK"])
    torch.set_num_threads(1)  # as torchrun does
    if poison:
        seed, backward = train_pretrain.Run.seed, train_pretrain.Run.backward

        def remember(run, step):
            run.step = step
            seed(run, step)

        train_pretrain.Run.seed = remember
        train_pretrain.Run.backward = lambda run, loss: backward(run, loss * float("nan") if (rank, run.step) == poison else loss)
    with open(out, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            command(lambda: (MAIN.get(stage) or import_module(f"trainer.train_{stage}").main)(flags))
        except SystemExit as end:
            print(end.code)
            raise
