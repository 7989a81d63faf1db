"""The supervisor's side of stdio: start it, start it again when it dies, ask it things."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shim import wire
from shim.errors import Failure
from shim.runtime import launch
from shim.runtime.channel import Channel
from shim.stdio import main as stdio
from shim.supervisor.children import Children, Process
from shim.supervisor.loop import READ, WRITE, Future
from shim.supervisor.table import Container, Table

_CALM = 10.0  # s that a stdio should live; one that dies sooner is started again after a pause
_LONGEST_PAUSE = 2.0  # s


@dataclass(frozen=True, slots=True)
class StdioJob:
    state: int

    @property
    def keep(self) -> Collection[int]:
        return (self.state,)

    def __call__(self, channel: Channel) -> None:
        stdio.serve(wire.Connection(socket.socket(fileno=os.dup(channel.fileno()))), self.state)


@dataclass(slots=True)
class _Request:
    body: dict[str, Any]
    answer: Future[dict[str, Any]]
    fds: Mapping[str, int] | None  # sent along; looked at anew for each stdio


class Logs:
    """Requests survive a stdio that dies: its successor is told about every container and asked again."""

    def __init__(
        self, children: Children, table: Table, state: int, publish: Callable[[dict[str, Any]], None], log: Callable[[str], None]
    ) -> None:
        self._children, self._loop, self._table, self._state = children, children.loop, table, state
        self._publish, self._log = publish, log
        self._connection: wire.Connection | None = None
        self._process: Process | None = None
        self._pending: dict[int, _Request] = {}
        self._next = 0
        self._pause = 0.0
        self._writing = False
        self.stopping = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Fork stdio from this warm interpreter and tell it all it has to know."""
        child = launch.spawn(StdioJob(self._state), title="cri-shim: stdio")
        self._process = Process(self._children, child.pid, child.pidfd)
        self._process.ended.then(self._died)
        self._connection = wire.Connection(child.channel)
        self._loop.add(self._connection.fileno(), self._receive)
        started = self._children.loop.call_later(_CALM, self._calm)
        self._process.ended.then(started.cancel)
        adding = {r.body["id"] for r in self._pending.values() if r.body["op"] == "add"}
        for container in self._table.containers.values():
            if container.ends and container.id not in adding:
                self._loop.start(self.add_again(container))
        for number, request in list(self._pending.items()):
            self._send(number, request)

    def _calm(self) -> None:
        self._pause = 0.0

    def _died(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._log(f"stdio died: {process.ended.result()}")
            process.close()
        self._hang_up()
        if self.stopping:
            return
        self._loop.call_later(self._pause, self._restart)
        self._pause = min(_LONGEST_PAUSE, self._pause * 2 or 0.05)

    def _restart(self) -> None:
        if self.stopping:
            return
        try:
            self.start()
        except OSError as error:
            self._log(f"stdio: {error}")
            self._loop.call_later(_LONGEST_PAUSE, self._restart)
            return
        self._publish({"event": "stdio.restarted", "pid": self.pid})

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._loop.remove(self._connection.fileno())
            self._connection.close()
            self._connection = None
            self._writing = False

    def _receive(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.flush()
            self._want_write(connection)
            while (message := connection.receive()) is not None:
                self._handle(message.body)
        except wire.Closed:
            self._hang_up()  # its death follows by pidfd

    def _handle(self, body: dict[str, Any]) -> None:
        if "event" in body:
            self._publish(body)
            return
        request = self._pending.pop(body["n"], None)
        if request is None:
            return
        if "ok" in body:
            request.answer.set(body["ok"])
        else:
            request.answer.fail(Failure.from_json(body["error"]))

    def _send(self, number: int, request: _Request) -> None:
        if self._connection is None:
            return  # it is sent to the next one
        fds: list[int] = []
        if request.fds is not None:
            request.body["names"], fds = list(request.fds), list(request.fds.values())
        try:
            self._connection.send({"n": number, **request.body}, fds)
            self._want_write(self._connection)
        except wire.Closed:
            self._hang_up()

    def _want_write(self, connection: wire.Connection) -> None:
        if connection.pending != self._writing:
            self._writing = connection.pending
            self._loop.change(connection.fileno(), READ | WRITE if self._writing else READ)

    def ask(self, op: str, name: str, given: Mapping[str, int] | None = None, **fields: Any) -> Future[dict[str, Any]]:
        """Send a request; ``given`` fds stay the caller's, open until the answer.

        The future fails with stdio's Failure; it outlives a stdio that dies.
        """
        self._next += 1
        request = _Request({"op": op, "id": name, **fields}, Future(self._loop), given)
        self._pending[self._next] = request
        self._send(self._next, request)
        return request.answer

    def add(self, container: Container) -> Future[dict[str, Any]]:
        """Hand over the container's ends. Fails when its log cannot be opened."""
        return self.ask("add", container.id, container.ends, log_path=container.log_path)

    async def add_again(self, container: Container) -> None:
        """Where nobody waits for the answer: a log that cannot be opened any more must not leave the container blocked."""
        try:
            await self.add(container)
        except Failure as failure:
            self._publish({"event": "log.error", "id": container.id, "path": container.log_path, "errno": failure.errno, "dropped": 0})
            self._log(f"container {container.id}: its output is discarded: {failure}")
            await self.ask("add", container.id, container.ends, log_path="")

    async def stop(self) -> None:
        """An orderly end: unfinished lines are written."""
        self.stopping = True
        if self._process is not None:
            ended = self._process.ended
            self.ask("stop", "")
            if not await self._loop.within(ended, 2.0):
                self._process.signal(9)
