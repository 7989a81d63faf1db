"""The supervisor's line to one child: a SOCK_SEQPACKET pair carrying small JSON objects and file descriptors.

Only ids, numbers and fds travel here; specifications are read from the bundle, and payloads from sealed memfds.
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE = 32 * 1024  # bytes; far below the default SO_SNDBUF, so a send never blocks on a live peer
MAX_FDS = 16


class Channel:
    """The child's end, blocking. ``None`` from ``receive`` means that the supervisor is gone."""

    __slots__ = ("_notes", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._notes: dict[str, Any] = {}

    def note(self, name: str, fact: Any) -> None:
        """Something that an error message, should there be one, has to carry beside the error."""
        self._notes[name] = fact

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one object; a peer that is gone is the peer's business (EPIPE is ignored: its successor reads our records)."""
        if "error" in message:
            message = {**self._notes, **message}
        data = json.dumps(message, separators=(",", ":")).encode("utf-8", "backslashreplace")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data[:MAX_MESSAGE]], ancillary, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive_order(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next object with the fds beside it, close-on-exec; None at end of file."""
        data, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, item in ancillary:
            fds.frombytes(item)
        return (json.loads(data), fds.tolist()) if data else None

    def receive(self) -> dict[str, Any] | None:
        """The next object, or None at end of file."""
        data = self._socket.recv(MAX_MESSAGE)
        return json.loads(data) if data else None
