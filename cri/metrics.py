"""The optional Prometheus endpoint: what the daemon itself does. Pods' and containers' usage goes through CRI."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server

from cri.api.interceptor import Observer

#: Seconds: a read takes less than a millisecond, a pull minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def listen(address: str) -> Observer:
    """Serves /metrics on ``host:port`` from a thread of its own; returns what to call after each RPC. Raises OSError."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    durations = Histogram(
        "cri_shim_rpc_duration_seconds", "time an RPC took, by method and gRPC code", ("method", "code"), buckets=BUCKETS, registry=registry
    )
    host, _, port = address.rpartition(":")
    start_http_server(int(port), host.strip("[]"), registry)
    children: dict[tuple[str, str], Histogram] = {}

    def observe(method: str, code: str, seconds: float) -> None:
        child = children.get((method, code))
        if child is None:
            child = children[method, code] = durations.labels(method, code)
        child.observe(seconds)

    return observe
