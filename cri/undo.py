"""What has to be given back when a verb fails half-way: named steps, run newest first, all of them, whatever happens."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from types import TracebackType

from shim.errors import Failure

Step = Callable[[], Awaitable[object] | object]

#: Seconds that one step may take. A step that hangs (a CNI plugin, a dead registry) must not keep the others from running.
STEP_TIMEOUT = 60.0


class Undo:
    """``async with Undo("run pod") as undo: … undo.push("release address", step)``.

    Leaving the block normally forgets the steps; leaving it with an exception (a cancellation too) runs them to the end first. Failures of
    steps become notes on that exception, so that the one log line of the RPC has them all.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._steps: list[tuple[str, Step, float]] = []

    def push(self, name: str, step: Step, *, timeout: float = STEP_TIMEOUT) -> None:
        """Registers a step, sync or async. Push before the acquisition if it can be half done, after it otherwise."""
        self._steps.append((name, step, timeout))

    def forget(self) -> None:
        """What was acquired stays."""
        self._steps.clear()

    async def run(self) -> list[Exception]:
        """Runs every step, newest first, each once; the failures, named."""
        failures: list[Exception] = []
        while self._steps:
            name, step, timeout = self._steps.pop()
            try:
                result = step()
                if inspect.isawaitable(result):
                    await asyncio.wait_for(result, timeout)
            except Exception as error:
                late = isinstance(error, TimeoutError) and not str(error)
                why = f"not done after {timeout:g} s" if late else str(error) or type(error).__name__
                failure = Failure(f"undo {self.phase}", name, message=why)
                failure.__cause__ = error
                failures.append(failure)
        return failures

    async def __aenter__(self) -> Undo:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.forget()
            return
        # A task of its own: a cancelled RPC (the kubelet's deadline) still gives everything back, and a second cancel changes nothing.
        task = asyncio.ensure_future(self.run())
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                continue
        for failure in task.result():
            error.add_note(str(failure))
