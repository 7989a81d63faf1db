"""The counts of ``cri.containers.refusals`` as a metric of the daemon's own endpoint."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from cri.containers import refusals
from cri.containers.model import Containers
from shim.errors import Failure

_LABELS = ("namespace", "pod", "container", "id", "syscall")


class RefusalMetrics(Collector):
    """``cri_shim_seccomp_refused_total``. Collected in the thread of the metrics endpoint."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily("cri_shim_seccomp_refused", "system calls that a container's seccomp profile refused", labels=_LABELS)
        for container in list(self._containers.store):
            try:
                counted = refusals.read(self._containers.layout, container.id)
            except (Failure, ValueError):
                continue  # torn by a crash of the machine: there is nothing to count on
            if counted is not None:
                metadata = container.pod.config.metadata
                for name, count in counted.calls.items():
                    labels = (metadata.namespace, metadata.name, container.config.metadata.name, container.id, name)
                    family.add_metric(labels, count)
        yield family
