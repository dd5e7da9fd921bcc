"""Conversations on the web page: an answer is written by the engine while the page looks, looks away, or comes back.

A Turn is the answer to one message: replies of the model, and between them the tools that it called. The engine's thread
puts what it writes into a queue; `advance` takes it from there whenever the page has time.
"""

import json
import queue
import time
from dataclasses import dataclass, field

from dataset.chat_reply import ReplyParser, collect
from dataset.tools import ToolBox
from dataset.toy_scorer import MAX_TOOL_ROUNDS
from dataset.toy_tools import TOY_TOOLS
from model.sampling import SamplingParams

ROOM = 64  # tokens that must be left for an answer; earlier rounds make way


@dataclass(frozen=True)
class Settings:
    """How an answer is to be written; `tools` are names in `box`, thinking None leaves it to the model."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_tokens: int = 512
    seed: int | None = None
    thinking: bool | None = None
    tools: tuple[str, ...] = ()
    box: ToolBox = TOY_TOOLS
    system: str = ""

    def sampling(self, attempt):
        """SamplingParams of the answer's attempt-th version: with a seed each version has the next one."""
        seed = None if self.seed is None else self.seed + attempt
        return SamplingParams(self.temperature, self.top_k, self.top_p, max_tokens=self.max_tokens, seed=seed)


@dataclass
class Reply:
    """One reply of the model, and what the tools that it called returned: [(name, arguments, result)]."""

    request: object
    parser: ReplyParser
    asked: float
    events: list = field(default_factory=list)  # what the parser has made of it so far
    first: float | None = None  # when its first and its last token came
    last: float | None = None
    results: list = field(default_factory=list)

    @property
    def message(self):
        """The reply as a message of the conversation; calls that were not run are left out."""
        message = collect(self.events)
        if not self.results:
            message.pop("tool_calls", None)
        return message

    def run_calls(self, box):
        """Run the tools of a ToolBox that were called."""
        for call in collect(self.events).get("tool_calls", []):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            self.results.append((name, arguments, box.run(name, arguments)))


class Turn:
    """The answer of a Loaded checkpoint to `text`, which follows the messages of `history`."""

    def __init__(self, loaded, history, text, settings, attempt=0):
        self.loaded, self.history, self.text, self.settings, self.attempt = loaded, history, text, settings, attempt
        self.tools = settings.tools if loaded.chats else ()
        self.replies, self.outputs = [], queue.SimpleQueue()
        self.is_running, self.error, self.note, self.num_left_out = True, "", "", 0
        self._begin_reply()

    @property
    def messages(self):
        """The turn as messages, the user's first."""
        messages = [{"role": "user", "content": self.text}]
        for reply in self.replies:
            messages.append(reply.message)
            messages += [{"role": "tool", "content": result} for _, _, result in reply.results]
        return messages

    def advance(self, timeout):
        """Wait for news, at most `timeout` seconds, and take in all there are."""
        try:
            news = self.outputs.get(timeout=timeout)
            while True:
                self._take(*news)
                news = self.outputs.get_nowait()
        except queue.Empty:
            pass

    def stop(self):
        """End the answer where it is."""
        if self.is_running:
            self.loaded.engine.cancel(self.replies[-1].request)
            self.replies[-1].events += self.replies[-1].parser.finish()
            self._end("was_stopped")

    def stats(self):
        """Counts and times of all replies: tokens, prompt, reused, speed (tokens/s), first (seconds until the first token)."""
        requests = [reply.request for reply in self.replies]
        tokens = sum(len(request.sampled) for request in requests)
        timed = [reply for reply in self.replies if reply.first is not None]
        seconds = sum(reply.last - reply.first for reply in timed)
        # a reply's first token is paid for by its prompt
        speed = (sum(len(reply.request.sampled) - 1 for reply in timed) / seconds) if seconds else 0.0
        return {"tokens": tokens, "prompt": sum(len(request.prompt) for request in requests),
                "reused": sum(request.num_reused for request in requests), "speed": speed,
                "first": timed[0].first - timed[0].asked if timed else 0.0}

    def _begin_reply(self):
        try:
            prompt = self._prompt()
            asked = time.perf_counter()
            request = self.loaded.engine.submit(prompt, self.settings.sampling(self.attempt), self._on_output)
        except (ValueError, RuntimeError) as error:
            self.error, self.is_running = str(error), False
            return
        in_reasoning = self.loaded.chats and self.settings.thinking is True
        self.replies.append(Reply(request, ReplyParser(in_reasoning, tools=bool(self.tools)), asked))

    def _on_output(self, output):
        """In the engine's thread: note the time, and whether this is the end (the request itself soon knows more)."""
        reason = None if isinstance(output, Exception) else output.request.finish_reason
        self.outputs.put((time.perf_counter(), output, reason))

    def _prompt(self):
        """Token ids for the next reply; where they do not fit, the oldest rounds are left out."""
        schemas = self.settings.box.schemas(self.tools) or None
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        history, num_left_out = self.history, 0
        while True:
            ids = self.loaded.encode([*system, *history, *self.messages], schemas, self.settings.thinking)
            starts = [i for i, message in enumerate(history) if message["role"] == "user"]
            if len(ids) + ROOM <= self.loaded.max_len or not starts:
                self.num_left_out = num_left_out
                return ids
            history = history[starts[1]:] if len(starts) > 1 else []
            num_left_out += 1

    def _take(self, when, output, reason):
        if not self.is_running:
            return  # what came after the stop
        if isinstance(output, Exception):
            self.error, self.is_running = str(output), False
            return
        reply = self.replies[-1]
        reply.first, reply.last = reply.first or when, when
        reply.events += reply.parser.feed(output.text)
        if reason:
            self._finish_reply(reply, reason)

    def _finish_reply(self, reply, reason):
        reply.events += reply.parser.finish()
        if reason == "stop":
            reply.run_calls(self.settings.box)
        if reply.results and len(self.replies) <= MAX_TOOL_ROUNDS:
            self._begin_reply()
        else:
            self._end("many_tools" if reply.results else "was_cut" if reason == "length" else "")

    def _end(self, note):
        self.is_running, self.note = False, note


class Conversation:
    """Turns, one after the other, with the checkpoint that is chosen at the time."""

    def __init__(self):
        self.turns = []

    @property
    def is_running(self):
        return bool(self.turns) and self.turns[-1].is_running

    def ask(self, loaded, text, settings):
        """Begin the next turn; one that is still being written is stopped."""
        self.stop()
        history = [message for turn in self.turns for message in turn.messages]
        self.turns.append(Turn(loaded, history, text, settings))

    def regenerate(self, loaded, settings):
        """Write the last turn again."""
        self.stop()
        last = self.turns.pop()
        self.turns.append(Turn(loaded, last.history, last.text, settings, last.attempt + 1))

    def stop(self):
        """End the turn that is being written."""
        if self.is_running:
            self.turns[-1].stop()

