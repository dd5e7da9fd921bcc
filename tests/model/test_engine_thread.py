"""Functions that run in an engine's thread, between its steps."""

import threading

import pytest

from model.engine_thread import EngineThread


class Idle:
    """What EngineThread needs of an engine, with nothing to do."""

    def __init__(self):
        self.waiting, self.running, self.prefilling, self.num_unfinished = [], [], None, 0

    def step(self):
        raise RuntimeError("broken")


def test_functions_run_in_the_engines_thread():
    thread = EngineThread(Idle())
    assert thread.call(threading.current_thread).result(5) is thread.thread
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0).result(5)
    assert thread.call(lambda: "goes on").result(5) == "goes on"
    thread.close()
    with pytest.raises(RuntimeError, match="has stopped"):
        thread.call(int)


def test_those_who_wait_hear_of_a_failure(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    engine = Idle()
    thread = EngineThread(engine)
    may_go_on = threading.Event()
    first = thread.call(may_go_on.wait)  # holds the engine while the others queue up
    second, third = thread.call(lambda: setattr(engine, "num_unfinished", 1)), thread.call(int)
    may_go_on.set()
    assert first.result(5) is True and second.result(5) is None
    with pytest.raises(RuntimeError, match="broken"):
        third.result(5)
    assert str(thread.failure) == "broken"
