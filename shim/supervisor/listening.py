"""Listeners of seccomp filters: out of a launch, and to the child that answers for them."""

from __future__ import annotations

import os

from shim.runtime.notifier import Notifier
from shim.supervisor.children import Job, Process
from shim.supervisor.table import Container, Core
from shim.wire import Message


async def launched(job: Job) -> tuple[Message | None, int | None]:
    """Follow a launch to its end: what went wrong, or None once the program runs; and the listener of its filter, if it has one."""
    listener: int | None = None
    while (message := await job.message()) is not None:
        if "ok" not in message.body:
            if listener is not None:
                os.close(listener)
            return message, None
        _, fds = job.unpack(message)
        listener = fds.pop("listener", listener)
    return None, listener


async def attach(core: Core, container: Container, process: Process, listener: int, status: str) -> None:
    """Give ``listener``, of a filter that ``process`` runs under, to a child that outlives us. Raises Failure."""
    init = container.process or process
    notifier = Notifier(listener, container.bundle, container.id, container.path, process.pid, init.pidfd, status)
    try:
        await core.children.call(notifier, "seccomp")
    finally:
        os.close(listener)
