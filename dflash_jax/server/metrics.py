"""Prometheus metrics: what was asked, what was answered, and what pruning and drafting did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from dflash_jax.engine.request import Finished

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ACCEPT_LENGTHS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 14, 16)
_RATIOS = tuple(step / 10 for step in range(1, 11))

_COUNTERS = {
    "prompt_tokens": "Prompt tokens as clients sent them.",
    "cached_tokens": "Prompt tokens that needed no prefill.",
    "scored_tokens": "Prompt tokens that PFlash scored.",
    "kept_tokens": "Scored prompt tokens that PFlash kept.",
    "completion_tokens": "Generated tokens.",
    "verify_steps": "Verify steps of DFlash.",
    "committed_tokens": "Tokens that verify steps committed.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the submission of a request to its first token.", _SECONDS),
    "answer_seconds": ("From the submission of a request to its last token.", _SECONDS),
    "accept_length": ("Tokens committed per verify step, mean of an answer, bonus included.", _ACCEPT_LENGTHS),
    "keep_ratio": ("Ratio at which PFlash pruned, per answer with scoring.", _RATIOS),
}
_GAUGES = {
    "queue_depth": "Requests that wait for a slot.",
    "active_sessions": "Answers that are running.",
    "pages_used": "Pages of the KV cache in use.",
    "pages_total": "Pages of the KV cache.",
    "read_again_tokens": "Known tokens that were prefilled anew because layers with a window had let go of them.",
    "compilations": "Programs compiled since the start; it must not grow while serving.",
    "drafter_self_check_accept_length": "Accept length on canned prompts at the start; 0 without a drafter.",
}


class Metrics:
    """The metrics of one server, apart from those of any other in this process. Used from the event loop only."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "dflash_jax_requests",
            "HTTP requests; status 499 is a client that went away.",
            ["path", "status"],
            registry=self._registry,
        )
        self._answers = Counter(
            "dflash_jax_answers", "Ended answers by their reason.", ["reason"], registry=self._registry
        )
        self._counters = {
            name: Counter(f"dflash_jax_{name}", text, registry=self._registry) for name, text in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"dflash_jax_{name}", text, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._registry.register(_Gauges(gauges))

    def count_request(self, path: str, status: int) -> None:
        """Adds one answered (or abandoned) HTTP request."""
        self._requests.labels(path, str(status)).inc()

    def observe(self, event: Finished) -> None:
        """Adds the figures of an answer that ended."""
        stats = event.stats
        self._answers.labels(event.reason).inc()
        self._add(
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            completion_tokens=stats.completion_tokens,
        )
        if stats.completion_tokens:
            self._histograms["time_to_first_token_seconds"].observe(stats.time_to_first_token)
        self._histograms["answer_seconds"].observe(stats.total_time)
        if stats.pflash:
            self._add(scored_tokens=stats.pflash.scored_tokens, kept_tokens=stats.pflash.kept_tokens)
            self._histograms["keep_ratio"].observe(stats.pflash.keep_ratio)
        if stats.dflash:
            self._add(verify_steps=stats.dflash.verify_steps, committed_tokens=stats.dflash.committed_tokens)
            self._histograms["accept_length"].observe(stats.dflash.accept_length)

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _add(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counters[name].inc(amount)


class _Gauges(Collector):
    """Reads the engine's gauges when the page is asked for."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._read().items():
            yield GaugeMetricFamily(f"dflash_jax_{name}", _GAUGES.get(name, name), value)


async def metrics_page(request: Request) -> Response:
    """GET /metrics."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})
