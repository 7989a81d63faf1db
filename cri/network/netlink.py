"""The exchange of netlink messages: those of pyroute2 (``cri.network.messages``) and those that are bytes already (``cri.network.rtnl``).

pyroute2's ``IPRoute`` is not used: the synchronous one runs an event loop of its own per call, and both send one request at a time, where a
pod needs three messages on one side and five on the other. Here a batch is one send, and the kernel works it off inside that system call.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

REQUEST, ACK, EXCL, REPLACE, CREATE, DUMP = 0x1, 0x4, 0x200, 0x100, 0x400, 0x300
_ERROR, _DONE, _ACK_TLVS = 2, 3, 0x200
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_HEADER = struct.Struct("=IHHII")
_TIMEOUT = 10.0  # seconds; requests are answered inside send(2), so this only bounds a broken kernel

Message = Any  # a pyroute2 nlmsg, which has no types, or a Raw


class Raw(NamedTuple):
    """A message whose body is bytes already (``cri.network.rtnl``)."""

    kind: int
    flags: int
    body: bytes


class Socket:
    """A NETLINK_ROUTE socket. With ``fileno`` it takes over one that was opened in another network namespace."""

    def __init__(self, fileno: int | None = None, *, protocol: int = socket.NETLINK_ROUTE) -> None:
        if fileno is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        else:
            self._socket = socket.socket(fileno=fileno)
        self._socket.settimeout(_TIMEOUT)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def batch(self, messages: Sequence[Message]) -> list[OSError | None]:
        """Send requests in one go; each one's outcome in order. All are tried, also after a failure."""
        if not messages:
            return []
        first = self._sequence + 1
        self._send(messages, ACK)
        outcome: dict[int, OSError | None] = {}
        while len(outcome) < len(messages):
            for kind, flags, sequence, body in self._receive():
                if kind == _ERROR and first <= sequence:
                    outcome[sequence] = _error(flags, body)
        return [outcome[s] for s in sorted(outcome)]

    def request(self, *messages: Message) -> None:
        """Send requests; raises the first one's OSError that failed."""
        for error in self.batch(messages):
            if error is not None:
                raise error

    def get(self, message: Message) -> bytes:
        """The answer to a request for one object; OSError (ENODEV…) if there is none."""
        self._send([message], 0)
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence == self._sequence:
                    error = _error(flags, body) if kind == _ERROR else None
                    if error is not None:
                        raise error
                    return body

    def dump(self, message: Message) -> list[bytes]:
        """All answers to a dump request."""
        self._send([message], DUMP)
        answers: list[bytes] = []
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == _DONE:
                    return answers
                error = _error(flags, body) if kind == _ERROR else None
                if error is not None:
                    raise error
                answers.append(body)

    def _send(self, messages: Sequence[Message], flags: int) -> None:
        data = bytearray()
        for message in messages:
            self._sequence += 1
            if isinstance(message, Raw):
                data += _HEADER.pack(16 + len(message.body), message.kind, REQUEST | flags | message.flags, self._sequence, 0)
                data += message.body
                data += bytes(-len(data) % 4)
                continue
            message["header"]["flags"] |= REQUEST | flags
            message["header"]["sequence_number"] = self._sequence
            message["header"]["pid"] = 0
            message.reset()
            message.encode()
            data += message.data
            data += bytes(-len(data) % 4)
        self._socket.send(data)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(1 << 18)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset : offset + length]
            offset += (length + 3) & ~3


def _error(flags: int, body: bytes) -> OSError | None:
    """The OSError of an NLMSG_ERROR, with the kernel's extended message where there is one; None for an acknowledgement."""
    (number,) = struct.unpack_from("=i", body, 16)
    if number == 0:
        return None
    text = os.strerror(-number)
    if flags & _ACK_TLVS:
        # error code, then the header of the request (its body is capped), then attributes
        offset = 16 + 4 + 16
        while offset + 4 <= len(body):
            length, kind = struct.unpack_from("=HH", body, offset)
            if length < 4:
                break
            if kind == 1:  # NLMSGERR_ATTR_MSG
                text = f"{text}: {body[offset + 4 : offset + length].rstrip(bytes(1)).decode(errors='replace')}"
            offset += (length + 3) & ~3
    return OSError(-number, text)


def attributes_of(data: bytes, offset: int) -> dict[int, bytes]:
    found = {}
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found
