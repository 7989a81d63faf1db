"""ADD and DEL of different pods run side by side; GC runs alone (SPEC.md section 3, "Lifecycle & Ordering")."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Many at once through ``shared``, one alone through ``alone``, who waits for a moment without others: pods go first."""

    def __init__(self) -> None:
        self._inside = 0
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        while not (self._open.is_set() and self._idle.is_set()):
            await self._open.wait()
            await self._idle.wait()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
