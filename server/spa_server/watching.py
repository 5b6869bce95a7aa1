"""Figures for Prometheus and traces for OpenTelemetry; both are off unless the configuration names an address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from spa.errors import SpaError, UsageError
from spa_server.config import listener

__all__ = ["Watcher"]

SERVICE = "spa-server"


class Watcher:
    """Counts and traces requests."""

    def __init__(self) -> None:
        self._count: Any = None
        self._seconds: Any = None
        self._tracer: Any = None
        self._closers: list[Callable[[], object]] = []

    def serve(self, address: str, running: Callable[[], int]) -> None:
        """Answer Prometheus at `address` from now on.

        Args:
            address: HOST:PORT.
            running: jobs at work.

        Raises:
            SpaError: the address is taken.
        """
        import prometheus_client as prometheus

        registry = prometheus.CollectorRegistry()
        self._count = prometheus.Counter("spa_requests", "Requests that ended.", ("method", "code"), registry=registry)
        self._seconds = prometheus.Histogram("spa_request_seconds", "Time of requests.", ("method",), registry=registry)
        gauge = prometheus.Gauge("spa_jobs_running", "Jobs at work on this server.", registry=registry)
        gauge.set_function(running)
        place = listener(address)
        try:
            server, thread = prometheus.start_http_server(place.port, place.host.strip("[]"), registry)
        except OSError as error:
            raise SpaError(f"metrics: cannot listen on {address} ({error.strerror}); choose another one") from error
        self._closers += [server.shutdown, server.server_close, thread.join]

    def trace(self, endpoint: str | None, exporter: Any = None) -> None:
        """Send traces from now on.

        Args:
            endpoint: of a collector that takes OTLP over HTTP.
            exporter: where they go instead.

        Raises:
            UsageError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise UsageError("tracing: needs OpenTelemetry; install spa-prune[tracing], or leave it out") from error
        provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer(SERVICE)
        self._closers.append(provider.shutdown)

    def request(self, method: str, code: str, taken: float) -> None:
        """A request ended."""
        if self._count is not None:
            self._count.labels(method, code).inc()
            self._seconds.labels(method).observe(taken)

    @contextlib.contextmanager
    def span(self, method: str, context: Any) -> Iterator[None]:
        """What is done inside is one span, below the caller's if that said so."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        above = TraceContextTextMapPropagator().extract(metadata)
        service, _, name = method.strip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        span = self._tracer.start_span(method, above, SpanKind.SERVER, attributes)
        try:
            yield
        except Exception as error:  # raised again: only noted
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Stop both."""
        for close in self._closers:
            close()
        self._closers.clear()
