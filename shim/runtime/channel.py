"""The supervisor's line to one child: a SOCK_SEQPACKET pair carrying small JSON objects and file descriptors.

Only ids, numbers and fds travel here; specifications are read from the bundle, and payloads from sealed memfds.

A process that is forked into a PID namespace where others live must not have that line. Until its execve it can be stopped, and a
container with CAP_SYS_PTRACE can take its descriptors (pidfd_getfd(2)). By a socket it could send us descriptors of its own, and
closing one can block for hours (a TCP socket with SO_LINGER), with it the supervisor and the node; whoever has the other end of a pipe
can hold that pipe's lock for as long, in a write from memory that userfaultfd(2) or a dead file server keeps it waiting for. What is
harmless in any hands is a memory file that an error is written to, ``report``, and a socket whose other end takes nothing and of which
only the hang-up is looked at (``hang_up``). (A filter with a listener is the exception: see ``shim.runtime.listener``.)
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE = 32 * 1024  # bytes; far below the default SO_SNDBUF, so a send never blocks on a live peer
MAX_FDS = 16


def new_report() -> int:
    return os.memfd_create("cri-shim-report", os.MFD_CLOEXEC)


def hang_up() -> tuple[int, int]:
    """(the end to look at, the end to be held)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.shutdown(socket.SHUT_RD)  # sending to it is EPIPE from now on
    return ours.detach(), theirs.detach()


class Channel:
    """The child's end, blocking. ``None`` from ``receive`` means that the supervisor is gone."""

    __slots__ = ("_notes", "_report", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._report = -1
        self._notes: dict[str, Any] = {}

    def note(self, name: str, fact: Any) -> None:
        """Something that an error message, should there be one, has to carry beside the error."""
        self._notes[name] = fact

    def fileno(self) -> int:
        return self._socket.fileno()

    def fds(self) -> set[int]:
        """Whatever belongs to the line now."""
        return {self._socket.fileno()} if self._report < 0 else {self._socket.fileno(), self._report}

    def report(self) -> int:
        """Prepare to narrow: the file that has to go to the supervisor beside the answer."""
        self._report = new_report()
        return self._report

    def narrow(self) -> None:
        """From here on there is only the report of an error, and this process's end."""
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one object; a peer that is gone is the peer's business (EPIPE is ignored: its successor reads our records)."""
        if "error" in message:
            message = {**self._notes, **message}
        data = json.dumps(message, separators=(",", ":")).encode("utf-8", "backslashreplace")
        if self._socket.fileno() < 0:
            os.pwrite(self._report, data[:MAX_MESSAGE], 0)
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data[:MAX_MESSAGE]], ancillary, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive_order(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next object with the fds beside it, close-on-exec; None at end of file. What was noted belonged to the one before."""
        self._notes.clear()
        data, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, item in ancillary:
            fds.frombytes(item)
        return (json.loads(data), fds.tolist()) if data else None

    def receive(self) -> dict[str, Any] | None:
        """The next object, or None at end of file."""
        data = self._socket.recv(MAX_MESSAGE)
        return json.loads(data) if data else None
