"""Attached clients: output goes to pipes of the daemon by way of stdio, input comes from the daemon, who is lent our end of it."""

from __future__ import annotations

import os
from typing import Any

from shim.errors import Failure
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.table import Core

_OUTPUTS = ("stdout", "stderr")


async def attach(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Copy what the container writes from now on to the given pipes; lend its stdin, or the master of its terminal."""
    container = core.table.running(request.id)
    names = request.body["fds"]
    if len(names) != len(request.fds) or len(set(names)) != len(names) or not set(names) <= set(_OUTPUTS):
        raise Failure("attach", path="fds", message="does not name the fds")
    if names:
        await logs.ask("attach", container.id, dict(zip(names, request.fds, strict=True)))
    for name in ("stdin", "console"):
        if name in container.ends:
            request.lent[name] = container.ends[name]
    return {}


async def close_stdin(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """End of file on the stdin of a container with ``stdin_once``, for good: a successor of ours finds no FIFO to open. Repeatable."""
    container = core.table.container(request.id)
    if not container.stdin_once or container.tty:
        raise Failure("close stdin", path=request.id, message="stays open for other clients")
    try:
        os.unlink("stdin", dir_fd=container.bundle)
    except FileNotFoundError:
        pass  # the second time
    fd = container.ends.pop("stdin", None)
    if fd is not None:
        os.close(fd)
    await logs.ask("close_stdin", container.id)
    return {}
