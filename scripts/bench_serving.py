"""How fast the server is for many clients at once, and whether it stays whole: latency, throughput, slots, threads, memory.

    python scripts/bench_serving.py --weight full_sft                                # 1, 8 and 32 clients, 10 seconds each
    python scripts/bench_serving.py --weight full_sft --clients 64 --seconds 60 --hang_up --json out/bench_serving.json
    python scripts/bench_serving.py --url http://127.0.0.1:8000 --model full_sft     # a server that runs already

The server is a process of its own, and so are the clients. Each asks one question after the other, greedily and for the same
number of tokens, as a stream. Every answer is compared with the one that the same question got while nobody else asked:
a different one means that texts were mixed up (or that two tokens were equally likely to within rounding, which is
told apart by looking whether it is the answer to another question). With --hang_up every second request is left after a
few tokens. After each round the server must be idle again at once.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx
import numpy as np

from trainer.arguments import arg, check_positive, command, parse_args
from trainer.metrics import write_json

WORDS = ("lamp", "river", "stone", "garden", "winter", "bread", "music", "harbour", "letter", "forest", "mirror", "engine")
HELLO = re.compile(r"listening at (http://\S+)/v1")
IDLE_WITHIN = 5.0  # seconds in which an idle server must have freed all slots


@dataclass
class BenchArgs:
    weight: str = arg("full_sft", "what to serve: a run in SAVE_DIR, or a checkpoint folder")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    url: str = arg("", "measure the server that listens here, instead of starting one")
    model: str = arg("bench", "with --url: the name of the model there")
    server_flags: list[str] = arg([], "further flags of the server, without the dashes: int8 max_batch_size=8", nargs="+")
    clients: list[int] = arg([1, 8, 32], "rounds, with so many clients each", nargs="+")
    seconds: float = arg(10.0, "length of a round")
    max_tokens: int = arg(64, "length of every answer")
    questions: int = arg(12, "different questions")
    hang_up: bool = arg(False, "every second request is left after a few tokens")
    seed: int = arg(42, "decides which client asks what")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range, and for flags without effect."""
        check_positive(self, "seconds", "max_tokens", "questions")
        if min(self.clients) < 1:
            raise ValueError(f"--clients {min(self.clients)}: give 1 or more")
        if self.url and {"weight", "save_dir", "server_flags"} & self.given:
            raise ValueError("--url measures a server that runs already: leave --weight, --save_dir and --server_flags out")
        if "model" in self.given and not self.url:
            raise ValueError("--model has an effect with --url only: leave it out")


