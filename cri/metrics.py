"""The optional Prometheus endpoint: what the daemon itself does. Pods' and containers' usage goes through CRI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cri.api.interceptor import Observer
from cri.images import measures
from cri.images.measures import Measures

#: Seconds: a read takes less than a millisecond, a pull minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def listen(address: str, pulls: Measures, collectors: Iterable[Collector] = ()) -> Observer:
    """Serves /metrics on ``host:port`` from a thread of its own; returns what to call after each RPC. Raises OSError."""
    registry = CollectorRegistry()
    registry.register(Pulls(pulls))
    ProcessCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)
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


class Pulls(Collector):
    """Pulls as they stand when somebody scrapes."""

    def __init__(self, pulls: Measures) -> None:
        self._pulls = pulls

    def collect(self) -> Iterator[Metric]:
        pulls, sums = self._pulls, self._pulls.sums()
        yield GaugeMetricFamily("cri_shim_image_pulls_in_progress", "pulls that somebody waits for", pulls.running)
        yield CounterMetricFamily("cri_shim_image_pulls_success", "pulls that succeeded", pulls.succeeded)
        failed = CounterMetricFamily("cri_shim_image_pulls_failure", "pulls that failed, by reason", labels=("reason",))
        for reason in measures.REASONS:
            failed.add_metric((reason,), pulls.failed[reason])
        yield failed
        yield CounterMetricFamily("cri_shim_image_pulls_bytes", "bytes of layers received", sums["bytes"])
        yield CounterMetricFamily("cri_shim_image_pulls_skipped_bytes", "bytes of layers that were here already", sums["skipped"])
        yield CounterMetricFamily("cri_shim_image_pulls_layers", "layers fetched", sums["layers"])
        yield CounterMetricFamily("cri_shim_image_layer_reuse", "layers that were here already", sums["reused"])
        bounds = [*map(str, map(float, measures.BUCKETS)), "+Inf"]
        histogram = HistogramMetricFamily("cri_shim_image_pull_duration_seconds", "time a pull that succeeded took")
        histogram.add_metric((), list(zip(bounds, accumulate(pulls.buckets), strict=True)), pulls.seconds)
        yield histogram
