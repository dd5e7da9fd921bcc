"""Several ranks of a training stage as processes of this machine, forked from one that has imported everything already."""

import multiprocessing
import os
import socket
import time

from trainer import train_full_sft, train_pretrain

MAIN = {"pretrain": train_pretrain.main, "sft": train_full_sft.main}


def run_ranks(count, stage, flags, seconds=120, poison=None):
    """Train with `count` ranks; fails unless all end well. poison: (rank, step) whose loss is made nan."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train_full_sft", "trainer.train_pretrain"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_rank, args=(rank, count, port, stage, flags, poison)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break  # the others wait for it in vain
        time.sleep(0.02)
    for process in processes:
        process.kill() if process.is_alive() and time.monotonic() > end else process.join(10)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def one_rank(rank, count, port, stage, flags, poison):
    """What one of the processes does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if poison:
        seed, backward = train_pretrain.Run.seed, train_pretrain.Run.backward

        def remember(run, step):
            run.step = step
            seed(run, step)

        train_pretrain.Run.seed = remember
        train_pretrain.Run.backward = lambda run, loss: backward(run, loss * float("nan") if (rank, run.step) == poison else loss)
    MAIN[stage](flags)
