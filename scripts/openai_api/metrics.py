"""Counters and gauges for Prometheus. Each server has its own registry: two in one process do not
mix.
"""

import time
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from scripts.openai_api.model_pool import Generation, Piece, ServedModel

GAUGES = (
    ("running", "Completions being decoded", lambda served: served.thread.num_running),
    ("waiting", "Completions that wait for a slot", lambda served: served.thread.num_waiting),
    ("in_flight", "Completions accepted and not ended", lambda served: served.in_flight),
)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics at /metrics."""

    def __init__(self, models: dict[str, ServedModel]):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            labels = ["model", *labels]
            return Counter(f"minimind_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"minimind_{name}", text, ["model"], buckets=SECONDS, registry=self.registry
            )

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.reused_tokens = counter(
            "reused_prompt_tokens", "Tokens of prompts that were in the cache already"
        )
        self.generated_tokens = counter("generated_tokens", "Tokens that were sampled")
        self.finished = counter("finished", "Completions that ended", "reason")
        self.ignored_fields = counter(
            "ignored_fields", "Fields of requests that were ignored", "field"
        )
        self.first_token = histogram("first_token_seconds", "From request to first token")
        self.duration = histogram("request_seconds", "From request to the end of the response")
        for name, text, read in GAUGES:  # read when they are asked for
            gauge = Gauge(f"minimind_{name}", text, ["model"], registry=self.registry)
            for served in models.values():
                gauge.labels(served.name).set_function(partial(read, served))


class Clock:
    """Measures one HTTP request, and counts its tokens at the end of each completion."""

    def __init__(self, metrics: Metrics, model: str, start: float, generation: Generation):
        self.metrics, self.model, self.start = metrics, model, start
        self.generation, self.is_begun = generation, False

    def note(self, pieces: list[Piece]) -> None:
        """Take note of the pieces of a step."""
        if not self.is_begun:
            self.is_begun = True
            self.metrics.first_token.labels(self.model).observe(time.perf_counter() - self.start)
        for piece in pieces:
            if piece.finish_reason:
                request = self.generation.requests[piece.index]
                self.metrics.finished.labels(self.model, piece.finish_reason).inc()
                self.metrics.prompt_tokens.labels(self.model).inc(len(request.prompt))
                self.metrics.reused_tokens.labels(self.model).inc(request.num_reused)
                self.metrics.generated_tokens.labels(self.model).inc(len(request.sampled))

    def end(self) -> None:
        """The response is complete."""
        self.metrics.duration.labels(self.model).observe(time.perf_counter() - self.start)
