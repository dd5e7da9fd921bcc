"""Conversations on the web page: the engine writes whether the page is looked at or not.

A Turn answers one message: completions of the model, and between them the tools that it called. The
engine's thread puts its output into a queue; `advance` takes it from there whenever the page has
time.
"""

import json
import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dataset.chat.reply import ReplyParser, collect
from dataset.chat.tools import ToolBox
from dataset.toy.scorer import MAX_TOOL_ROUNDS
from dataset.toy.tools import TOY_TOOLS
from model.engine import Output, Request
from model.sampling import SamplingParams

if TYPE_CHECKING:
    from scripts.web.engines import Loaded

ROOM = 64  # tokens that must be left for a completion; earlier rounds make way


@dataclass(frozen=True)
class Settings:
    """Settings of a completion; `tools` are names in `box`, thinking None: the model decides."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_tokens: int = 512
    seed: int | None = None
    thinking: bool | None = None
    tools: tuple[str, ...] = ()
    box: ToolBox = TOY_TOOLS
    system: str = ""

    def sampling(self, attempt: int) -> SamplingParams:
        """SamplingParams of the attempt-th version: with a seed each version has the next one."""
        seed = None if self.seed is None else self.seed + attempt
        return SamplingParams(
            self.temperature, self.top_k, self.top_p, max_tokens=self.max_tokens, seed=seed
        )


@dataclass
class Completion:
    """One completion, and the results of the tools that it called: [(name, arguments, result)]."""

    request: Request
    parser: ReplyParser
    asked: float
    events: list = field(default_factory=list)  # of the parser, so far
    first: float | None = None  # time of the first token, and of the last
    last: float | None = None
    results: list = field(default_factory=list)

    @property
    def message(self) -> dict:
        """The completion as a message of the conversation; calls that were not run are left out."""
        message = collect(self.events)
        if not self.results:
            message.pop("tool_calls", None)
        return message

    def run_calls(self, box: ToolBox) -> None:
        """Run the tools of a ToolBox that were called."""
        for call in collect(self.events).get("tool_calls", []):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            self.results.append((name, arguments, box.run(name, arguments)))


class Turn:
    """A Loaded checkpoint's answer to `text`, which follows the messages of `history`."""

    def __init__(
        self, loaded: "Loaded", history: list[dict], text: str, settings: Settings, attempt: int = 0
    ):
        self.loaded, self.settings = loaded, settings
        self.history, self.text, self.attempt = history, text, attempt
        self.tools = settings.tools if loaded.chats else ()
        self.completions: list[Completion] = []
        self.outputs = queue.SimpleQueue()
        self.is_running, self.error, self.note, self.num_left_out = True, "", "", 0
        self._begin_completion()

    @property
    def messages(self) -> list[dict]:
        """The turn as messages, the user's first."""
        messages = [{"role": "user", "content": self.text}]
        for one in self.completions:
            messages.append(one.message)
            messages += [{"role": "tool", "content": result} for _, _, result in one.results]
        return messages

    def advance(self, timeout: float) -> None:
        """Wait for output, at most `timeout` seconds, and take in all there is."""
        try:
            news = self.outputs.get(timeout=timeout)
            while True:
                self._take(*news)
                news = self.outputs.get_nowait()
        except queue.Empty:
            pass

    def stop(self) -> None:
        """End the completion where it is."""
        if self.is_running:
            last = self.completions[-1]
            self.loaded.engine.cancel(last.request)
            last.events += last.parser.finish()
            self._end("was_stopped")

    def stats(self) -> dict[str, float]:
        """Counts and times of all completions: tokens, prompt, reused, speed (tokens/s), first
        (seconds until the first token).
        """
        requests = [one.request for one in self.completions]
        timed = [one for one in self.completions if one.first is not None]
        seconds = sum(one.last - one.first for one in timed)
        # without the first tokens, whose time is that of the prompts
        later_tokens = sum(len(one.request.sampled) - 1 for one in timed)
        return {
            "tokens": sum(len(request.sampled) for request in requests),
            "prompt": sum(len(request.prompt) for request in requests),
            "reused": sum(request.num_reused for request in requests),
            "speed": later_tokens / seconds if seconds else 0.0,
            "first": timed[0].first - timed[0].asked if timed else 0.0,
        }

    def _begin_completion(self):
        try:
            prompt = self._prompt()
            asked = time.perf_counter()
            request = self.loaded.engine.submit(
                prompt, self.settings.sampling(self.attempt), self._on_output
            )
        except (ValueError, RuntimeError) as error:
            self.error, self.is_running = str(error), False
            return
        in_reasoning = self.loaded.chats and self.settings.thinking is True
        self.completions.append(
            Completion(request, ReplyParser(in_reasoning, tools=bool(self.tools)), asked)
        )

    def _on_output(self, output: Output | Exception) -> None:
        """In the engine's thread: note the time, and whether this is the end (the request itself
        will soon be ahead).
        """
        reason = None if isinstance(output, Exception) else output.request.finish_reason
        self.outputs.put((time.perf_counter(), output, reason))

    def _prompt(self):
        """Token ids of the next prompt; if they do not fit, the oldest rounds are left out."""
        schemas = self.settings.box.schemas(self.tools) or None
        system = (
            [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        )
        history, num_left_out = self.history, 0
        while True:
            ids = self.loaded.encode(
                [*system, *history, *self.messages], schemas, self.settings.thinking
            )
            starts = [i for i, message in enumerate(history) if message["role"] == "user"]
            if len(ids) + ROOM <= self.loaded.max_len or not starts:
                self.num_left_out = num_left_out
                return ids
            history = history[starts[1] :] if len(starts) > 1 else []
            num_left_out += 1

    def _take(self, when, output, reason):
        if not self.is_running:
            return  # it came after the stop
        if isinstance(output, Exception):
            self.error, self.is_running = str(output), False
            return
        last = self.completions[-1]
        last.first, last.last = last.first or when, when
        last.events += last.parser.feed(output.text)
        if not reason:
            return
        last.events += last.parser.finish()
        if reason == "stop":
            last.run_calls(self.settings.box)
        if last.results and len(self.completions) <= MAX_TOOL_ROUNDS:
            self._begin_completion()
        else:
            self._end("many_tools" if last.results else "was_cut" if reason == "length" else "")

    def _end(self, note):
        self.is_running, self.note = False, note


class Conversation:
    """Turns, one after the other, each with the checkpoint that was chosen at the time."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    @property
    def is_running(self) -> bool:
        return bool(self.turns) and self.turns[-1].is_running

    def ask(self, loaded: "Loaded", text: str, settings: Settings) -> None:
        """Begin the next turn; a running one is stopped."""
        self.stop()
        history = [message for turn in self.turns for message in turn.messages]
        self.turns.append(Turn(loaded, history, text, settings))

    def regenerate(self, loaded: "Loaded", settings: Settings) -> None:
        """Repeat the last turn."""
        self.stop()
        last = self.turns.pop()
        self.turns.append(Turn(loaded, last.history, last.text, settings, last.attempt + 1))

    def stop(self) -> None:
        """End the running turn."""
        if self.is_running:
            self.turns[-1].stop()
