"""Numbers for Prometheus, under the names that dashboards of vLLM know, and some of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from hmf_jax.engine.books import Stats
from hmf_jax.engine.timings import Timing

LABELS = ("model_name", "engine")
disable_created_metrics()  # no second series that says since when each one counts


def _steps(least: float, most: float) -> list[float]:
    """1, 2, 5, 10, ... times a power of ten: bounds of a histogram."""
    out, step = [], least
    while step <= most:
        out += [round(step * factor, 9) for factor in (1, 2, 5) if step * factor <= most]
        step *= 10
    return out


_SECONDS, _SHORT, _TOKENS = _steps(0.001, 1000), _steps(0.0005, 100), _steps(1, 1_000_000)
_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length"}


class Metrics:
    """Counts what happens to requests, in a registry of its own.

    Attributes:
      registry: of Prometheus.
      model: the name of the model.
    """

    def __init__(self) -> None:
        self.registry, self.model = CollectorRegistry(), ""
        self._plain: list[Any] = []  # metrics without labels of their own
        self._told: dict[tuple[Any, ...], float] = {}  # of what engines count themselves
        self._ignored = Counter(
            "hmf:ignored_fields", "Unknown fields of requests.", ["field"], registry=self.registry
        )
        self._fields: set[str] = set()
        self._make_requests()
        self._make_engines()

    def _make_requests(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests that have a slot.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a slot.")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the cache.")
        self._success = self._counter(
            "vllm:request_success", "Requests by how they ended.", "finished_reason"
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request.", _SHORT
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Between two tokens, the mean of each request.",
            _SHORT,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to a slot.", _SECONDS
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From a slot to the first token.", _SECONDS
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _SECONDS
        )
        self._prompts = self._histogram("vllm:request_prompt_tokens", "Tokens per prompt.", _TOKENS)
        self._answers = self._histogram(
            "vllm:request_generation_tokens", "Tokens per answer.", _TOKENS
        )
        self._turn = self._histogram("vllm:iteration_tokens_total", "New tokens per turn.", _TOKENS)
        self._n = self._histogram("vllm:request_params_n", "Choices asked for.", _steps(1, 100))
        self._limit = self._histogram(
            "vllm:request_params_max_tokens", "Most new tokens asked for.", _TOKENS
        )
        self._num_iter = self._counter(
            "hmf:num_iter_requests", "Requests by iterations of GKA layers.", "num_iter"
        )
        self._broken = self._counter("hmf:nonfinite", "Requests whose logits were not finite.")

    def _make_engines(self) -> None:
        self._info = Info(
            "vllm:cache_config", "How the cache is set up.", LABELS, registry=self.registry
        )
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Part of the pages in use, 0 to 1.")
        self._swaps = self._counter("vllm:num_preemptions", "Rows moved to host memory for others.")
        self._missed = self._counter(
            "hmf:prefix_miss_tokens", "Tokens not found in the cache, and why.", "reason"
        )
        self._slots = self._gauge("hmf:slots", "Slots by what they do.", "state")
        self._bytes = self._gauge("hmf:prefix_bytes", "Bytes of the prefix cache.", "place", "kind")
        self._entries = self._gauge("hmf:prefix_entries", "Prefixes that can be hit.", "place")
        self._evictions = self._counter(
            "hmf:prefix_evictions", "Prefixes that had to leave.", "place"
        )
        self._compiles = self._counter(
            "hmf:compiles", "Programs compiled since the server is ready."
        )
        self._turns = self._made(
            Histogram, "hmf:dispatch_seconds", "How long turns take.", "kind", buckets=_SHORT
        )
        self._gaps = self._histogram(
            "hmf:host_gap_seconds", "How long the device waited for the host, at most.", _SHORT
        )
        self._peak = self._gauge("hmf:device_peak_bytes", "Most memory in use, of one device.")

    def _made(self, kind: Any, name: str, what: str, *labels: str, **options: Any) -> Any:
        metric = kind(name, what, [*LABELS, *labels], registry=self.registry, **options)
        self._plain += [] if labels else [metric]
        return metric

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return self._made(Counter, name, what, *labels)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return self._made(Gauge, name, what, *labels)

    def _histogram(self, name: str, what: str, bounds: list[float]) -> Histogram:
        return self._made(Histogram, name, what, buckets=bounds)

    def begin(self, model: str, engines: int, cache: Mapping[str, str]) -> None:
        """What is served from now on: so many engines, with memory shared out like this."""
        self.model = model
        for engine in range(engines):
            self._of(self._info, engine).info(dict(cache))
            for metric in self._plain:  # what has not happened yet is 0, not unknown
                self._of(metric, engine)
            for reason in ("stop", "length", "abort", "error"):
                self._of(self._success, engine, reason)

    def text(self) -> tuple[bytes, str]:
        """Everything as Prometheus reads it, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def ignored(self, field: str) -> None:
        """A request had a field that means nothing; clients cannot make the series endless."""
        if len(self._fields) < 100 and len(field) <= 64:
            self._fields.add(field)
        self._ignored.labels(field if field in self._fields else "others").inc()

    def _of(self, metric: Any, engine: int, *labels: str) -> Any:
        return metric.labels(self.model, str(engine), *labels)

    def queue(self, waiting: int, running: int, engine: int = 0) -> None:
        """So many more requests wait and run."""
        self._of(self._waiting, engine).inc(waiting)
        self._of(self._running, engine).inc(running)

    def asked(self, n: int, limit: int, num_iter: int | None, engine: int = 0) -> None:
        """A request was given to the engine."""
        self._of(self._n, engine).observe(n)
        self._of(self._limit, engine).observe(limit)
        if num_iter is not None:
            self._of(self._num_iter, engine, str(num_iter)).inc()

    def started(
        self, prompt: int, cached: int, missed: str, waited: float, engine: int = 0
    ) -> None:
        """A request has got a slot."""
        self._of(self._prompt, engine).inc(prompt)
        self._of(self._queries, engine).inc(prompt)
        self._of(self._hits, engine).inc(cached)
        if prompt > cached:
            self._of(self._missed, engine, missed or "none").inc(prompt - cached)
        self._of(self._queue, engine).observe(waited)

    def first(self, arrived: float, started: float, now: float, engine: int = 0) -> None:
        """The first token of a request has come."""
        self._of(self._first, engine).observe(now - arrived)
        self._of(self._prefill, engine).observe(now - started)

    def tokens(self, count: int, seconds: float | None, engine: int = 0) -> None:
        """So many tokens of a request have come, so long after the ones before."""
        self._of(self._generated, engine).inc(count)
        if seconds is not None:
            for _ in range(count):
                self._of(self._between, engine).observe(seconds / count)

    def turn(self, count: int, engine: int = 0) -> None:
        """A turn has made so many tokens."""
        if count:
            self._of(self._turn, engine).observe(count)

    def ended(
        self,
        reason: str,
        prompt: int,
        answer: int,
        arrived: float,
        first: float,
        last: float,
        engine: int = 0,
    ) -> None:
        """A request has ended: "stop", "length", "tool_calls", "abort" or "error"."""
        self._of(self._success, engine, _REASONS.get(reason, reason)).inc()
        if reason not in _REASONS:
            return
        self._of(self._prompts, engine).observe(prompt)
        self._of(self._answers, engine).observe(answer)
        self._of(self._whole, engine).observe((last or first or arrived) - arrived)
        if first:
            self._of(self._decode, engine).observe(last - first)
            if answer > 1:
                self._of(self._per_token, engine).observe((last - first) / (answer - 1))

    def engine(
        self, stats: Stats, compiled: int, timings: Sequence[Timing], engine: int = 0
    ) -> None:
        """What an engine counts itself: where everything is, how many programs it has, turns."""
        for timing in timings:
            self._of(self._turns, engine, timing.kind).observe(timing.seconds)
            self._of(self._gaps, engine).observe(timing.gap)
        pages = sum(stats.pages.values())
        used = pages - stats.pages.get("free", 0)
        self._of(self._usage, engine).set(used / pages if pages else 0)
        for state, count in stats.slots.items():
            self._of(self._slots, engine, state).set(count)
        for labels, size in stats.prefix_bytes.items():
            self._of(self._bytes, engine, *labels).set(size)
        for place, count in stats.entries.items():
            self._of(self._entries, engine, place).set(count)
        for place, count in stats.evictions.items():
            self._up(self._evictions, count, engine, place)
        self._up(self._swaps, stats.preemptions, engine)
        self._up(self._compiles, compiled, engine)

    def memory(self, peak: int) -> None:
        """Most bytes that were in use on one device."""
        self._of(self._peak, 0).set(peak)

    def _up(self, metric: Counter, count: float, engine: int, *labels: str) -> None:
        """An engine has counted to `count`; one that has started over begins at 0 again."""
        key = (id(metric), engine, *labels)
        before = self._told.get(key, 0)
        self._of(metric, engine, *labels).inc(count - before if count >= before else count)
        self._told[key] = count

    def nonfinite(self, engine: int = 0) -> None:
        """The logits of a request were not finite."""
        self._of(self._broken, engine).inc()
