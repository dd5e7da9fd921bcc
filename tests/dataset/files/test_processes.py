"""The pool: results in order, with one process and with several; errors reach the user."""

import os
import signal

import pytest

from dataset.files import processes
from dataset.files.processes import WorkerPool


def square(number):  # here at the top, where worker processes find it
    if number == "bad":
        raise ValueError("f.jsonl:77: bad line. Mend it.")
    if number == "out of memory":
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid(), os.environ.get("TOKENIZERS_PARALLELISM")


def squares(pool, items):
    return [result[0] for result in pool.map(items, "squares", lambda result: 1)]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_the_order_of_the_items(num_proc, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with WorkerPool(square, num_proc) as pool:
        results = list(pool.map(iter(range(100)), "squares", lambda result: 1))
    assert [result[0] for result in results] == [number**2 for number in range(100)]
    elsewhere = num_proc > 1
    assert all((pid != os.getpid()) == elsewhere for _, pid, _ in results)
    assert {parallelism for _, _, parallelism in results} == ({"false"} if elsewhere else {None})


def test_no_more_is_read_than_the_processes_need():
    read = []
    with WorkerPool(square, 2) as pool:
        results = pool.map((read.append(i) or i for i in range(1000)), "squares", lambda result: 1)
        for taken in range(1, 20):
            next(results)
            assert len(read) <= max(taken + 2 * processes.AHEAD + 1, processes.SERIAL_ITEMS + 1)


def test_few_items_start_no_process_and_several_streams_share_the_processes(monkeypatch):
    started, executor = [], processes.ProcessPoolExecutor
    monkeypatch.setattr(
        processes, "ProcessPoolExecutor", lambda *args: started.append(1) or executor(*args)
    )
    with WorkerPool(square, 2) as pool:
        for count in (5, 3):
            assert len(squares(pool, range(count))) == count
        assert not started
        for count in (1, 20, 2):
            assert squares(pool, range(count)) == [number**2 for number in range(count)]
    assert started == [1]


def test_an_error_in_a_process_reaches_the_user():
    with (
        WorkerPool(square, 2) as pool,
        pytest.raises(ValueError, match=r"f\.jsonl:77: bad line\. Mend it\."),
    ):
        squares(pool, [*range(20), "bad", *range(5)])


def test_a_killed_process_is_an_error_with_advice():
    with (
        WorkerPool(square, 2) as pool,
        pytest.raises(OSError, match=r"one of 2 worker processes was killed.*--num_proc"),
    ):
        squares(pool, [*range(20), "out of memory", *range(40)])
