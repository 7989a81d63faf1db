"""Exec sessions: the daemon holds their pipes and consoles; here are only their processes."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

from shim import cgroups, wire
from shim.errors import Failure
from shim.runtime import agent, jobs
from shim.runtime.exec import Exec
from shim.runtime.program import REPORT
from shim.supervisor import exits, listening
from shim.supervisor.children import Job, Process, end_of_life, not_started
from shim.supervisor.containers import set_size
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.table import Container, Core, Session

_STREAMS = ("stdin", "stdout", "stderr")
PATIENCE = 20.0  # s for a program to be executed, after which its process is killed


async def start(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Run a process. The answer comes when its execve has succeeded and carries its pidfd and, for a terminal, the console.

    The first fd is a ``block`` with the facts beside it, for the agent, or a ``payload`` with the whole process. With ``until`` (seconds of
    CLOCK_MONOTONIC) an order that is read later is refused: on a node that has too much to do, running what nobody waits for any more
    would make everything behind it late, too, and no probe would ever be in time.
    """
    until = request.body.get("until")
    if until is not None and time.monotonic() >= until:
        raise Failure("exec", errno=errno.ETIMEDOUT, path=request.id, message="its time was over before it began")
    container = core.table.running(request.body["container"])
    if container.process is None or container.group is None or request.id in core.table.sessions:
        raise Failure("exec", path=request.id, message="the session exists")
    names = request.body["fds"]
    if len(names) != len(request.fds) or names[:1] not in (["payload"], ["block"]) or not set(names[1:]) <= set(_STREAMS):
        raise Failure("exec", path="fds", message="does not name the fds")
    given = dict(zip(names, request.fds, strict=True))
    console: int | None = None
    if "block" in given:
        forked = await _by_agent(core, container, container.process, str(request.body.get("facts", "")), given)
    else:
        forked, console = await _by_fork(core, container, container.group, container.process, given)
    session = Session(request.id, container, forked, console)
    core.table.sessions[session.id] = session
    forked.ended.then(lambda: core.loop.start(_ended(core, session)))
    request.lent["pidfd"] = forked.pidfd
    if console is not None:
        request.lent["console"] = console
    return {"pid": forked.pid}


async def _by_agent(core: Core, container: Container, init: Process, facts: str, given: dict[str, int]) -> Process:
    """The short way: see ``shim.runtime.agent``."""
    streams = {name: fd for name, fd in given.items() if name != "block"}
    program = core.agents.program(container, facts, streams) if core.agents.usable else None
    if program is None:
        raise Failure("exec", wire.LONG_WAY, message="a session of this kind takes the long way")
    launch = core.agents.spawn(program, given["block"], init.pidfd, streams)
    try:
        over = await end_of_life(core.loop, launch.life, PATIENCE)
        report = os.pread(launch.report, 2 * REPORT.size, 0)
        forked = core.children.adopt_launch(launch)
    finally:
        core.agents.forget(launch)
        core.loop.call_soon(core.children.reap_strays)  # what had to wait for us to take the pid
    if over and not report and forked is not None:
        return forked
    if forked is not None:
        await put_down(core, forked)
    if not over:
        raise not_started("exec")
    if not report:
        raise Failure("exec", message="the process died before its program ran")
    if agent.needs_the_long_way(report):
        raise Failure("exec", wire.LONG_WAY, message=str(agent.failure(report, program.process)))
    raise agent.failure(report, program.process)


async def put_down(core: Core, forked: Process) -> None:
    """End a process whose program did not start: it may be stopped, by another one of the container."""
    forked.signal(signal.SIGKILL)
    await core.loop.within(forked.ended, 2.0)
    forked.close()


async def _by_fork(
    core: Core, container: Container, group: cgroups.Group, init: Process, given: dict[str, int]
) -> tuple[Process, int | None]:
    """The long way, for terminals and whatever else cannot be planned: a child of ours does it. Returns the console too."""
    slot = core.children.take_slot()
    job: Job | None = None
    fds: dict[str, int] = {}
    try:
        job = _fork(core, container, group, init, given, slot)
        _, fds = await job.answer()
        if "report" in fds:
            job.narrow(fds.pop("report"))
        error, listener = await listening.launched(job, PATIENCE, job)
        forked = core.children.adopt_slot(slot)
        slot = -1
        if error is not None or forked is None:
            await _failed(core, error, forked)
        assert forked is not None
        if listener is not None:
            await _listen(core, container, forked, listener)
    except BaseException:
        exits.close_all(list(fds.values()))
        raise
    finally:
        if job is not None:
            job.close()
        if slot >= 0:
            core.children.release_slot(slot)
    return forked, fds.get("console")


def _fork(core: Core, container: Container, group: cgroups.Group, init: Process, given: dict[str, int], slot: int) -> Job:
    streams = (given.get("stdin"), given.get("stdout"), given.get("stderr"))

    def order(*, born: bool) -> Exec:
        return Exec(core.context, group, init.pidfd, container.bundle, given["payload"], slot, *streams, in_cgroup=born)

    if group.version == 2:
        if container.group_fd is None:
            container.group_fd = cgroups.open_dir(group)
        try:
            return core.children.run(order(born=True), "exec", container.group_fd)
        except Failure as failure:
            if failure.errno not in (errno.EBUSY, errno.EOPNOTSUPP):  # a container that made domains of its own below
                raise
    return core.children.run(order(born=False), "exec")


async def _listen(core: Core, container: Container, forked: Process, listener: int) -> None:
    """A process whose profile asks and whose questions nobody would answer is ended."""
    try:
        await listening.attach(core, container, forked, listener, "running")
    except Failure:
        await put_down(core, forked)
        raise


async def _failed(core: Core, error: Failure | None, forked: Process | None) -> None:
    if forked is not None:
        await put_down(core, forked)
    raise error or Failure("exec", message="child died before the program ran")


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
