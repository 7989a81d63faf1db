"""GetContainerEvents: what happens to containers and sandboxes, each with the state of its pod right after.

A sandbox has events too, with its own id: the kubelet forgets a pod when the sandbox's DELETED arrives. Events are not kept: whoever
subscribes lists first, and lists again after the stream has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from cri.containers.model import Container
from cri.containers.status import container_status
from cri.errors import ResourceExhausted, Unavailable
from cri.pods.model import Pod
from cri.pods.status import pod_status
from protos.runtime.v1 import api_pb2 as v1

# What may wait for one subscriber. A node full of pods starts with less; an event has some KB, or as much as a pod's annotations.
WAITING: Final = 1024
WAITING_BYTES: Final = 16 << 20

log = logging.getLogger("cri.events")


class Subscription:
    """One client's events that have not been sent yet."""

    __slots__ = ("_error", "_size", "_waiting", "_wake")

    def __init__(self) -> None:
        self._waiting: list[v1.ContainerEventResponse] = []
        self._size = 0
        self._wake = asyncio.Event()
        self._error: Exception | None = None

    def put(self, event: v1.ContainerEventResponse, size: int) -> bool:
        """False if the client does not keep up: as soon as it reads on it is told so, and nothing else. ``size`` in bytes."""
        count, self._size = len(self._waiting), self._size + size
        if count >= WAITING or (count and self._size > WAITING_BYTES):
            self._waiting.clear()
            self.end(ResourceExhausted(f"{count} events waited for this client, which is too slow", hint="list, and subscribe again"))
            log.warning("a subscriber is dropped: %d events wait for it", count)
            return False
        self._waiting.append(event)
        self._wake.set()
        return True

    def end(self, error: Exception) -> None:
        """What waits is still delivered; then ``error`` is."""
        self._error = error
        self._wake.set()

    async def next(self) -> list[v1.ContainerEventResponse]:
        """At least one event, in order. Raises what the subscription was ended with."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        events, self._waiting, self._size = self._waiting, [], 0
        return events


class Events:
    """Tells subscribers what changes. Nothing is built while there are none."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._last = 0
        self._closed = False

    def changed(self, subject: Container | Pod, kind: v1.ContainerEventType) -> None:
        """``subject`` is in its new state, and so is its pod."""
        if not self._subscriptions:
            return
        pod = subject if isinstance(subject, Pod) else subject.pod
        # The kubelet takes it for the time of the statuses, and drops one that is not newer than what it has.
        self._last = max(time.time_ns(), self._last + 1)
        event = v1.ContainerEventResponse(
            container_id=subject.id,
            container_event_type=kind,
            created_at=self._last,
            pod_sandbox_status=pod_status(pod),
            containers_statuses=[container_status(container) for container in pod.containers.values()],
        )
        size = event.ByteSize()
        self._subscriptions = {each for each in self._subscriptions if each.put(event, size)}

    async def stream(self, ready: Callable[[], Awaitable[None]]) -> AsyncIterator[v1.ContainerEventResponse]:
        """Events from now on; ``ready`` is awaited once nothing can be missed any more. Ends only with an error: Unavailable when the
        daemon ends, ResourceExhausted for a client that does not keep up."""
        subscription = Subscription()
        if self._closed:
            subscription.end(_ending())
        self._subscriptions.add(subscription)
        try:
            await ready()
            while True:
                for event in await subscription.next():
                    yield event
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every stream, so that the server need not wait for them."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end(_ending())


def _ending() -> Unavailable:
    return Unavailable("the runtime is shutting down; the events end here", hint="list, and subscribe again")
