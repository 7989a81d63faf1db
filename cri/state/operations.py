"""Name reservations. A name belongs to an operation in flight, so that a retry joins it instead of failing.

The kubelet cancels a slow RunPodSandbox or CreateContainer and sends it again with the same metadata. The first call's work goes on
in a task of its own; the retry waits for that same work and gets the same id, or the same error. A client that gives up costs
nothing, and an error about a name says what the operation that holds it is doing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.message import Message

from cri.errors import AlreadyExists, DeadlineExceeded
from cri.state import failpoints

# A joined or slow caller is answered this long before its deadline, so that it gets the stage and not a bare gRPC timeout.
_ANSWER_BEFORE: Final = 0.25


class Operation:
    """One creation in flight. ``stage`` is what it is doing now; the time each stage took is kept."""

    __slots__ = ("_began", "_entered", "config", "id", "kind", "name", "stage", "task", "took")

    def __init__(self, kind: str, name: str, object_id: str, config: Message) -> None:
        self.kind, self.name, self.id, self.config = kind, name, object_id, config
        self.stage = ""
        self.took: dict[str, int] = {}
        self._began = self._entered = time.monotonic_ns()
        self.task: asyncio.Task[str] | None = None

    def enter(self, stage: str) -> None:
        """The next stage begins, e.g. ``network setup``."""
        now = time.monotonic_ns()
        if self.stage:
            self.took[self.stage] = (now - self._entered) // 1000
        self.stage, self._entered = stage, now
        failpoints.hit(self.kind, stage)

    def describe(self) -> str:
        """Where it is, for an error text."""
        now = time.monotonic_ns()
        total, here = (now - self._began) / 1e9, (now - self._entered) / 1e9
        return f"{self.id} is in stage {self.stage or 'queued'!r} for {here:.1f} s, {total:.1f} s in all"


class Operations:
    """The creations in flight of one kind ("run sandbox"), by name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._by_name: dict[str, Operation] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def ids(self) -> set[str]:
        """Ids of what is being created."""
        return {operation.id for operation in self._by_name.values()}

    async def run(
        self,
        name: str,
        object_id: Callable[[], str],
        config: Message,
        work: Callable[[Operation], Awaitable[str]],
        *,
        timeout: float | None = None,
    ) -> str:
        """Do ``work`` under ``name``, or join the operation that is already doing it; returns the id.

        ``timeout`` is the caller's time in seconds (None: for ever); the work itself is not bounded by it. Raises AlreadyExists if
        the name is in use with a different configuration, DeadlineExceeded naming the stage, or what ``work`` raised.
        """
        operation = self._by_name.get(name)
        if operation is None:
            operation = Operation(self._kind, name, object_id(), config)
            self._by_name[name] = operation
            operation.task = asyncio.create_task(self._work(operation, work), name=f"{self._kind} {operation.id[:13]}")
            # Nobody may be left to look at the outcome; the failure was still worth a line where it was raised.
            operation.task.add_done_callback(_retrieved)
        elif operation.config != config:
            raise AlreadyExists(f"{self._kind} {name!r} is in progress with another configuration: {operation.describe()}")
        assert operation.task is not None
        if timeout is None:
            return await asyncio.shield(operation.task)
        done, _ = await asyncio.wait((operation.task,), timeout=max(timeout - _ANSWER_BEFORE, timeout * 0.9))
        if not done:
            raise DeadlineExceeded(f"{self._kind} {name!r}: {operation.describe()}; a retry joins it")
        return operation.task.result()

    async def _work(self, operation: Operation, work: Callable[[Operation], Awaitable[str]]) -> str:
        try:
            return await work(operation)
        finally:
            del self._by_name[operation.name]

    async def drain(self, ids: set[str] | None = None) -> None:
        """Wait until the operations in flight (those of ``ids``, or all) have ended, whichever way."""
        tasks = [o.task for o in self._by_name.values() if o.task is not None and (ids is None or o.id in ids)]
        if tasks:
            await asyncio.wait(tasks)


def _retrieved(task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        task.exception()
