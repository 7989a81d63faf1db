"""Exec sessions: the daemon holds their pipes and consoles; here are only their processes."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from shim import cgroups
from shim.errors import Failure
from shim.runtime import jobs
from shim.runtime.exec import Exec
from shim.supervisor import exits
from shim.supervisor.children import Job, Process
from shim.supervisor.containers import set_size
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.spare import order
from shim.supervisor.table import Container, Core, Session

_STREAMS = ("stdin", "stdout", "stderr")


async def start(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Run a process. The answer comes when its execve has succeeded and carries its pidfd and, for a terminal, the console."""
    container = core.table.running(request.body["container"])
    process, group = container.process, container.group
    if process is None or group is None or request.id in core.table.sessions:
        raise Failure("exec", path=request.id, message="the session exists")
    names = request.body["fds"]
    if len(names) != len(request.fds) or names[:1] != ["payload"] or not set(names[1:]) <= set(_STREAMS):
        raise Failure("exec", path="fds", message="does not name the fds")
    given = dict(zip(names, request.fds, strict=True))
    slot = core.children.take_slot()
    job: Job | None = None
    fds: dict[str, int] = {}
    try:
        launch = Launch(core, container, group, {"init": process.pidfd, "bundle": container.bundle, **given}, slot)
        job = launch.spare() or launch.fork()
        first = await job.message()
        if first is None and launch.used_spare:  # somebody killed it before it had its orders
            job.close()
            job = launch.fork()
            first = await job.message()
        _, fds = job.unpack(first) if first is not None else await job.answer()
        message = await job.message()
        forked = core.children.adopt_slot(slot)
        slot = -1
        if message is not None or forked is None:
            await _failed(core, message.body if message else {}, forked)
        assert forked is not None
    except BaseException:
        exits.close_all(list(fds.values()))
        raise
    finally:
        if job is not None:
            job.close()
        if slot >= 0:
            core.children.release_slot(slot)
    session = Session(request.id, container, forked, fds.get("console"))
    core.table.sessions[session.id] = session
    forked.ended.then(lambda: core.loop.start(_ended(core, session)))
    request.lent["pidfd"] = forked.pidfd
    if session.console is not None:
        request.lent["console"] = session.console
    return {"pid": forked.pid}


@dataclass(slots=True)
class Launch:
    """The ways to a child that becomes the session's process."""

    core: Core
    container: Container
    group: cgroups.Group
    fds: dict[str, int]
    slot: int
    used_spare: bool = False

    def spare(self) -> Job | None:
        """One that is ready, if any. Not with cgroup v2: a child born in the container's cgroup saves a move, which is slow there."""
        if self.group.version == 2:
            return None
        job = self.core.spares.take(self.group, self.slot, self.fds)
        self.used_spare = job is not None
        return job

    def fork(self) -> Job:
        if self.group.version == 2:
            if self.container.group_fd is None:
                self.container.group_fd = cgroups.open_dir(self.group)
            try:
                return self.core.children.run(self._order(born=True), "exec", self.container.group_fd)
            except Failure as failure:
                if failure.errno not in (errno.EBUSY, errno.EOPNOTSUPP):  # a container that made domains of its own below
                    raise
        return self.core.children.run(self._order(born=False), "exec")

    def _order(self, *, born: bool) -> Exec:
        return order(self.core.context, self.group, self.slot, self.fds, in_cgroup=born)


async def _failed(core: Core, body: dict[str, Any], forked: Process | None) -> None:
    if forked is not None:
        await core.loop.within(forked.ended, 2.0)
        forked.close()
    raise Failure.from_json(body.get("error", {"phase": "exec", "message": "child died before the program ran"}))


async def _ended(core: Core, session: Session) -> None:
    ended = session.process.ended.result()
    if ended is None:
        ended = await exits.code_of_adopted(core, session.process)
    core.table.sessions.pop(session.id, None)
    if ended is not None:  # otherwise the daemon, which holds the pidfd too, finds out
        core.publish({"event": "exec.exit", "id": session.id, "exit_code": ended.code, "signal": ended.signal})
    session.process.close()
    if session.console is not None:
        os.close(session.console)


async def adopt(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """A session that an earlier supervisor started, by its pidfd: it can be killed again. Its exit is the daemon's to reap."""
    container = core.table.container(request.body["container"])
    if request.id in core.table.sessions:
        return {}
    process = Process(core.children, request.body["pid"], request.take(0))
    session = core.table.sessions[request.id] = Session(request.id, container, process)
    process.ended.then(lambda: core.loop.start(_ended(core, session)))
    return {}


async def kill(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Signal the process, or with ``tree`` also what came of it and nothing else of the container. One that has ended is fine."""
    session = core.table.sessions.get(request.id)
    if session is None:
        return {}
    process, group, number = session.process, session.container.group, request.body["signal"]
    if request.body["tree"] and group is not None:
        await core.children.call(jobs.KillTree(group, process.pidfd, process.pid, number), "kill exec")
    else:
        process.signal(number)
    return {}


async def resize(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    console = core.table.session(request.id).console
    if console is None:
        raise Failure("resize", path=request.id, message="has no terminal")
    set_size(console, request.body["height"], request.body["width"])
    return {}
