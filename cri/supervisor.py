"""The daemon's connection to the supervisor: its operations as coroutines, its events as callbacks, and its replacement when it dies.

The daemon holds copies of what a successor could not find again (pod namespaces, terminals, pidfds of exec sessions). It is a subreaper,
so processes whose supervisor died become its children: it reaps exactly those, by pidfd, and tells the successor how they ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from cri import payloads
from cri.facts import ContainerFacts, Created, ExecSession, PodFacts, PodHandles, Snapshot, Started
from cri.line import Line, Lost, unpack
from cri.orphans import Orphans
from shim import client, wire
from shim.errors import Failure
from shim.oci import codec
from shim.oci.bundle import ExitRecord
from shim.oci.spec import Process, Resources, User

__all__ = ["ContainerFacts", "Created", "ExecSession", "PodFacts", "PodHandles", "Snapshot", "Started", "Supervisor"]

log = logging.getLogger(__name__)

_PAUSE = 0.2  # s between tries to start a supervisor that does not come up


class Supervisor:
    """See the module. Callbacks run in the event loop and must not block."""

    def __init__(self, state: Path, python: Path, runtime_cgroup: str) -> None:
        self._state, self._python, self._runtime_cgroup = state, python, runtime_cgroup
        self._loop = asyncio.get_running_loop()
        self._link: client.Link | None = None
        self._line: Line | None = None
        self._up = asyncio.Event()
        self._closed = False
        self._pods: dict[str, PodFacts] = {}
        self._pod_fds: dict[str, dict[str, int]] = {}
        self._containers: dict[str, ContainerFacts] = {}
        self._consoles: dict[str, int] = {}
        self._sessions: dict[str, ExecSession] = {}
        self._starting: dict[str, int | None] = {}  # exec sessions whose start is not answered; exit codes that overtook it
        self._long_way: set[str] = set()  # containers whose exec sessions the agent cannot start
        self._facts = payloads.Facts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._orphans = Orphans(self._loop, self._orphan_ended)
        self.on_exit: Callable[[str, ExitRecord], None] = lambda container_id, exit: None
        self.on_oom: Callable[[str], None] = lambda container_id: None
        self.on_log_error: Callable[[str, int | None, int], None] = lambda container_id, errno, dropped: None
        self.on_replaced: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, state: Path, *, python: Path, runtime_cgroup: str = "", link: client.Link | None = None) -> Supervisor:
        """Take over ``link``, which ``shim.client.ensure`` made before grpc was imported, or get one now."""
        self = cls(state, python, runtime_cgroup)
        if link is None:
            link = await asyncio.to_thread(client.ensure, state, python, runtime_cgroup=runtime_cgroup)
        self._take(link)
        if link.spawned:  # what an earlier one left may be ours to reap
            self._watch_orphans()
        await self._hand_over()
        self._up.set()
        if self._pods or self._containers:
            self._background(self._fetch_handles())
        return self

    @property
    def pid(self) -> int:
        """The supervisor's, 0 while there is none."""
        return self._link.pid if self._link is not None else 0

    def snapshot(self) -> Snapshot:
        return Snapshot(dict(self._pods), dict(self._containers))

    def close(self) -> None:
        """Let go of the supervisor; it and everything it runs go on."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._hang_up()
        self._orphans.close()
        for fds in self._pod_fds.values():
            _close_all(fds.values())
        self._pod_fds.clear()
        _close_all(self._consoles.values())
        self._consoles.clear()
        for session in self._sessions.values():
            os.close(session.pidfd)
        self._sessions.clear()

    async def probe_user_namespaces(self, directory: Path) -> str:
        """Why pods cannot have user namespaces; empty where they can. ``directory``, beside the images, is made and removed."""
        try:
            ok, _ = await self._call("probe.userns", directory=str(directory))
        except Failure as failure:
            return str(failure)
        return str(ok["reason"])

    # ---- pods

    async def create_pod(self, pod_id: str, directory: Path) -> PodHandles:
        """Make the namespaces that ``directory``/sandbox.json asks for."""
        with payloads.directory(directory) as fd:
            ok, fds = await self._call("pod.create", (fd,), id=pod_id)
        netlink = fds.pop("netlink", None)
        self._pod_fds[pod_id] = fds
        self._pods[pod_id] = PodFacts(ok["pid"], ok["starttime"], True)
        return PodHandles(ok["pid"], netlink)

    async def pod_netlink(self, pod_id: str) -> int:
        """A new rtnetlink socket in the pod's network namespace, the caller's to close."""
        _, fds = await self._call("pod.netlink", id=pod_id)
        return fds["netlink"]

    async def pod_sysctls(self, pod_id: str, write: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, int]]:
        """Write parameters of the pod's network namespace (None: only read), by their paths below /proc/sys: what they are
        afterwards, and the errno of each that could not be written or read."""
        ok, _ = await self._call("pod.sysctls", id=pod_id, write=dict(write))
        return ok["values"], ok["failed"]

    async def pod_sockets(self, pod_id: str) -> list[socket.socket]:
        """TCP sockets, not connected, in the pod's network namespace: some of each address family, the caller's to close."""
        _, fds = await self._call("pod.sockets", id=pod_id)
        made = [socket.socket(fileno=fd) for fd in fds.values()]
        for sock in made:
            sock.setblocking(False)
        return made

    async def delete_pod(self, pod_id: str) -> None:
        """Idempotent."""
        await self._call("pod.delete", id=pod_id)
        self._pods.pop(pod_id, None)
        _close_all(self._pod_fds.pop(pod_id, {}).values())

    # ---- containers

    async def create_container(
        self, container_id: str, pod_id: str, *, bundle: Path, log_path: str, tty: bool, stdin: bool, stdin_once: bool,
        target: str | None = None,
    ) -> Created:  # fmt: skip
        """``target``: the container whose PID namespace ``target:pid`` in the spec means."""
        fields: dict[str, Any] = {
            "id": container_id,
            "pod": pod_id,
            "log_path": log_path,
            "tty": tty,
            "stdin": stdin,
            "stdin_once": stdin_once,
        }
        if target is not None:
            fields["target"] = target
        with payloads.directory(bundle) as fd:
            ok, fds = await self._call("container.create", (fd,), **fields)
        if "console" in fds:
            self._consoles[container_id] = fds["console"]
        user = codec.from_json(User, ok["user"])
        self._containers[container_id] = ContainerFacts(pod_id, ok["pid"], ok["starttime"], 0, tty, user)
        return Created(ok["pid"], user)

    async def start_container(self, container_id: str) -> Started:
        ok, _ = await self._call("container.start", id=container_id)
        facts = self._containers.get(container_id)
        if facts is not None:
            facts.pid, facts.starttime, facts.started_at = ok["pid"], ok["starttime"], ok["started_at"]
        return Started(ok["pid"], ok["started_at"])

    async def kill_container(self, container_id: str, number: int, *, everything: bool = False) -> None:
        """Signal the first process, or SIGKILL all of the cgroup with ``everything``. One that has exited is fine."""
        await self._call("container.kill", id=container_id, signal=number, all=everything)

    async def delete_container(self, container_id: str, cgroups_path: str = "") -> None:
        """Kill if need be, remove the cgroup. Idempotent; raises Failure for a process that does not die. ``cgroups_path`` is where to look
        for what is left of a container that the core has lost, bundle and all."""
        await self._call("container.delete", id=container_id, **({"cgroup": cgroups_path} if cgroups_path else {}))
        self._containers.pop(container_id, None)
        self._long_way.discard(container_id)
        console = self._consoles.pop(container_id, None)
        if console is not None:
            os.close(console)

    async def update_container(self, container_id: str, resources: Resources) -> None:
        with payloads.sealed(resources) as fd:
            await self._call("container.update", (fd,), id=container_id)

    async def resize(self, target_id: str, height: int, width: int, *, session: bool = False) -> None:
        """Of a container's terminal, or an exec session's."""
        await self._call("exec.resize" if session else "container.resize", id=target_id, height=height, width=width)

    async def attach(self, container_id: str, *, stdout: int | None, stderr: int | None) -> dict[str, int]:
        """Copy output to pipes from now on. The answer has what the container has of ``stdin`` and ``console``, the caller's to close."""
        given = {name: fd for name, fd in (("stdout", stdout), ("stderr", stderr)) if fd is not None}
        _, fds = await self._call("container.attach", tuple(given.values()), id=container_id, fds=list(given))
        return fds

    async def close_stdin(self, container_id: str) -> None:
        """End of file on the stdin of a container with ``stdin_once``, for good."""
        await self._call("container.close_stdin", id=container_id)

    async def reopen_log(self, container_id: str) -> None:
        await self._call("log.reopen", id=container_id)

    # ---- exec sessions

    async def exec(
        self,
        container_id: str,
        exec_id: str,
        process: Process,
        *,
        stdin: int | None,
        stdout: int | None,
        stderr: int | None,
        until: float | None = None,
    ) -> ExecSession:
        """Run a process; the fds stay the caller's, who closes its copies after this. Raises Failure when execve fails.

        After ``until`` (of the event loop's clock) it is not begun any more, and fails with ETIMEDOUT.
        """
        given = {name: fd for name, fd in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)) if fd is not None}
        self._starting[exec_id] = None
        try:
            try:
                ok, fds = await self._exec(container_id, exec_id, process, given, until)
            except Failure as failure:
                raise payloads.named(failure, process) from None
        finally:
            code = self._starting.pop(exec_id)
        session = ExecSession(exec_id, container_id, ok["pid"], fds["pidfd"], fds.get("console"), self._loop.create_future())
        self._sessions[exec_id] = session
        if code is not None:  # its exit was read in the same go as the answer
            self._session_ended(exec_id, code)
        return session

    async def _exec(
        self, container_id: str, exec_id: str, process: Process, given: dict[str, int], until: float | None
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """By the agent, unless the container or the session is known, or turns out, to need the long way."""
        fields: dict[str, Any] = {"id": exec_id, "container": container_id, "tty": process.terminal}
        if until is not None:
            fields["until"] = until
        if not process.terminal and container_id not in self._long_way:
            try:
                with payloads.block(process) as block:
                    names, facts = ["block", *given], self._facts.of(process)
                    return await self._call("exec.start", (block, *given.values()), **fields, fds=names, facts=facts)
            except Failure as failure:
                if failure.operation != wire.LONG_WAY:
                    raise
                self._long_way.add(container_id)
        with payloads.sealed(process) as payload:
            return await self._call("exec.start", (payload, *given.values()), **fields, fds=["payload", *given])

    async def kill_exec(self, exec_id: str, number: int, *, tree: bool) -> None:
        """Signal the process, with ``tree`` also its descendants and nothing else of the container. One that has ended is fine."""
        await self._call("exec.kill", id=exec_id, signal=number, tree=tree)

    # ---- the connection

    async def _call(self, op: str, fds: Sequence[int] = (), /, **fields: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """One request to its answer, asked again of a successor where that is safe."""
        while True:
            if self._closed:  # SIGTERM came first; without this, a call that may be repeated would be, for ever
                raise Failure(op, path=str(fields.get("id", "")), message="the daemon is stopping")
            if not self._up.is_set():
                await self._up.wait()
            try:
                return unpack(op, await self._post(op, fds, fields))
            except Lost:
                if not wire.OPERATIONS[op].repeatable:
                    raise Failure(op, path=str(fields.get("id", "")), message="supervisor was replaced") from None

    def _post(self, op: str, fds: Sequence[int], fields: dict[str, Any]) -> asyncio.Future[wire.Message]:
        if self._line is not None:
            return self._line.post(op, fds, fields)
        future: asyncio.Future[wire.Message] = self._loop.create_future()
        future.set_exception(Lost())
        return future

    def _event(self, body: dict[str, Any]) -> None:
        kind = body["event"]
        if kind == "container.exit":
            self._exited(body["id"], _exit_record(body))
        elif kind == "exec.exit":
            self._session_ended(body["id"], body["exit_code"])
        elif kind == "container.oom":
            self.on_oom(body["id"])
        elif kind == "log.error":
            level = logging.INFO if body["errno"] is None else logging.WARNING
            what = "can be written again" if body["errno"] is None else os.strerror(body["errno"])
            log.log(level, "log %s of container %s: %s, %d records lost", body["path"], body["id"], what, body["dropped"])
            self.on_log_error(body["id"], body["errno"], body["dropped"])
        elif kind == "stdio.restarted":
            log.warning("stdio died and was started again as %d", body["pid"])

    def _exited(self, container_id: str, exit: ExitRecord) -> None:
        facts = self._containers.get(container_id)
        if facts is not None:
            if facts.exit is not None:
                return
            facts.exit = exit
        self.on_exit(container_id, exit)

    def _session_ended(self, exec_id: str, code: int) -> None:
        session = self._sessions.pop(exec_id, None)
        if session is None and exec_id in self._starting:
            self._starting[exec_id] = code
        if session is not None:
            os.close(session.pidfd)
            if not session.exited.done():
                session.exited.set_result(code)

    # ---- replacement

    def _take(self, link: client.Link) -> None:
        """Start to use a link, and bring what is known up to date with its hello."""
        self._link = link
        self._line = Line(link.socket, self._event, self._lost)
        for pod in link.hello["pods"]:
            self._pods[pod["id"]] = PodFacts.from_hello(pod)
        for entry in link.hello["containers"]:
            user = codec.from_json(User, entry["user"] or {})
            facts = ContainerFacts(entry["pod"], entry["pid"], entry["starttime"], entry["started_at"], entry["tty"], user)
            known = self._containers.get(entry["id"])
            self._containers[entry["id"]] = facts
            if entry["exit"] is not None:
                facts.exit = _exit_record(entry["exit"])
                if known is not None and known.exit is None:
                    self.on_exit(entry["id"], facts.exit)

    async def _fetch_handles(self) -> None:
        """After our own restart: copies of what a successor of the supervisor would need."""
        for pod_id in list(self._pods):
            with contextlib.suppress(Failure):  # deleted meanwhile
                _, fds = await self._call("pod.handles", id=pod_id)
                _close_all(self._pod_fds.pop(pod_id, {}).values())
                self._pod_fds[pod_id] = fds
        for container_id, facts in list(self._containers.items()):
            if facts.tty and facts.exit is None and container_id not in self._consoles:
                with contextlib.suppress(Failure):
                    _, fds = await self._call("container.handles", id=container_id)
                    if "console" in fds:
                        self._consoles[container_id] = fds["console"]

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()
        link, self._link = self._link, None
        if link is not None:
            self._orphans.reap_supervisor(link.pid, link.pidfd)

    def _lost(self, why: str) -> None:
        """The supervisor is gone: catch what it was the parent of at once, then get another."""
        if self._closed or self._line is None:
            return
        self._up.clear()
        log.warning("supervisor %d is gone (%s), starting another", self.pid, why)
        self._hang_up()
        self._watch_orphans()
        self._background(self._replace())

    def _watch_orphans(self) -> None:
        for pod in self._pods.values():
            if pod.pid:
                self._orphans.watch(pod.pid, pod.starttime)
        for container in self._containers.values():
            if container.pid and container.exit is None:
                self._orphans.watch(container.pid, container.starttime)
        for session in self._sessions.values():
            self._orphans.watch(session.pid, None, pidfd=os.dup(session.pidfd))

    def _background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self) -> None:
        while True:
            try:
                link = await asyncio.to_thread(client.ensure, self._state, self._python, runtime_cgroup=self._runtime_cgroup)
                break
            except (Failure, OSError) as error:
                log.error("no supervisor: %s", error)
                await asyncio.sleep(_PAUSE)
        self._take(link)
        try:
            await self._hand_over()
        except Lost:
            return  # the one that was lost meanwhile is being replaced already
        self._up.set()
        log.warning("supervisor %d has taken over", link.pid)
        self.on_replaced()

    async def _hand_over(self) -> None:
        """Give the successor what it cannot find, and the statuses of processes that ended without a supervisor."""
        requests: list[tuple[str, Sequence[int], dict[str, Any]]] = []
        requests += [("reaped", (), {"pid": pid, "status": status}) for pid, status in self._orphans.statuses.items()]
        for pod_id, fds in self._pod_fds.items():
            requests.append(("pod.adopt", tuple(fds.values()), {"id": pod_id, "names": list(fds)}))
        for container_id, console in self._consoles.items():
            requests.append(("container.console", (console,), {"id": container_id}))
        for session in self._sessions.values():
            fields = {"id": session.id, "container": session.container, "pid": session.pid}
            requests.append(("exec.adopt", (session.pidfd,), fields))
        requests.append(("settle", (), {}))
        answers = [self._post(op, fds, fields) for op, fds, fields in requests]
        for (op, _, fields), answer in zip(requests, answers, strict=True):
            try:
                ok, _ = unpack(op, await answer)
            except Failure as failure:
                log.warning("%s %s: %s", op, fields.get("id", ""), failure)
                continue
            for pod in ok.get("pods", ()):
                self._pods[pod["id"]] = PodFacts.from_hello(pod)
                if not pod["ready"]:
                    log.error("pod %s has lost its namespaces", pod["id"])

    def _orphan_ended(self, pid: int, status: int) -> None:
        """A process whose supervisor died has ended; its status is ours to pass on."""
        for session in list(self._sessions.values()):
            if session.pid == pid:
                self._session_ended(session.id, os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        if self._up.is_set():
            self._background(self._tell_reaped(pid, status))

    async def _tell_reaped(self, pid: int, status: int) -> None:
        await self._call("reaped", pid=pid, status=status)


def _exit_record(fields: dict[str, Any]) -> ExitRecord:
    return ExitRecord(
        fields["exit_code"], fields["finished_at"], fields["oom_killed"], fields["reason"], fields["signal"], fields["message"]
    )


def _close_all(fds: Any) -> None:
    for fd in list(fds):
        os.close(fd)
