"""Work for all cores: a function over streams of items; the results keep the items' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice

from tqdm import tqdm

SERIAL_ITEMS = 8  # up to here starting processes costs more time than they save
AHEAD = 4  # items per process that are read before their results are taken: a bound on memory


class WorkerPool:
    """Call `function` on items in this process at first, and with `num_proc` (default: all cores)
    when there are many.

    The processes are spawned once, for all streams, so the function, items and results must pickle;
    the function travels once to each process. OSError where one of them is killed.
    """

    def __init__(self, function: Callable, num_proc: int | None = None):
        self.function, self.num_proc = function, num_proc or num_cores()
        self._serial_left = SERIAL_ITEMS
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception) -> None:
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(
        self, items: Iterable, name: str, num_rows: Callable, total_rows: int | None = None
    ) -> Iterator:
        """Yield function(item) of each item, in order.

        A progress bar called `name` appears on a terminal when there is much to do:
        num_rows(result) moves it, total_rows is its end, if that is known.
        """
        items = iter(items)
        first = list(islice(items, self._serial_left + 1))
        small = len(first) <= self._serial_left
        self._serial_left = self._serial_left - len(first) if small else 0
        run = self._in_parallel if not small and self.num_proc > 1 else partial(map, self.function)
        results = run(chain(first, items))
        # disable=None: no bar where no terminal is
        with tqdm(total=total_rows, unit=" rows", desc=name, disable=small or None) as bar:
            for result in results:
                bar.update(num_rows(result))
                yield result

    def _in_parallel(self, items: Iterable) -> Iterator:
        if not self._executor:
            # fork is unsafe once torch or a tokenizer has started threads
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                self.num_proc, context, _start_worker, (self.function,)
            )
        pending = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(_work, item))
                if len(pending) > AHEAD * self.num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                f"one of {self.num_proc} worker processes was killed, most likely because memory "
                "ran out. Use fewer: a smaller --num_proc."
            ) from error


def num_cores() -> int:
    """Cores that this process may use: fewer than all in a container."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_function: Callable


def _start_worker(function: Callable) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C reaches them too, but the parent ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed: nobody will ever take a result


def _work(item):
    return _function(item)
