"""What Prometheus reads from `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The service's counters; see docs/api.md."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("http_requests", "Requests answered", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "http_request_seconds", "Time to the end of the answer", ["route"], buckets=SECONDS, registry=registry
        )
        self._waiting = Gauge("queue_rows", "Texts, or answers of a chat, that wait for the model", registry=registry)
        self._batches = Histogram("batch_rows", "Texts in a call of the model", buckets=ROWS, registry=registry)
        self._rows = Counter("rows", "Texts or conversations answered", registry=registry)
        self._tokens = Counter("tokens", "Tokens that the model read and wrote", ["direction"], registry=registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Report what `length` gives as the queue's."""
        self._waiting.set_function(length)

    def count_batch(self, rows: int) -> None:
        """Count a call of the model."""
        self._batches.observe(rows)

    def count_answers(self, rows: int, read: int, written: int = 0) -> None:
        """Count answers.

        Args:
            rows: how many.
            read: tokens of their prompts.
            written: tokens generated.
        """
        self._rows.inc(rows)
        self._tokens.labels("read").inc(read)
        self._tokens.labels("written").inc(written)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request when its answer has ended.

        Args:
            route: as declared, or "other": never the path that a client chose.
            status: of HTTP; 499 where the client left.
            seconds: since it came.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
