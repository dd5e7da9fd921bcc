"""An engine in its thread: many callers at once, functions between its steps, failures."""

import threading
import time

import pytest

from model.engine import Engine
from model.engine_thread import EngineThread
from model.sampling import SamplingParams
from tests.helpers.networks import build, token_ids


def prompt(length):
    return token_ids(1, length, seed=length)[0].tolist()


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


class Idle:
    """An engine with nothing to do."""

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


def test_waiting_calls_raise_when_the_engine_fails(monkeypatch):
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


def test_a_thread_serves_many(tokenizer):
    runner = EngineThread(Engine(build("qwen3"), tokenizer, max_batch_size=3, max_len=128))
    asked, texts = [prompt(n) for n in (4, 9, 30, 2, 17, 8)], {}

    def ask(i):
        outputs = runner.stream(asked[i], greedy(6 + i))
        texts[i] = "".join(output.text for output in outputs)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = Engine(build("qwen3"), tokenizer, max_len=128)
    requests = engine.generate(asked, [greedy(6 + i) for i in range(6)])
    assert texts == {i: request.text for i, request in enumerate(requests)}
    for output in runner.stream(asked[0], greedy(100)):
        request = output.request
        break  # leaving the loop cancels
    runner.close()
    assert request.finish_reason == "cancelled" and runner.num_running == runner.num_waiting == 0
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.submit(asked[0], greedy(5), print)


def test_a_slow_reader_gets_all_of_the_text(tokenizer):
    runner = EngineThread(Engine(build("qwen3"), tokenizer, max_len=64))
    stream, text = runner.stream(prompt(5), greedy(20)), ""
    for output in stream:
        while output.request.finish_reason is None:
            time.sleep(0.01)
        text += output.text
    assert text == output.request.text and len(output.request.completion) == 20
    runner.close()


def test_nothing_comes_in_behind_the_end(tokenizer, monkeypatch):
    runner = EngineThread(Engine(build("qwen3"), tokenizer, max_len=64))
    make = runner.engine.new_request

    def slow(*args):
        runner.close()
        return make(*args)

    monkeypatch.setattr(runner.engine, "new_request", slow)
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.submit([40, 41], greedy(5), print)
    assert not runner.inbox and not runner.unfinished
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.call(print)


def test_a_stream_raises_when_the_engine_fails(tokenizer, monkeypatch):
    engine = Engine(build("qwen3"), tokenizer, max_len=64)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    runner = EngineThread(engine)
    with pytest.raises(RuntimeError, match="division by zero"):
        list(runner.stream([40, 41], greedy(5)))
