"""Messages between the daemon, the supervisor and stdio: JSON objects over SOCK_SEQPACKET with file descriptors beside them.

A message above ``INLINE`` bytes travels as a sealed memfd (the default limit of a unix socket is 212,992 bytes), announced by
``{"memfd": <size>}`` and passed as the last fd. Truncation in either direction (MSG_TRUNC, MSG_CTRUNC) closes the connection: a
message that lost fds must not be acted upon. ``OPERATIONS`` is the versioned table of what may be asked of the supervisor.
"""

from __future__ import annotations

import array
import errno
import json
import os
import re
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shim.errors import Failure
from shim.linux import libc

VERSION = 1
LONG_WAY = "agent"  # the operation in a Failure of exec.start that says: send the whole process, not a block
INLINE = 32 * 1024  # bytes of JSON beside which the payload goes into a memfd
MAX_PAYLOAD = 16 << 20  # bytes, the largest gRPC message
MAX_FDS = 32  # per message: one container's or one pod's
REPORT = 8  # bytes of a report
MAX_OUTBOX = 4096  # messages a peer may leave unread before it is given up

_INT = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE((MAX_FDS + 1) * _INT)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)  # plain ints: an enum is made anew by each "|"
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_SEALS = libc.SEAL_SEAL | libc.SEAL_SHRINK | libc.SEAL_GROW | libc.SEAL_WRITE
_GET_SEALS = libc.F_ADD_SEALS + 1
_BUFFER = memoryview(bytearray(INLINE))  # shared: each message is decoded before the next is read, by the one thread there is
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # ASCII only: lone surrogates stay escaped
_decode = json.JSONDecoder().decode


class Closed(Exception):
    """The connection is over: end of file, a message that is not one, or a peer that does not read."""


class Message(NamedTuple):
    """``fds`` belong to the receiver, who closes them."""

    body: dict[str, Any]
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def encode(body: Mapping[str, Any]) -> bytes:
    """The JSON of one message. Raises ValueError for NaN and TypeError for what JSON cannot carry."""
    return _encode(body).encode("ascii")


