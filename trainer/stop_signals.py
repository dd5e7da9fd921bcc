"""Ctrl-C and SIGTERM end a run after the step that is under way, with a checkpoint; a second Ctrl-C ends it at once."""

import os
import signal
import time

GRACE_SECONDS = 2  # torchrun passes Ctrl-C on to processes that the terminal has told already: that is no second one


class StopSignals:
    """Catches SIGINT and SIGTERM inside a `with`; `received` is the first of them, or None."""

    def __init__(self):
        self.received, self.since, self.before = None, 0.0, {}

    def __enter__(self):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        except ValueError:
            pass  # not in the main thread: whoever runs us there looks after signals
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number, frame):
        """Remember the first signal; a second Ctrl-C is KeyboardInterrupt."""
        repeated = self.received is not None and number == signal.SIGINT
        passed_on = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.since < GRACE_SECONDS
        if repeated and not passed_on:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")
