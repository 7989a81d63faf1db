"""Plugins that an earlier daemon started and did not outlive. One that still adds a pod's network would do so behind a DEL's back.

They are told by their environment, which plugins hand on to those that they delegate to.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Collection

_MARK = b"CNI_CONTAINERID="
_ROUNDS = 5
_PATIENCE = 5.0  # seconds for a killed process to be gone

log = logging.getLogger("cri.network")


def end(pods: Collection[str]) -> None:
    """Kill every process that works on one of these pods, and wait until it is gone. Blocks: for a thread."""
    wanted = {pod.encode() for pod in pods}
    for _ in range(_ROUNDS):  # one may have forked while we looked at others
        killed = _kill_all(wanted)
        if not killed:
            return
        deadline = time.monotonic() + _PATIENCE
        for fd in killed:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                log.error("a plugin process does not end although it was killed")
            os.close(fd)


def _kill_all(wanted: Collection[bytes]) -> list[int]:
    """Descriptors of the processes that were killed."""
    killed = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _pod(name) in wanted:
            try:
                fd = os.pidfd_open(int(name))
            except OSError:
                continue  # ended by itself
            if _pod(name) in wanted:  # still: from here on the descriptor is that process, whatever becomes of the number
                log.warning("killing plugin process %s, which an earlier daemon left behind", name)
                _kill(fd)
                killed.append(fd)
            else:
                os.close(fd)
    return killed


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # ended and reaped in between


def _pod(pid: str) -> bytes:
    """The pod that a process was started for; empty for most."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read(1 << 16).split(b"\0")
    except OSError:
        return b""
    return next((v[len(_MARK) :] for v in variables if v.startswith(_MARK)), b"")