def decode(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """One object; anything else raises Closed."""
    try:
        body = _decode(str(data, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise Closed(f"not a message: {error}") from None
    if not isinstance(body, dict):
        raise Closed("not a message: no object")
    return body


def peer(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected, listened or made the pair."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


class Connection:
    """One non-blocking end. Raises ``Closed`` when it is over; the caller then calls ``close``."""

    __slots__ = ("_outbox", "_reports", "_sock")

    def __init__(self, sock: socket.socket, *, reports: bool = False) -> None:
        """Takes the socket over. Raises Closed for a peer of another user (an abstract or stray client). With ``reports`` the peer may be a
        program of system calls, whose report of 8 bytes becomes ``{"report": hex}`` (``shim.runtime.program``)."""
        self._sock, self._reports = sock, reports
        sock.setblocking(False)
        _, uid, _ = peer(sock)
        if uid not in (0, os.geteuid()):
            sock.close()
            raise Closed(f"peer has uid {uid}")
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """True while messages wait for the peer to read: call ``flush`` when the socket is writable."""
        return bool(self._outbox)

    def send(self, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send or queue one message. ``fds`` stay the caller's."""
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} fds in one message")
        data = encode(body)
        if len(data) <= INLINE:
            self._post(data, tuple(fds))
            return
        if len(data) > MAX_PAYLOAD:
            raise ValueError(f"message of {len(data)} bytes")
        memory = libc.sealed_memfd("cri-shim-message", data)
        try:
            self._post(encode({"memfd": len(data)}), (*fds, memory))
        finally:
            os.close(memory)

    def _post(self, data: bytes, fds: tuple[int, ...]) -> None:
        if not self._outbox and self._try(data, fds):
            return
        if len(self._outbox) >= MAX_OUTBOX:
            raise Closed("peer does not read")
        self._outbox.append((data, tuple(os.dup(fd) for fd in fds)))

    def _try(self, data: bytes, fds: tuple[int, ...]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg((data,), ancillary, _SEND)
        except BlockingIOError:
            return False
        except OSError as error:
            # ETOOMANYREFS: fds in flight and not yet received, bounded by RLIMIT_NOFILE (unix(7))
            if error.errno in (errno.ENOBUFS, errno.ETOOMANYREFS):
                return False
            raise Closed(f"send: {error.strerror}") from error
        return True

    def flush(self) -> None:
        """Send what is queued, as far as the peer has room."""
        while self._outbox:
            data, fds = self._outbox[0]
            if not self._try(data, fds):
                return
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)

    def receive(self) -> Message | None:
        """The next message, None when there is none now."""
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into((_BUFFER,), _ANCILLARY, _FLAGS)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Closed(f"receive: {error.strerror}") from error
        fds: tuple[int, ...] = ()
        if ancillary:
            fds = _received(ancillary)
        try:
            if flags & _CUT:
                raise Closed("message truncated")
            if size == 0:
                raise Closed("end of file")
            body = {"report": _BUFFER[:size].hex()} if self._reports and size == REPORT else decode(_BUFFER[:size])
            if "memfd" in body:
                if not fds:
                    raise Closed("payload without its memory file")
                memory, fds = fds[-1], fds[:-1]
                try:
                    body = decode(_payload(memory, body["memfd"]))
                finally:
                    os.close(memory)
        except Closed:
            for fd in fds:
                os.close(fd)
            raise
        return Message(body, fds)

    def close(self) -> None:
        """Close it and the fds that were still queued. Safe to call twice."""
        for _, fds in self._outbox:
            for fd in fds:
                os.close(fd)
        self._outbox.clear()
        self._sock.close()


def _received(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[int, ...]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % _INT])
    return tuple(found)


def _payload(fd: int, size: Any) -> bytes:
    """The content of a sealed memory file; a file that its sender could still change is not read (CVE-2021-43784 is about lengths)."""
    import fcntl

    if not isinstance(size, int) or not 0 < size <= MAX_PAYLOAD:
        raise Closed("payload size out of range")
    try:
        seals = fcntl.fcntl(fd, _GET_SEALS)
    except OSError:
        raise Closed("payload is not a memory file") from None
    if seals & _SEALS != _SEALS or os.fstat(fd).st_size != size:
        raise Closed("payload is not sealed or has another size")
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            raise Closed("payload is short")
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def read_payload(fd: int) -> bytes:
    """The whole of a sealed memfd that came as an argument. Raises Failure when it is not one."""
    try:
        return _payload(fd, os.fstat(fd).st_size)
    except Closed as error:
        raise Failure("wire", "payload", message=str(error)) from None


@dataclass(frozen=True, slots=True)
class Operation:
    """What one request carries. ``fds`` are the fewest and most fds beside it; ``repeatable``: safe to send again to a successor."""

    fields: Mapping[str, type]
    optional: Mapping[str, type] = field(default_factory=dict)
    fds: tuple[int, int] = (0, 0)
    repeatable: bool = False


_ID = {"id": str}
_NAMES = frozenset({"id", "pod", "container", "target"})  # become parts of paths, so they may not leave their directory
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}").fullmatch
OPERATIONS: dict[str, Operation] = {
    "hello": Operation({"version": int}, repeatable=True),
    "settle": Operation({}, repeatable=True),
    "shutdown": Operation({}, {"force": bool}),
    "upgrade": Operation({"argv": list, "env": dict}, fds=(1, 1)),
    "pod.create": Operation(_ID, fds=(1, 1)),
    "pod.adopt": Operation({"id": str, "names": list}, {"pid": int}, fds=(0, MAX_FDS), repeatable=True),
    "pod.handles": Operation(_ID, repeatable=True),
    "pod.netlink": Operation(_ID, repeatable=True),
    "pod.sysctls": Operation({"id": str, "write": dict}, repeatable=True),
    "pod.sockets": Operation(_ID, repeatable=True),
    "pod.delete": Operation(_ID, repeatable=True),
    "container.create": Operation(
        {"id": str, "pod": str, "tty": bool, "stdin": bool, "stdin_once": bool, "log_path": str}, {"target": str}, fds=(1, 1)
    ),
    "container.handles": Operation(_ID, repeatable=True),
    "container.console": Operation(_ID, fds=(1, 1), repeatable=True),
    "container.start": Operation(_ID),
    "container.attach": Operation({"id": str, "fds": list}, fds=(0, 2), repeatable=True),
    "container.close_stdin": Operation(_ID, repeatable=True),
    "container.kill": Operation({"id": str, "signal": int}, {"all": bool}, repeatable=True),
    "container.delete": Operation(_ID, {"cgroup": str}, repeatable=True),
    "container.update": Operation(_ID, fds=(1, 1), repeatable=True),
    "container.resize": Operation({"id": str, "height": int, "width": int}, repeatable=True),
    "reaped": Operation({"pid": int, "status": int}, repeatable=True),
    "exec.start": Operation({"id": str, "container": str, "tty": bool, "fds": list}, {"facts": str, "until": float}, fds=(1, 4)),
    "exec.adopt": Operation({"id": str, "container": str, "pid": int}, fds=(1, 1), repeatable=True),
    "exec.kill": Operation({"id": str, "signal": int, "tree": bool}, repeatable=True),
    "exec.resize": Operation({"id": str, "height": int, "width": int}, repeatable=True),
    "log.reopen": Operation(_ID, repeatable=True),
    "probe.userns": Operation({"directory": str}, repeatable=True),
}


def check(body: Mapping[str, Any], fds: int) -> Failure | None:
    """What is wrong with a request, or None."""
    name = body.get("op")
    operation = OPERATIONS.get(name) if isinstance(name, str) else None
    if body.get("v") != VERSION:
        return Failure("wire", message=f"version {body.get('v')!r}, this supervisor speaks {VERSION}")
    if type(body.get("n")) is not int:
        return Failure("wire", path="n", message="a request needs a number")
    if operation is None:
        return Failure("wire", message=f"unknown operation {str(name)[:64]!r}")
    for key, kind in operation.fields.items():
        if type(body.get(key)) is not kind:
            return Failure(str(name), "decode", path=key, message=f"not a {kind.__name__}")
    for key in _NAMES & body.keys():
        if not _NAME(str(body[key])):
            return Failure(str(name), "decode", path=key, message="not an id")
    for key, kind in operation.optional.items():
        if key in body and type(body[key]) is not kind:
            return Failure(str(name), "decode", path=key, message=f"not a {kind.__name__}")
    if not operation.fds[0] <= fds <= operation.fds[1]:
        return Failure(str(name), "decode", path="fds", message=f"{fds} fds, expected {operation.fds[0]} to {operation.fds[1]}")
    return None
