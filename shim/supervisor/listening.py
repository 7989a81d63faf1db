"""Listeners of seccomp filters: out of a launch, and to the child that answers for them."""

from __future__ import annotations

import os

from shim.errors import Failure
from shim.runtime.notifier import Notifier
from shim.supervisor.children import Job, Process
from shim.supervisor.table import Container, Core


async def launched(job: Job, patience: float) -> tuple[Failure | None, int | None]:
    """Follow a launch to its end: what went wrong, or None once the program runs; and the listener of its filter, if it has one.

    Where something in the container can see what is launched before its program runs, there is no line left to follow
    (``shim.runtime.channel``), and seconds to wait are bounded by ``patience``. A filter with a listener still needs the line.
    """
    if job.narrowed:
        return await job.last_words(patience), None
    listener: int | None = None
    while (message := await job.message()) is not None:
        if "ok" not in message.body:
            message.close()
            if listener is not None:
                os.close(listener)
            return Failure.from_json(message.body.get("error", {"phase": job.title})), None
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
