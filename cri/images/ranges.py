"""The rest of a large blob over several connections, where one is what makes the pull slow.

Object stores and their caches give each connection a share. A blob that has been arriving for a while, from a registry that takes ranges,
with the unpacker waiting for the network and not the other way round, is fetched on in pieces side by side. They are passed on in
order: the piece whose turn it is goes straight through, the others wait in memory, which bounds how many there may be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cri.images.hosts import Endpoint
    from cri.images.registry import Sink

AFTER = 1.5  # seconds on one connection
WORTH = 32 << 20  # bytes that must still be missing
CONNECTIONS = 3
PIECE = 8 << 20
_BLOBS = 3  # of the node, split at a time: (CONNECTIONS - 1) * PIECE bytes of memory each


class Fetch(Protocol):
    """The bytes from ``start`` up to ``end``, exactly those, or an EndpointError."""

    def __call__(self, start: int, end: int) -> AsyncIterator[bytes]: ...


class Pace:
    """How long a blob has been arriving, and how much of that was spent waiting for the unpacker."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._writing = 0.0

    async def write(self, sink: Sink, endpoint: Endpoint, chunk: bytes) -> None:
        before = time.monotonic()
        await sink.write(endpoint, chunk)
        self._writing += time.monotonic() - before

    def slow(self) -> bool:
        elapsed = time.monotonic() - self._began
        return elapsed > AFTER and self._writing < elapsed / 2


@dataclass(slots=True)
class Budget:
    """How many blobs may be split on this node."""

    left: int = _BLOBS


BUDGET = Budget()


async def rest(sink: Sink, endpoint: Endpoint, fetch: Fetch) -> None:
    """Fetch what the sink misses. After a failure it has taken a part, and the caller goes on from there."""
    BUDGET.left -= 1
    try:
        work = _Pieces(sink, endpoint, fetch)
        tasks = [asyncio.create_task(work.run()) for _ in range(CONNECTIONS)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        BUDGET.left += 1


class _Pieces:
    def __init__(self, sink: Sink, endpoint: Endpoint, fetch: Fetch) -> None:
        self._sink, self._endpoint, self._fetch = sink, endpoint, fetch
        self._next, self._end = sink.offset, sink.offset + sink.missing
        self._turned = asyncio.Condition()
        self._writing = asyncio.Lock()  # the sink counts bytes before it has passed them on

    async def run(self) -> None:
        """One connection: piece after piece, each passed on when all before it are."""
        while self._next < self._end:
            start = self._next
            self._next = end = min(start + PIECE, self._end)
            held = bytearray()
            async for chunk in self._fetch(start, end):
                held += chunk
                if self._sink.offset == start:  # everything before this piece is through, or being passed on
                    await self._write(held)
                    start += len(held)
                    held = bytearray()
            await self._finish(start, held)

    async def _finish(self, start: int, held: bytearray) -> None:
        my_turn: Callable[[], bool] = lambda: self._sink.offset == start  # noqa: E731
        async with self._turned:
            await self._turned.wait_for(my_turn)
        if held:
            await self._write(held)
        async with self._turned:
            self._turned.notify_all()

    async def _write(self, held: bytearray) -> None:
        async with self._writing:
            await self._sink.write(self._endpoint, bytes(held))
