"""An engine in a thread of its own, for many callers at once: the server and the web page."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from .engine import Engine, Output, Request
from .sampling import SamplingParams


class EngineThread:
    """Runs `engine` while there is work; every method may be called from any thread.

    after_step: called in the engine's thread when all outputs of a step were handed on.
    """

    def __init__(self, engine: Engine, after_step: Callable[[], None] = lambda: None):
        self.engine, self.after_step = engine, after_step
        self.inbox, self.calls = deque(), deque()  # Requests; (function, its Future)
        self.unfinished = set()  # Requests whose last Output was not handed on yet
        self.lock = threading.Lock()  # nothing comes in once the thread has decided to end
        self.wake, self.failure, self.is_closing = threading.Event(), None, False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def num_running(self) -> int:
        return len(self.engine.running) + (self.engine.prefilling is not None)

    @property
    def num_waiting(self) -> int:
        return len(self.engine.waiting) + len(self.inbox)

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_output: Callable[[Output | Exception], None],
    ) -> Request:
        """Queue a request; `on_output(Output)` is called in the engine's thread, with a
        `finish_reason` the last time.

        After a failure it is called once with the exception instead. ValueError if the prompt does
        not fit, RuntimeError once the engine is closed or has failed.
        """
        request = self.engine.new_request(prompt, params)
        request.on_output = on_output
        with self.lock:
            self._check_open()
            self.unfinished.add(request)
            self.inbox.append(request)
        self.wake.set()
        return request

    def call(self, function: Callable[[], object]) -> Future:
        """Run `function()` in the engine's thread, between two steps.

        RuntimeError once the engine is closed or has failed.
        """
        future = Future()
        with self.lock:
            self._check_open()
            self.calls.append((function, future))
        self.wake.set()
        return future

    def cancel(self, request: Request) -> None:
        """Let a request end with the step under way."""
        request.is_cancelled = True
        self.wake.set()

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Output]:
        """Yield a request's Outputs as they come; leaving the loop early cancels it."""
        outputs = queue.SimpleQueue()
        request = self.submit(prompt, params, outputs.put)
        try:
            while True:
                output = outputs.get()
                if isinstance(output, Exception):
                    raise RuntimeError(f"the engine has stopped: {output}") from output
                yield output
                # the request's own would end a slow reader's loop before the last pieces
                if output.finish_reason:
                    return
        finally:
            if request.finish_reason is None:
                self.cancel(request)

    def close(self, timeout: float | None = None) -> None:
        """Take in nothing more, wait at most `timeout` seconds for requests, cancel the rest."""
        with self.lock:
            self.is_closing = True
        self.wake.set()
        self.thread.join(timeout)
        with self.lock:
            rest = list(self.unfinished)
        for request in rest:
            self.cancel(request)
        self.thread.join()

    def _check_open(self):
        if self.failure or self.is_closing:
            why = f": {self.failure}" if self.failure else ""
            raise RuntimeError(f"the engine has stopped{why}")

    def _run(self):
        try:
            while True:
                with self.lock:
                    is_idle = not self.unfinished and not self.calls
                    if is_idle and self.is_closing:
                        return
                if is_idle:
                    self.wake.wait()
                self.wake.clear()
                self._work()
        except Exception as error:  # everyone who waits must hear of it
            with self.lock:
                self.failure = error
            for request in self.unfinished:
                request.on_output(error)
            for _, future in self.calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            self.unfinished.clear()
            self.after_step()
            raise

    def _work(self):
        """One call and one step, as far as there are any."""
        if self.calls:
            self._run_call(*self.calls.popleft())
        while self.inbox:
            self.engine.waiting.append(self.inbox.popleft())
        for output in self.engine.step() if self.engine.num_unfinished else []:
            if output.finish_reason:
                with self.lock:
                    self.unfinished.discard(output.request)
            output.request.on_output(output)
        self.after_step()

    @staticmethod
    def _run_call(function, future):
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:  # it belongs to the caller: the engine continues
            future.set_exception(error)
