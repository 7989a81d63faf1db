"""Listeners of seccomp filters: out of a launch, and to the child that answers for them."""

from __future__ import annotations

import os

from shim.errors import Failure
from shim.runtime.notifier import Notifier
from shim.supervisor.children import Job, Line, Process
from shim.supervisor.table import Container, Core


class Reported(Failure):
    """A report of a program of system calls, in hexadecimal digits, still to be put into words."""

    def __init__(self, report: str) -> None:
        super().__init__("start container", message=f"report {report}")
        self.report = report


async def launched(line: Line, patience: float, job: Job | None = None) -> tuple[Failure | None, int | None]:
    """Follow a launch over its line, which may be that of its ``job``, to the end: what went wrong, or None once the program runs; and the
    listener of its filter, if it has one.

    Where something in the container can see what is launched before its program runs, there is no line left to follow
    (``shim.runtime.channel``), and seconds to wait are bounded by ``patience``. A filter with a listener still needs the line.
    """
    if job is not None and job.narrowed:
        return await job.last_words(patience), None
    listener: int | None = None
    while (message := await line.message()) is not None:
        if "ok" not in message.body:
            message.close()
            if listener is not None:
                os.close(listener)
            if "report" in message.body:
                return Reported(message.body["report"]), None
            return Failure.from_json(message.body.get("error", {"phase": line.title})), None
        _, fds = line.unpack(message)
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