@dataclass
class Round:
    """What the clients of a round have seen; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0
    left: int = 0
    different: int = 0
    mixed_up: int = 0
    failed: list[str] = field(default_factory=list)


class Server:
    """The server under test: its URL, and what the system says of its process (None where it is another machine's)."""

    def __init__(self, args):
        self.process, self.url = None, args.url
        if not args.url:
            flags = [text for flag in args.server_flags for text in f"--{flag}".split("=", 1)]
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py"), "--weight", f"{args.model}={args.weight}",
                 "--save_dir", args.save_dir, "--port", "0", *flags], stdout=subprocess.PIPE, text=True)
            for line in self.process.stdout:
                if hello := HELLO.match(line):
                    self.url = hello[1]
                    break
            else:
                raise ValueError("the server has not started: see its message above")

    def state(self):
        """{"threads", "rss_mb", "running", "waiting"}."""
        text = httpx.get(f"{self.url}/metrics").text
        out = {name: int(sum(float(x) for x in re.findall(rf"^minimind_{name}\{{.*\}} (\S+)", text, re.MULTILINE)))
               for name in ("running", "waiting")}
        if self.process:
            status = Path(f"/proc/{self.process.pid}/status")
            if status.exists():
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                out |= {"threads": int(fields["Threads"]), "rss_mb": int(fields["VmRSS"].split()[0]) // 1024}
        return out

    def close(self):
        """End it as its operator would; returns its exit status."""
        if not self.process:
            return 0
        self.process.terminate()
        return self.process.wait(30)


def question(number):
    """A question unlike the others."""
    return f"{number + 3} plus {7 * number + 1}: what is it? Then tell me about the {WORDS[number % len(WORDS)]}."


async def ask(client, args, number, seen=None, leave_after=None):
    """Ask question `number`; returns (text, tokens), and notes in the Round `seen` when the text came. None: left early."""
    body = {"model": args.model, "messages": [{"role": "user", "content": question(number)}], "temperature": 0, "stream": True,
            "max_tokens": args.max_tokens, "ignore_eos": True}  # so an answer always has max_tokens, some of them without text
    start = last = time.perf_counter()
    text, rest, count = [], b"", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for part in response.aiter_bytes():
            *events, rest = (rest + part).split(b"\n\n")
            now = time.perf_counter()
            new = [piece for event in events if (piece := content(event))]
            if not new:
                continue
            if seen:
                (seen.between if count else seen.first).append(now - (last if count else start))
            text += new
            last, count = now, count + len(new)
            if leave_after and count >= leave_after:
                return None, count
    return "".join(text), args.max_tokens


def content(event):
    """The text in a stream's event, None if it has none."""
    if not event.startswith(b"data: {"):
        return None
    choices = json.loads(event[6:])["choices"]
    return choices[0]["delta"].get("content") if choices else None


async def one_client(client, args, number, expected, seen, until):
    """Ask until the time is over."""
    draw = random.Random(f"{args.seed} {number}")
    while time.perf_counter() < until:
        which = draw.randrange(args.questions)
        leave_after = draw.randint(1, 8) if args.hang_up and draw.random() < 0.5 else None
        try:
            text, count = await ask(client, args, which, seen, leave_after)
        except (httpx.HTTPError, ValueError) as error:
            seen.failed.append(f"{type(error).__name__}: {error}")
            continue
        seen.tokens += count
        seen.left += text is None
        seen.finished += text is not None
        if text is not None and text != expected[which]:
            seen.different += 1
            seen.mixed_up += text in expected


async def play(url, args, clients, expected):
    """One round: (Round, seconds it took)."""
    seen, start = Round(), time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        jobs = [one_client(client, args, n, expected, seen, start + args.seconds) for n in range(clients)]
        await asyncio.gather(*jobs)
    return seen, time.perf_counter() - start


async def alone(url, args):
    """The answer to each question while nobody else asks."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return [(await ask(client, args, number))[0] for number in range(args.questions)]


def until_idle(server):
    """Seconds until no answer runs or waits; ValueError if that takes too long: slots were not freed."""
    start = time.perf_counter()
    while (state := server.state())["running"] or state["waiting"]:
        if time.perf_counter() - start > IDLE_WITHIN:
            raise ValueError(f"{IDLE_WITHIN} s after all clients had left, {state['running']} answers ran still")
        time.sleep(0.02)
    return time.perf_counter() - start


def figures(clients, seen, seconds, server):
    """The figures of a round as a flat dict; times in milliseconds."""
    def percentile(times, share):
        return round(1000 * float(np.percentile(times, share)), 1) if times else None

    return {"clients": clients, "tokens_per_s": round(seen.tokens / seconds, 1), "finished": seen.finished, "left": seen.left,
            "first_p50_ms": percentile(seen.first, 50), "first_p95_ms": percentile(seen.first, 95),
            "between_p50_ms": percentile(seen.between, 50), "between_p95_ms": percentile(seen.between, 95),
            "different": seen.different, "mixed_up": seen.mixed_up, "failed": len(seen.failed),
            "idle_after_s": round(until_idle(server), 2), **server.state()}


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    server, rows = Server(args), []
    try:
        expected = asyncio.run(alone(server.url, args))
        before = server.state()
        print(f"before: {before}")
        for clients in args.clients:
            seen, seconds = asyncio.run(play(server.url, args, clients, expected))
            rows.append(figures(clients, seen, seconds, server))
            rows[-1]["ratio"] = round(rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"], 2)
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
            for failure in sorted(set(seen.failed))[:3]:
                print(f"  failed: {failure}")
    finally:
        status = server.close()
    print(f"the server's exit status: {status}")
    if args.json:
        write_json(args.json, {"weight": args.url or args.weight, "cores": os.cpu_count(), "max_tokens": args.max_tokens,
                               "hang_up": args.hang_up, "before": before, "rows": rows, "exit_status": status})


if __name__ == "__main__":
    command(main)
