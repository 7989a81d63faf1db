"""StopContainer: the stop signal, the grace period, SIGKILL. One stop at a time per container; a later, shorter one hurries it.

The waiting is a task of its own, so a client that gives up does not cut the grace period short for the others.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
from typing import Final

from cri.containers.model import Container, Containers
from cri.errors import DeadlineExceeded
from cri.pods.model import now
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci.bundle import ExitRecord

# Seconds after SIGKILL: for the usual case, then for what lives on in a frozen cgroup or in uninterruptible sleep. The core names the
# latter after five; the rest is for a process that takes long to give back its memory.
_FIRST_WAIT: Final = 1.0
_LAST_WAIT: Final = 6.0
NEVER_STARTED_CODE: Final = 128 + signal.SIGKILL

log = logging.getLogger("cri.containers")


class Stopping:
    """A stop in progress. ``wake`` is set when the process has ended or the grace period is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._loop = loop
        self.wake = asyncio.Event()
        self.deadline = deadline
        self._timer = loop.call_at(deadline, self.wake.set)
        self.task: asyncio.Task[None] | None = None

    def hurry(self, deadline: float) -> None:
        """An earlier end of the grace period wins."""
        if deadline < self.deadline:
            self.deadline = deadline
            self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self.wake.set)

    def done(self) -> None:
        self._timer.cancel()


async def stop(container_id: str, timeout: int, *, containers: Containers, supervisor: Supervisor) -> None:
    """Stop within ``timeout`` seconds, by force after it. One that does not run, or is unknown, is fine.

    Raises DeadlineExceeded for a process that outlives SIGKILL (uninterruptible sleep).
    """
    container = containers.find(container_id)
    if container is not None:
        await stop_running(container, timeout, supervisor=supervisor)


async def stop_running(container: Container, timeout: float, *, supervisor: Supervisor) -> None:
    """Stop a container that may be running."""
    async with container.lock:  # a start in flight comes first
        if not container.running:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(timeout, 0)
        stopping = container.stopping
        if stopping is None:
            stopping = container.stopping = Stopping(loop, deadline)
            stopping.task = asyncio.create_task(_drive(container, stopping, timeout > 0, supervisor), name=f"stop {container.id[:13]}")
            stopping.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        else:
            stopping.hurry(deadline)
    assert stopping.task is not None
    await asyncio.shield(stopping.task)


async def _drive(container: Container, stopping: Stopping, graceful: bool, supervisor: Supervisor) -> None:
    try:
        if graceful:
            await _signal(container, container.facts.stop_signal, supervisor)
            await stopping.wake.wait()
        if not container.ended.is_set():
            await _kill(container, supervisor)
    finally:
        stopping.done()
        container.stopping = None


async def _kill(container: Container, supervisor: Supervisor) -> None:
    """SIGKILL to the first process, with which the kernel kills the rest of its PID namespace; then, or at once where the namespace is
    shared, to every process of the cgroup, which is thawed. Who is left is reported, not waited for."""
    loop = asyncio.get_running_loop()
    if container.own_pid_namespace:
        await _signal(container, signal.SIGKILL, supervisor)
        if await container.ended_within(_FIRST_WAIT):
            return
    deadline = loop.time() + _LAST_WAIT
    left = f"pid {container.facts.pid} is not gone {_LAST_WAIT:g} s after SIGKILL"
    try:
        await _signal(container, signal.SIGKILL, supervisor, everything=True)
    except Failure as failure:
        if failure.errno != errno.EBUSY:
            raise
        left = failure.message  # after seconds of waiting: it names who is left
    if not await container.ended_within(deadline - loop.time()):
        raise DeadlineExceeded(
            f"container {container.id}: {left}",
            hint="a process in state D waits for a disk or a network file system and cannot be killed before that answers",
        )


async def _signal(container: Container, number: int, supervisor: Supervisor, *, everything: bool = False) -> None:
    try:
        await supervisor.kill_container(container.id, number, everything=everything)
    except Failure as failure:
        if failure.errno not in (errno.ESRCH, errno.ENOENT):
            raise
        # It has just ended; the exit is on its way.


async def end(container: Container, *, containers: Containers, supervisor: Supervisor) -> None:
    """No process of the container is left afterwards, whatever state it was in, and the runtime core has forgotten it."""
    if container.state == v1.CONTAINER_CREATED:
        async with container.lock:
            if container.state == v1.CONTAINER_CREATED:  # not started meanwhile; from here on it cannot be
                record = ExitRecord(NEVER_STARTED_CODE, now(), reason="Error", message="stopped before it was started", signal=9)
                containers.exited(container, record)
    await stop_running(container, 0, supervisor=supervisor)
    await release(container, containers=containers, supervisor=supervisor)


async def release(container: Container, *, containers: Containers, supervisor: Supervisor) -> None:
    """Let the runtime core forget an ended container: processes it left behind are killed, its cgroup goes. Callers join."""
    if container.facts.released_at:
        return
    if container.releasing is None:
        container.releasing = asyncio.create_task(_release(container, containers, supervisor), name=f"release {container.id[:13]}")
        container.releasing.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.shield(container.releasing)


async def _release(container: Container, containers: Containers, supervisor: Supervisor) -> None:
    try:
        containers.write_now(container)  # when it was started and how it ended, only the core knew so far
        await supervisor.delete_container(container.id, container.facts.cgroups_path)
        container.facts.released_at = now()
        containers.save_soon(container)
    finally:
        container.releasing = None
