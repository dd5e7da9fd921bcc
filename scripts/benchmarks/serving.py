"""How fast the server is for many clients at once, and whether it stays correct: latency,
throughput, slots, threads, memory.

    python scripts/bench.py serving --weight full_sft            # 1, 8, 32 clients, 10 seconds each
    python scripts/bench.py serving --weight full_sft --clients 64 --seconds 60 --hang_up
    python scripts/bench.py serving --url http://127.0.0.1:8000 --model full_sft    # one that runs

The server is a process of its own, and so are the clients. Each asks one question after the other,
greedily and for the same number of tokens, as a stream. Every completion is compared with the one
that the same question got while nobody else asked. `different` counts those that are not the same:
two tokens were equally likely to within rounding, or completions were mixed up; `mixed up` counts
completions of another question. With --hang_up every second request is left after a few tokens.
After each round the server must be idle at once. `ratio` compares the throughput with the first
round's.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.results import BenchArgs, Results
from trainer.runtime.arguments import ROOT, arg, check_positive

WORDS = "lamp river stone garden winter bread music harbour letter forest mirror engine".split()
HELLO = re.compile(r"listening at (http://\S+)/v1")
IDLE_WITHIN = 5.0  # seconds in which an idle server must have freed all slots
COLUMNS = """clients tokens_per_s ratio finished left first_p50_ms first_p95_ms between_p50_ms
between_p95_ms different mixed_up failed idle_after_s threads rss_mb"""


@dataclass
class Args(BenchArgs):
    weight: str = arg("full_sft", "what to serve: a run in SAVE_DIR, or a checkpoint folder")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    url: str = arg("", "measure the server that listens here, instead of starting one")
    model: str = arg("bench", "with --url: the name of the model there")
    server_flags: list[str] = arg(
        [], "further flags of the server, without the dashes: int8 max_batch_size=8", nargs="+"
    )
    clients: list[int] = arg([1, 8, 32], "rounds, with so many clients each", nargs="+")
    seconds: float = arg(10.0, "length of a round")
    max_tokens: int = arg(64, "length of every completion")
    questions: int = arg(12, "different questions")
    hang_up: bool = arg(False, "every second request is left after a few tokens")
    seed: int = arg(42, "decides which client asks what")

    def check(self) -> None:
        check_positive(self, "seconds", "max_tokens", "questions")
        if min(self.clients) < 1:
            raise ValueError(f"--clients {min(self.clients)}: give 1 or more")
        if self.url and {"weight", "save_dir", "server_flags"} & self.given:
            raise ValueError(
                "--url measures a server that runs already: leave --weight, --save_dir and "
                "--server_flags out"
            )
        if "model" in self.given and not self.url:
            raise ValueError("--model has an effect with --url only: leave it out")


def measure(args: Args, results: Results) -> None:
    """A row per number of clients; the state of the server before, and its exit status."""
    server, failures = Server(args), []
    try:
        alone = Round(server.url, args)
        asyncio.run(alone.ask_each())
        before = server.state()
        results.note(f"before: {before}", before=before)
        for clients in args.clients:
            played = Round(server.url, args, alone.texts)
            row = {"clients": clients} | asyncio.run(played.play(clients))
            row |= {"idle_after_s": server.wait_until_idle(), **server.state()}
            first = results.rows[0] if results.rows else row
            results.add(row | {"ratio": row["tokens_per_s"] / first["tokens_per_s"]})
            failures += played.failed
    finally:
        status = server.close()
    failed = "".join(f"\nfailed: {failure}" for failure in sorted(set(failures))[:10])
    results.note(f"exit status of the server: {status}{failed}", exit_status=status)


class Server:
    """The server under test: its URL, and its process (None where it runs already)."""

    def __init__(self, args: Args):
        self.process, self.url = None, args.url
        if args.url:
            return
        flags = [text for flag in args.server_flags for text in f"--{flag}".split("=", 1)]
        flags += ["--weight", f"{args.model}={args.weight}", "--save_dir", args.save_dir]
        script = str(ROOT / "scripts" / "serve_openai_api.py")
        self.process = subprocess.Popen(
            [sys.executable, script, "--port", "0", *flags], stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if hello := HELLO.match(line):
                self.url = hello[1]
                return
        raise ValueError("the server has not started: see its message above")

    def state(self) -> dict[str, int | None]:
        """{"running", "waiting", "threads", "rss_mb"}; the last two None where they are unknown."""
        import httpx

        text = httpx.get(f"{self.url}/metrics").text
        state = dict.fromkeys(("running", "waiting", "threads", "rss_mb"))
        for name in ("running", "waiting"):
            found = re.findall(rf"^minimind_{name}\{{.*\}} (\S+)", text, re.MULTILINE)
            state[name] = int(sum(map(float, found)))
        status = Path(f"/proc/{self.process.pid}/status") if self.process else None
        if status and status.exists():
            fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
            state["threads"] = int(fields["Threads"])
            state["rss_mb"] = int(fields["VmRSS"].split()[0]) // 1024
        return state

    def wait_until_idle(self) -> float:
        """Seconds until no request runs or waits; ValueError if slots are not freed in time."""
        start = time.perf_counter()
        while (state := self.state())["running"] or state["waiting"]:
            if time.perf_counter() - start > IDLE_WITHIN:
                raise ValueError(
                    f"{IDLE_WITHIN} s after all clients had left, {state['running']} requests "
                    "still ran"
                )
            time.sleep(0.02)
        return time.perf_counter() - start

    def close(self) -> int:
        """End it as its operator would; returns its exit status."""
        if not self.process:
            return 0
        self.process.terminate()
        return self.process.wait(30)


class Round:
    """The clients of a round and what they have seen; `expected`: the text for each question."""

    def __init__(self, url: str, args: Args, expected: list[str] | None = None):
        self.url, self.args, self.expected = url, args, expected
        self.first, self.between = [], []  # seconds until the first token, and between tokens
        self.tokens, self.texts, self.counts, self.failed = 0, [], Counter(), []

    def _open(self):
        import httpx

        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits)

    async def ask_each(self) -> None:
        """Ask all questions, one after the other: `texts` are the completions."""
        async with self._open() as client:
            for number in range(self.args.questions):
                self.texts.append(await self._ask(client, number))

    async def play(self, clients: int) -> dict[str, Any]:
        """Let so many clients ask for --seconds; returns the metrics, latencies in milliseconds."""
        async with self._open() as client:
            start = time.perf_counter()
            jobs = (self._ask_until(client, n, start + self.args.seconds) for n in range(clients))
            await asyncio.gather(*jobs)
        seconds = time.perf_counter() - start
        row = {"tokens_per_s": self.tokens / seconds, "failed": len(self.failed)}
        row |= {name: self.counts[name] for name in ("finished", "left", "different", "mixed_up")}
        for name in ("first", "between"):
            for percent in (50, 95):
                row[f"{name}_p{percent}_ms"] = percentile(getattr(self, name), percent)
        return row

    async def _ask_until(self, client, number, end):
        """One client: it asks at random, and leaves every second request if it hangs up."""
        import httpx

        draw = random.Random(f"{self.args.seed} {number}")
        while time.perf_counter() < end:
            which = draw.randrange(self.args.questions)
            leave_after = draw.randint(1, 8) if self.args.hang_up and draw.random() < 0.5 else None
            try:
                text = await self._ask(client, which, leave_after)
            except (httpx.HTTPError, ValueError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                continue
            self.counts["left" if text is None else "finished"] += 1
            if text is not None and text != self.expected[which]:
                self.counts["different"] += 1
                self.counts["mixed_up"] += text in self.expected

    async def _ask(self, client, number, leave_after=None):
        """The completion of a question, None if it was left after so many tokens."""
        start = last = time.perf_counter()
        text, rest, count = [], b"", 0
        body = request_body(self.args, number)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                message = (await response.aread()).decode()[:200]
                raise ValueError(f"status {response.status_code}: {message}")
            async for part in response.aiter_bytes():
                *events, rest = (rest + part).split(b"\n\n")
                new, now = [x for event in events if (x := content(event))], time.perf_counter()
                if not new:
                    continue
                if count:
                    self.between.append(now - last)
                else:
                    self.first.append(now - start)
                text += new
                last, count = now, count + len(new)
                if leave_after and count >= leave_after:
                    self.tokens += count
                    return None
        self.tokens += self.args.max_tokens
        return "".join(text)


def request_body(args: Args, number: int) -> dict[str, Any]:
    """A question unlike the others, whose completion always has max_tokens."""
    question = (
        f"{number + 3} plus {7 * number + 1}: what is it? Then tell me about the "
        f"{WORDS[number % len(WORDS)]}."
    )
    return {
        "model": args.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "max_tokens": args.max_tokens,
        "ignore_eos": True,
    }


def content(event: bytes) -> str | None:
    """The text in a stream's event, None if it has none."""
    if not event.startswith(b"data: {"):
        return None
    choices = json.loads(event[6:])["choices"]
    return choices[0]["delta"].get("content") if choices else None


def percentile(seconds: list[float], percent: int) -> float | None:
    """In milliseconds; None of nothing."""
    import numpy as np

    return 1000 * float(np.percentile(seconds, percent)) if seconds else None
