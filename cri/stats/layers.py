"""Disk use of writable layers, as known: a stats call never waits for a container with a million files.

Layers are measured one after the other beside the requests, each at most every ten seconds, and so seldom that walking it takes a
twentieth of the time or less. The layer of an ended container does not change any more and is measured once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, NamedTuple

from cri.containers.model import Container

_INTERVAL: Final = 10.0  # seconds, as often as the kubelet asks
_LONGEST: Final = 300.0
_SHARE: Final = 20
# Seconds that a call waits for layers it knows nothing about: enough for a hundred new containers, whose layers are small.
_FIRST: Final = 0.1

log = logging.getLogger("cri.stats")


class Layer(NamedTuple):
    """One measurement. ``taken`` is in ns since the epoch, ``due`` (the next one) on the clock of ``time.monotonic``."""

    bytes: int
    inodes: int
    taken: int
    due: float


class Layers:
    """The last measurement of each container's layer. ``measure`` gives (bytes, inodes) for a container's id."""

    def __init__(self, measure: Callable[[str], Awaitable[tuple[int, int]]], mountpoint: str) -> None:
        self.mountpoint = mountpoint  # of the file system they are on, as ImageFsInfo calls it
        self._measure = measure
        self._known: dict[str, Layer] = {}
        self._waiting: dict[str, None] = {}  # in the order of their requests
        self._worker: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()

    def get(self, container: Container) -> Layer | None:
        """What is known; if that is old, a new measurement begins beside."""
        layer = self._known.get(container.id)
        if layer is None or (time.monotonic() >= layer.due and layer.taken <= (container.facts.finished_at or layer.taken)):
            self._want(container.id)
        return layer

    async def first(self, containers: Iterable[Container]) -> None:
        """Wait a moment for those of which nothing is known yet."""
        unknown = dict.fromkeys(container.id for container in containers if container.id not in self._known)
        if not unknown:
            return
        for container_id in unknown:
            self._want(container_id)
        try:
            async with asyncio.timeout(_FIRST):
                while unknown.keys() & self._waiting.keys():
                    await self._progress.wait()
        except TimeoutError:
            return

    def forget(self, container_id: str) -> None:
        self._known.pop(container_id, None)
        self._waiting.pop(container_id, None)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()

    def _want(self, container_id: str) -> None:
        self._waiting[container_id] = None
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="measure layers")

    async def _work(self) -> None:
        while self._waiting:
            container_id = next(iter(self._waiting))
            began = time.monotonic()
            try:
                size, inodes = await self._measure(container_id)
            except OSError as error:
                log.warning("container %s: its layer cannot be measured: %s", container_id, error)
                size, inodes = 0, 0
            ended = time.monotonic()
            if container_id in self._waiting:  # it was not removed meanwhile
                del self._waiting[container_id]
                due = ended + min(max(_INTERVAL, (ended - began) * _SHARE), _LONGEST)
                self._known[container_id] = Layer(size, inodes, time.time_ns(), due)
            self._progress.set()
            self._progress.clear()
