"""Pipes to attached clients: copies of what a container writes, beside its log.

A client that reads slowly slows its container down, for at most ``_PATIENCE`` without any progress; then it is dropped, because a
client that has stalled must not stop a container, and neither may what it misses pile up here (CVE-2022-23471 was about a leak).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_PATIENCE = 5.0  # s


@dataclass(slots=True, eq=False)
class Client:
    """The writing end of one pipe. ``flushed`` is called when nothing is held back any more."""

    fd: int
    flushed: Callable[[], None]
    held: bytearray = field(default_factory=bytearray)
    since: float = 0.0  # monotonic, of the last progress
    finishing: bool = False


class Clients:
    """All of them, by descriptor, in the epoll set of stdio's loop."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._clients: dict[int, Client] = {}
        self._waiting: set[Client] = set()

    @property
    def waiting(self) -> bool:
        """True while some client holds bytes back: ``expire`` wants to be called."""
        return bool(self._waiting)

    def add(self, fd: int, flushed: Callable[[], None]) -> Client:
        os.set_blocking(fd, False)
        client = self._clients[fd] = Client(fd, flushed)
        self._epoll.register(fd, 0)  # EPOLLERR comes unasked when the reader has gone
        return client

    def write(self, client: Client, data: bytes) -> None:
        """Pass on, or hold back what the pipe does not take."""
        if client.fd < 0:
            return
        if client.held:
            client.held += data
            return
        done = self._try(client, data)
        if 0 <= done < len(data):
            client.held += data[done:]
            client.since = time.monotonic()
            self._waiting.add(client)
            self._epoll.modify(client.fd, select.EPOLLOUT)

    def _try(self, client: Client, data: bytes | bytearray) -> int:
        """Bytes that were taken; -1 when the reader has gone."""
        try:
            return os.write(client.fd, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            self._drop(client)
            return -1

    def ready(self, fd: int) -> bool:
        """Something is up with a descriptor of the epoll set. False if it is none of ours."""
        client = self._clients.get(fd)
        if client is None:
            return False
        if not client.held:  # EPOLLERR
            self._drop(client)
            return True
        done = self._try(client, client.held)
        if done > 0:
            client.since = time.monotonic()
            del client.held[:done]
            if not client.held:
                self._flushed(client)
        return True

    def _flushed(self, client: Client) -> None:
        self._waiting.discard(client)
        if client.finishing:
            self._drop(client)
            return
        self._epoll.modify(client.fd, 0)
        client.flushed()

    def expire(self) -> None:
        """Drop those that have not read for too long."""
        now = time.monotonic()
        for client in [client for client in self._waiting if now - client.since > _PATIENCE]:
            self._drop(client)

    def finish(self, client: Client) -> None:
        """No more comes: end of file after what is held back."""
        client.finishing = True
        if not client.held:
            self._drop(client)

    def _drop(self, client: Client) -> None:
        if client.fd < 0:
            return
        self._epoll.unregister(client.fd)
        del self._clients[client.fd]
        os.close(client.fd)
        client.fd = -1
        client.held.clear()
        self._waiting.discard(client)
        client.flushed()
