"""ContainerStats, ListContainerStats and StreamContainerStats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

from cri.containers.model import Container, Containers
from cri.pods.model import Pods
from cri.state.listing import labels_match, pages
from cri.stats import messages
from cri.stats.meters import Meters, Reading
from protos.runtime.v1 import api_pb2 as v1

# Samples taken before other requests get their turn: about a millisecond.
_TURN: Final = 32


async def container_stats(container_id: str, *, containers: Containers, meters: Meters) -> v1.ContainerStatsResponse:
    """What one container uses; of one that has ended, what its layer does. Raises NotFound."""
    container = containers.get(container_id)
    await meters.layers.first([container])
    return v1.ContainerStatsResponse(stats=one(container, meters.container(container), meters))


async def list_container_stats(
    question: v1.ContainerStatsFilter, *, containers: Containers, pods: Pods, meters: Meters
) -> v1.ListContainerStatsResponse:
    """What each container uses that matches every condition of the filter; ids may be unique beginnings."""
    return v1.ListContainerStatsResponse(stats=await many(_matching(question, containers, pods), meters))


async def stream_container_stats(
    question: v1.ContainerStatsFilter, *, containers: Containers, pods: Pods, meters: Meters
) -> AsyncIterator[v1.StreamContainerStatsResponse]:
    """The same in several messages."""
    for page in pages(await many(_matching(question, containers, pods), meters)):
        yield v1.StreamContainerStatsResponse(container_stats=page)


async def many(found: Sequence[Container], meters: Meters) -> list[v1.ContainerStats]:
    """Stats of several containers; other requests are served in between."""
    await meters.layers.first(found)
    stats = []
    for number, container in enumerate(found, 1):
        stats.append(one(container, meters.container(container), meters))
        if number % _TURN == 0:
            await asyncio.sleep(0)
    return stats


def one(container: Container, reading: Reading | None, meters: Meters) -> v1.ContainerStats:
    """CPU, memory, swap and I/O of a container with a group; the writable layer of any."""
    layer = meters.layers.get(container)
    return v1.ContainerStats(
        attributes=meters.attributes(container),
        writable_layer=messages.layer(layer, meters.layers.mountpoint) if layer is not None else None,
        cpu=messages.cpu(reading) if reading is not None else None,
        memory=messages.memory(reading) if reading is not None else None,
        swap=messages.swap(reading) if reading is not None else None,
        io=messages.io(reading) if reading is not None else None,
    )


def _matching(question: v1.ContainerStatsFilter, containers: Containers, pods: Pods) -> list[Container]:
    found: list[Container]
    if question.id:
        only = containers.find(question.id)
        found = [only] if only is not None else []
    else:
        found = list(containers.store)
    if question.pod_sandbox_id:
        pod = pods.find(question.pod_sandbox_id)
        found = [c for c in found if c.pod is pod]
    if question.label_selector:
        found = [c for c in found if labels_match(question.label_selector, c.config.labels)]
    return found
