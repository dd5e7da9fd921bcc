"""Run a function over a stream in all cores, results in the stream's order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from dataset.token_cache import num_cores

AHEAD = 3  # items per process that are read before their results are taken: a bound on memory
SERIAL_ITEMS = 4  # up to here starting processes costs more time than they save


def map_in_order(function: Callable, items: Iterable, num_proc: int | None = None) -> Iterator:
    """Yield function(item) of each item in order, with `num_proc` processes (default: all cores) unless there are few.

    The processes are spawned, so function, items and results must pickle; the function is sent once to each process.
    """
    num_proc, items = num_proc or num_cores(), iter(items)
    first = list(islice(items, SERIAL_ITEMS + 1))
    if num_proc == 1 or len(first) <= SERIAL_ITEMS:
        yield from map(function, chain(first, items))
        return
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start_worker, (function,))
    try:
        pending = deque()
        for item in chain(first, items):
            pending.append(pool.submit(_work, item))
            if len(pending) > AHEAD * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(f"one of {num_proc} processes was killed, most likely because memory ran out. "
                      "Use fewer: a smaller --num_proc.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable


def _start_worker(function: Callable) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too, but it is the parent that ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed: nobody will ever take a result


def _work(item):
    return _function(item)
