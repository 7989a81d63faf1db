"""The supervisor's socket: connections, requests to operations, events to whoever said hello."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from shim import wire
from shim.errors import Failure
from shim.runtime.probe import UserNamespaces
from shim.supervisor import adopt, attach, containers, exits, pods, sessions, upgrade
from shim.supervisor.logs import Logs
from shim.supervisor.loop import READ, WRITE, Loop
from shim.supervisor.request import Handler, Request
from shim.supervisor.table import Container, Core

SOCKET = "supervisor.sock"
_BACKLOG = 16


class Peer:
    """One connection."""

    def __init__(self, server: Server, connection: wire.Connection) -> None:
        self._server, self._connection = server, connection
        self._writing = self._closed = False
        self.greeted = False
        server.loop.add(connection.fileno(), self.ready)

    def ready(self) -> None:
        try:
            if self._writing:
                self._connection.flush()
                self._want_write()
            while not self._closed and (message := self._connection.receive()) is not None:
                self._server.serve(self, message)
        except wire.Closed:
            self.close()

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """To a peer that has gone, nothing is sent: it asks again when it is back."""
        if self._closed:
            return
        try:
            self._connection.send(body, fds)
            self._want_write()
        except wire.Closed:
            self.close()

    def _want_write(self) -> None:
        if self._connection.pending != self._writing:
            self._writing = self._connection.pending
            self._server.loop.change(self._connection.fileno(), READ | WRITE if self._writing else READ)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._server.loop.remove(self._connection.fileno())
            self._connection.close()
            self._server.peers.discard(self)


async def hello(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """What there is, for a daemon that has just come (back)."""
    return {
        "pid": os.getpid(),
        "version": wire.VERSION,
        "build": core.build,
        "stdio": logs.pid,
        "pods": [pod.facts() for pod in core.table.pods.values()],
        "containers": [_container(container) for container in core.table.containers.values() if container.user is not None],
    }


def _container(container: Container) -> dict[str, Any]:
    return {
        "id": container.id,
        "pod": container.pod,
        "pid": container.pid,
        "starttime": container.starttime,
        "started": bool(container.started_at),
        "started_at": container.started_at,
        "user": container.user,
        "tty": container.tty,
        "exit": None if container.exit is None else exits.exit_fields(container.exit),
    }


async def reaped(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """The daemon has reaped a process that it became the parent of."""
    exits.reaped(request.body["pid"], request.body["status"])
    return {}


async def shutdown(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """End, with stdio, after the answer. Containers outlive us anyway; without ``force`` living ones are a reason to refuse."""
    living = [c.id for c in core.table.containers.values() if c.process is not None and c.exit is None]
    if living and not request.body.get("force"):
        raise Failure("shutdown", message=f"{len(living)} containers are running")
    await logs.stop()
    core.loop.call_later(0.05, lambda: setattr(core.loop, "stopped", True))
    return {}


async def probe_user_namespaces(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Why pods cannot have user namespaces; empty where they can."""
    facts, _ = await core.children.call(UserNamespaces(core.context, request.body["directory"]), "probe")
    return {"reason": facts["reason"]}


HANDLERS: dict[str, Handler] = {
    "hello": hello,
    "settle": adopt.settle,
    "shutdown": shutdown,
    "upgrade": upgrade.upgrade,
    "reaped": reaped,
    "pod.create": pods.create,
    "pod.adopt": pods.adopt,
    "pod.handles": pods.handles,
    "pod.netlink": pods.netlink,
    "pod.sysctls": pods.sysctls,
    "pod.sockets": pods.sockets,
    "pod.delete": pods.delete,
    "container.create": containers.create,
    "container.start": containers.start,
    "container.kill": containers.kill,
    "container.delete": containers.delete,
    "container.update": containers.update,
    "container.resize": containers.resize,
    "container.handles": containers.handles,
    "container.console": adopt.take_console,
    "container.attach": attach.attach,
    "container.close_stdin": attach.close_stdin,
    "exec.start": sessions.start,
    "exec.adopt": sessions.adopt,
    "exec.kill": sessions.kill,
    "exec.resize": sessions.resize,
    "log.reopen": containers.reopen_log,
    "probe.userns": probe_user_namespaces,
}
assert HANDLERS.keys() == wire.OPERATIONS.keys()


class Server:
    """Accepts daemons (one at a time in practice) and runs what they ask, many requests at once."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.peers: set[Peer] = set()
        self._core: Core | None = None
        self._logs: Logs | None = None

    def open(self, core: Core, logs: Logs) -> None:
        """Start to answer: the table is complete."""
        self._core, self._logs = core, logs
        self._listener = socket.socket(fileno=core.listener)
        self.loop.add(core.listener, self._accept)

    @staticmethod
    def listen(state: int) -> int:
        """The fd of a listening socket. Who connects before ``open`` waits."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=state)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        listener.bind(f"/proc/self/fd/{state}/{SOCKET}")  # however long the state directory's path is
        os.umask(before)
        listener.listen(_BACKLOG)
        return listener.detach()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.join(sock)

    def join(self, sock: socket.socket) -> None:
        """Serve a connected socket."""
        try:
            self.peers.add(Peer(self, wire.Connection(sock)))
        except wire.Closed as error:
            if self._core is not None:
                self._core.log(f"connection refused: {error}")

    def publish(self, event: dict[str, Any]) -> None:
        for peer in list(self.peers):
            if peer.greeted:
                peer.send(event)

    def serve(self, peer: Peer, message: wire.Message) -> None:
        body, fds = message
        number = body.get("n")
        fault = wire.check(body, len(fds))
        if fault is not None:
            message.close()
            peer.send({"n": number, "error": fault.to_json()})
            return
        self.loop.start(self._run(peer, body, list(fds)))

    async def _run(self, peer: Peer, body: dict[str, Any], fds: list[int]) -> None:
        request = Request(body, fds)
        assert self._core is not None and self._logs is not None
        try:
            reply = await HANDLERS[body["op"]](self._core, self._logs, request)
            sent = {**request.lent, **request.given}
            if sent:
                reply = {**reply, "fds": list(sent)}
            peer.greeted = peer.greeted or body["op"] == "hello"
            peer.send({"n": body["n"], "ok": reply}, tuple(sent.values()))
        except Failure as failure:
            peer.send({"n": body["n"], "error": failure.to_json()})
        except Exception as error:
            self._core.log(f"{body['op']}: {_where(error)}")
            if isinstance(error, OSError):
                unexpected = Failure.wrap(str(body["op"]), "system call", error)
            else:
                unexpected = Failure(str(body["op"]), message=f"{type(error).__name__}: {error}"[:500])
            peer.send({"n": body["n"], "error": unexpected.to_json()})
        finally:
            request.close()


def _where(error: BaseException) -> str:
    """A traceback without source lines: nothing is read from disk in this process."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({' < '.join(reversed(frames))})"
