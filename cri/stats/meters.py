"""The measuring of groups over time: open control files and earlier samples, kept for as long as the group is used."""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple

from cri.containers.model import Container
from cri.containers.status import listed
from cri.pods.model import Pod
from cri.stats import groups, usage
from cri.stats.files import Budget, Files
from cri.stats.layers import Layers
from cri.stats.rates import Rate
from cri.stats.usage import Usage
from protos.runtime.v1 import api_pb2 as v1
from shim.cgroups.group import Group
from shim.cgroups.layout import Layout

_ENDED: Final = (v1.CONTAINER_STOPPED_EVENT, v1.CONTAINER_DELETED_EVENT)


class Reading(NamedTuple):
    """A sample with its time (ns since the epoch) and the CPU rate (ns per second, None before the second sample)."""

    time: int
    usage: Usage
    rate: int | None


class Meter:
    """One group."""

    __slots__ = ("_files", "_rate", "attributes", "group", "source")

    def __init__(self, group: Group, budget: Budget) -> None:
        self.group = group
        self._files = Files(budget)
        self._rate = Rate()
        # What goes into every answer about it, and the object it was made from: another one means that the container has changed.
        self.attributes: v1.ContainerAttributes | None = None
        self.source: v1.Container | None = None

    def read(self) -> Reading | None:
        """A sample now; None if the group is gone."""
        group = self.group
        sample = usage.read_v2(group.paths[""], self._files.read) if group.version == 2 else usage.read_v1(group.paths, self._files.read)
        if sample is None:
            return None
        rate = self._rate.next(time.monotonic_ns(), sample.cpu) if sample.cpu is not None else None
        return Reading(time.time_ns(), sample, rate)

    def close(self) -> None:
        self._files.close()


class Meters:
    """One meter for each container and pod that has been asked about, and the measurements of layers."""

    def __init__(self, layout: Layout, layers: Layers) -> None:
        self.layout = layout
        self.layers = layers
        self.scraping = asyncio.Lock()  # one at a time, as each takes a thread of the few that there are
        self._budget = Budget()
        self._meters: dict[str, Meter] = {}

    def container(self, container: Container) -> Reading | None:
        """A sample of a container's group; None for one that has ended."""
        return self._meter(container).read() if _alive(container) else None

    def attributes(self, container: Container) -> v1.ContainerAttributes:
        """Which container it is. The message is shared: nobody may change it."""
        meter = self._meters.get(container.id)
        source = listed(container)
        if meter is not None and meter.source is source and meter.attributes is not None:
            return meter.attributes
        made = v1.ContainerAttributes(id=source.id, metadata=source.metadata, labels=source.labels, annotations=source.annotations)
        if meter is not None:
            meter.source, meter.attributes = source, made
        return made

    def pod(self, pod: Pod) -> Reading | None:
        """A sample of the group that the kubelet made for the pod; None if there is none."""
        path = pod.config.linux.cgroup_parent
        if not path.strip("/.") or not pod.facts.created_at or pod.facts.stopped_at:
            return None  # "/" is a parent too, but not the pod's
        meter = self._meters.get(pod.id)
        if meter is None:
            meter = self._meters[pod.id] = Meter(groups.parent(self.layout, path), self._budget)
        return meter.read()

    def _meter(self, container: Container) -> Meter:
        meter = self._meters.get(container.id)
        if meter is None:
            meter = self._meters[container.id] = Meter(groups.of(self.layout, container.facts.cgroups_path), self._budget)
        return meter

    def changed(self, subject: Container | Pod, event: v1.ContainerEventType) -> None:
        """Called for every event: what has ended needs no open files, what is deleted nothing at all."""
        if event in _ENDED:
            meter = self._meters.pop(subject.id, None)
            if meter is not None:
                meter.close()
        if event == v1.CONTAINER_DELETED_EVENT:
            self.layers.forget(subject.id)

    def close(self) -> None:
        self.layers.close()
        for meter in self._meters.values():
            meter.close()
        self._meters.clear()


def _alive(container: Container) -> bool:
    facts = container.facts
    return bool(facts.created_at) and not facts.finished_at and bool(facts.cgroups_path)
