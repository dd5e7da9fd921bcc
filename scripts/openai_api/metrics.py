"""Counters and gauges for Prometheus, in a registry of their own: two servers in one process do not mix theirs."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What /metrics shows. `models` is {name: ServedModel}."""

    def __init__(self, models):
        self.models, self.registry = models, CollectorRegistry()
        def counter(name, text):
            return Counter(f"minimind_{name}", text, ["model"], registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.reused_tokens = counter("reused_prompt_tokens", "Tokens of prompts that were in the cache already")
        self.generated_tokens = counter("generated_tokens", "Tokens that were sampled")
        self.finished = Counter("minimind_finished", "Answers that ended", ["model", "reason"], registry=self.registry)
        self.first_token = Histogram("minimind_first_token_seconds", "From request to first token", ["model"],
                                     buckets=SECONDS, registry=self.registry)
        self.duration = Histogram("minimind_request_seconds", "From request to the end of the reply", ["model"],
                                  buckets=SECONDS, registry=self.registry)
        self.registry.register(self)

    def collect(self):
        """Gauges are read when they are asked for."""
        for name, text, read in (("running", "Answers being written", lambda served: served.thread.num_running),
                                 ("waiting", "Answers that wait for a slot", lambda served: served.thread.num_waiting),
                                 ("in_flight", "Answers taken in and not ended", lambda served: served.in_flight)):
            family = GaugeMetricFamily(f"minimind_{name}", text, labels=["model"])
            for served in self.models.values():
                family.add_metric([served.name], read(served))
            yield family

    def render(self):
        """(body, status, headers, media type) of the answer to /metrics."""
        return generate_latest(self.registry), 200, None, CONTENT_TYPE

    def clock(self, model, start, generation):
        return Clock(self, model, start, generation)


class Clock:
    """Takes the times of one HTTP request, and counts its tokens at the end of each answer."""

    def __init__(self, metrics, model, start, generation):
        self.metrics, self.model, self.start, self.generation, self.is_begun = metrics, model, start, generation, False

    def note(self, pieces):
        """Take note of what a step has brought."""
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

    def end(self):
        self.metrics.duration.labels(self.model).observe(time.perf_counter() - self.start)
