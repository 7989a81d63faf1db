"""asyncio's end of ``shim.wire``: requests with numbers out, answers to futures, events to a callback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from shim import wire
from shim.errors import Failure


class Lost(Exception):
    """The connection ended before the answer came."""


class Line:
    """One connection. ``lost`` is called once when it ends by itself; ``close`` ends it quietly. Either fails what is pending."""

    def __init__(self, sock: socket.socket, event: Callable[[dict[str, Any]], None], lost: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = wire.Connection(sock)
        self._event, self._lost = event, lost
        self._pending: dict[int, asyncio.Future[wire.Message]] = {}
        self._number = 0
        self._writing = self._closed = False
        self._loop.add_reader(self._connection.fileno(), self._readable)

    def post(self, op: str, fds: Sequence[int], fields: dict[str, Any]) -> asyncio.Future[wire.Message]:
        """Send a request now. The future fails with ``Lost``; ``fds`` stay the caller's."""
        future: asyncio.Future[wire.Message] = self._loop.create_future()
        if self._closed:
            future.set_exception(Lost())
            return future
        self._number += 1
        self._pending[self._number] = future
        try:
            self._connection.send({"v": wire.VERSION, "n": self._number, "op": op, **fields}, fds)
            self._want_write()
        except wire.Closed as error:
            self._end(str(error))
        except (ValueError, TypeError):
            del self._pending[self._number]
            raise
        return future

    def _want_write(self) -> None:
        if self._connection.pending != self._writing:
            self._writing = self._connection.pending
            if self._writing:
                self._loop.add_writer(self._connection.fileno(), self._flush)
            else:
                self._loop.remove_writer(self._connection.fileno())

    def _flush(self) -> None:
        try:
            self._connection.flush()
            self._want_write()
        except wire.Closed as error:
            self._end(str(error))

    def _readable(self) -> None:
        try:
            while not self._closed and (message := self._connection.receive()) is not None:
                if "n" in message.body:
                    self._answered(message)
                else:
                    self._event(message.body)
        except wire.Closed as error:
            self._end(str(error))

    def _answered(self, message: wire.Message) -> None:
        future = self._pending.pop(message.body["n"], None)
        if future is None or future.done():
            message.close()  # the caller was cancelled, and what the answer carries must not leak
        else:
            future.set_result(message)

    def _end(self, why: str) -> None:
        if not self._closed:
            self.close()
            self._lost(why)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._connection.fileno())
        self._loop.remove_writer(self._connection.fileno())
        self._connection.close()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(Lost())


def unpack(op: str, message: wire.Message) -> tuple[dict[str, Any], dict[str, int]]:
    """The ``ok`` of an answer and its fds by name, the caller's to close. Raises its Failure."""
    body, fds = message
    if "error" in body:
        message.close()
        raise Failure.from_json(body["error"])
    ok: dict[str, Any] = body["ok"]
    names = ok.get("fds", ())
    if len(names) != len(fds):
        message.close()
        raise Failure(op, message=f"{len(fds)} fds came for {len(names)} names")
    return ok, dict(zip(names, fds, strict=True))
