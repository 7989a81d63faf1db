"""Operations on containers: create, start, kill, delete, update, resize, reopen its log."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

from shim import cgroups
from shim.errors import Failure
from shim.linux import process as processes
from shim.oci.bundle import ExitRecord
from shim.runtime import create as creating
from shim.runtime import hooks, jobs, pins
from shim.runtime.context import PodHandles
from shim.supervisor import exits, leftovers, listening, ooms
from shim.supervisor.children import Failed, Line, Process
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.table import Container, Core, forget, save

_START = 120.0  # s for startContainer hooks and an execve
_DEATH = 10.0  # s that delete waits for a killed container
_PIPE = 1 << 20  # bytes: the largest that pipe-max-size allows everybody; more output fits while a reader of ours is away
START_ERROR = 128  # exit code of a container whose program could not be run, as containerd reports it


async def create(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Everything up to the program's execve. Fails as a whole: nothing is left of a container that could not be created."""
    body = request.body
    if request.id in core.table.containers:
        raise Failure("create container", errno=errno.EEXIST, path=request.id, message="the container exists")
    pod = core.table.pod(body["pod"]).handles()
    target = core.table.running(body["target"]).process if body.get("target") else None
    bundle = request.take(0)
    container = Container(
        request.id, body["pod"], bundle, os.readlink(f"/proc/self/fd/{bundle}"), body["tty"], body["stdin"], body["stdin_once"],
        body["log_path"], core.loop.future(), launch=core.loop.future()
    )  # fmt: skip
    core.table.containers[request.id] = container
    try:
        open_ends(container)
        logging = None if container.tty else logs.add(container)
        await _launch(core, container, pod, target.pidfd if target else None)
        await _created(core, container)
        await (logs.add(container) if logging is None else logging)
        save(core, bundle, container)
    except BaseException as error:
        await _undo_create(core, logs, container, error)
        raise
    finally:
        if container.launch is not None:
            container.launch.set(None)
    exits.watch(core, logs, container)
    if "console" in container.ends:
        request.lent["console"] = container.ends["console"]  # for a successor of ours
    return {"pid": container.pid, "starttime": container.starttime, "user": container.user}


async def _launch(core: Core, container: Container, pod: PodHandles, target: int | None) -> None:
    """Have somebody create it: a helper, or a child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    container.line = Line(core.loop, ours, "start container", reports=True)
    container.slot = core.children.take_slot()
    job = creating.Container(
        core.context, container.id, container.bundle, container.path, pod, container.slot, theirs.fileno(), target, container.stdin_once
    )
    with theirs:
        container.job = core.children.run(job, "create container")
        if await container.job.died_unasked():
            container.job.close()
            container.job = core.children.fork(job, "create container")


def open_ends(container: Container) -> None:
    """Our ends of the bundle's FIFOs. They stay open here so that what is in them outlives any stdio."""
    flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    if not container.tty:
        for name in ("stdout", "stderr"):
            fd = os.open(name, os.O_RDONLY | flags, dir_fd=container.bundle)
            container.ends[name] = fd
            try:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EBUSY):  # above the user's soft limit: it stays small
                    raise
    if container.stdin:
        try:
            container.ends["stdin"] = os.open("stdin", os.O_RDWR | flags, dir_fd=container.bundle)
        except FileNotFoundError:
            if not container.stdin_once:  # see ``attach.close_stdin``
                raise


async def _created(core: Core, container: Container) -> None:
    """Follow the job to its answer, running host hooks as it asks for them."""
    job = container.job
    assert job is not None
    while (message := await job.message()) is not None and "hooks" in message.body:
        stage, pid = message.body["hooks"], message.body["pid"]
        try:
            await run_hooks(core, container, stage, pid)
        except Failure as failure:
            job.send({"hooks": "failed", "error": failure.to_json()})
        else:
            job.send({"hooks": "ok"})
    if message is None:
        raise Failure("create container", path=container.id, message=f"child died: {await job.process.ended}")
    facts, fds = job.unpack(message)
    if "console" in fds:
        container.ends["console"] = fds.pop("console")
        os.set_blocking(container.ends["console"], False)
    if "report" in fds:
        job.narrow(fds.pop("report"))
    container.group = cgroups.Group.from_json(facts["cgroup"])
    ooms.watch(core, container, [fds[name] for name in sorted(fds)])
    container.user, container.hooks = facts["user"], tuple(facts.get("hooks", ()))
    container.pinned = bool(facts["pinned"])
    if facts["pid"]:
        container.own_pids = True
        container.process, container.slot = core.children.adopt_slot(_slot(container)), None
        container.starttime = processes.starttime(container.pid)
        container.job = None
        core.children.done(job, again=bool(facts["again"]))


def _slot(container: Container) -> int:
    if container.slot is None:
        raise Failure("container", path=container.id, message="has no launch slot")
    return container.slot


async def run_hooks(core: Core, container: Container, stage: str, pid: int) -> None:
    job = hooks.HooksJob(container.bundle, stage, container.id, pid, container.path, core.context.inherited)
    await core.children.call(job, f"{stage} hooks")


async def _undo_create(core: Core, logs: Logs, container: Container, error: BaseException) -> None:
    """Kill and remove what there is of a container whose creation failed."""
    if container.job is not None:
        container.job.process.signal(signal.SIGKILL)
    process = container.process
    if container.slot is not None:
        process, container.slot = core.children.adopt_slot(container.slot), None
    if process is not None:
        process.signal(signal.SIGKILL)
        await core.loop.within(process.ended, _DEATH)
        process.close()
    container.process = None
    group = container.group
    if group is None and isinstance(error, Failed) and error.body.get("cgroup"):
        group = cgroups.Group.from_json(error.body["cgroup"])
    await remove_cgroup(core, group, container.id)
    await _discard(core, logs, container)


async def remove_cgroup(core: Core, group: cgroups.Group | None, name: str) -> None:
    """Remove a group after something else has failed; its own failure is logged, so that the first one is what is reported."""
    if group is None:
        return
    try:
        await core.children.call(jobs.KillAll(group), "kill cgroup")
        await core.children.call(jobs.RemoveCgroup(group), "remove cgroup")
    except Failure as failure:
        core.log(f"container {name}: {failure}")


async def _discard(core: Core, logs: Logs, container: Container) -> None:
    """Let go of everything that is held of it."""
    del core.table.containers[container.id]
    ooms.unwatch(core, container)
    # A log of a container that never ran would be counted as a restart: the kubelet numbers its next attempt by the files it finds.
    removed = logs.ask("remove", container.id, unused=not container.started_at)
    container.close()
    await core.loop.within(removed, 2.0)


async def start(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Let the program run. On a failure the container has exited with ``START_ERROR`` and the reason."""
    container = core.table.container(request.id)
    line = container.line
    if line is None or container.user is None or container.exit is not None or container.starting is not None:
        raise Failure("start container", path=request.id, message="is not in the created state")
    container.starting = core.loop.future()
    try:
        line.send({"start": True})
        error, listener = await listening.launched(line, _START, container.job)
        line.close()
        container.line = None
        if container.job is not None:
            container.job.close()
            container.job = None
        forked = None
        if container.slot is not None:
            forked, container.slot = core.children.adopt_slot(container.slot), None
        if core.table.containers.get(container.id) is not container:
            error = error or Failure("start container", path=request.id, message="was removed meanwhile")
        if error is not None or (forked is None and container.process is None):
            await _start_failed(core, logs, container, error, forked)
        container.process = container.process or forked
        if forked is not None:
            container.starttime = processes.starttime(forked.pid)
        if listener is not None:
            await _listen(core, container, listener, lambda: exits.watch(core, logs, container) if forked else None)
        container.started_at = time.time_ns()
        save(core, container.bundle, container)
    finally:
        container.starting.set(None)
    if forked is not None:
        exits.watch(core, logs, container)
    if core.context.pins is not None and not container.pinned and container.process is not None:
        core.loop.start(_pin(core, core.context.pins, container, container.process))
    if "poststart" in container.hooks:
        core.loop.start(_poststart(core, container))
    return {"pid": container.pid, "starttime": container.starttime, "started_at": container.started_at}


async def _listen(core: Core, container: Container, listener: int, watch: Callable[[], None]) -> None:
    """A container whose profile asks and whose questions nobody would answer is ended; ``watch`` sees to its exit."""
    process = container.process
    assert process is not None
    try:
        await listening.attach(core, container, process, listener, "creating")
    except Failure as failure:
        container.start_error = failure
        process.signal(signal.SIGKILL)
        watch()
        raise


async def _start_failed(core: Core, logs: Logs, container: Container, error: Failure | None, forked: Process | None) -> None:
    if isinstance(error, listening.Reported):
        error = await _explained(core, container, error.report)
    failure = error or Failure("start container", message="child died before the program ran")
    container.start_error = failure
    if forked is not None:
        forked.signal(signal.SIGKILL)  # it may be stopped, by another process of its PID namespace
        await core.loop.within(forked.ended, _DEATH)
        forked.close()
    if container.process is None:
        await exits.record(core, logs, container, ExitRecord(START_ERROR, time.time_ns(), reason="StartError", message=str(failure)))
    raise failure


async def _explained(core: Core, container: Container, report: str) -> Failure:
    """What a report means to a child that may read the specification."""
    try:
        await core.children.call(jobs.Explain(container.bundle, report), "start container")
    except Failure as failure:
        return failure
    return Failure("start container", message=f"report {report}")


async def _pin(core: Core, where: int, container: Container, process: Process) -> None:
    """Without its pin an exit that nobody of ours sees would lose its code, and nothing else."""
    try:
        await core.children.call(pins.Pin(where, container.id, process.pidfd), "pin container")
    except Failure as failure:
        core.log(f"container {container.id}: {failure}")


async def _poststart(core: Core, container: Container) -> None:
    """A poststart hook that fails is only worth a warning (runtime.md#lifecycle)."""
    try:
        await run_hooks(core, container, "poststart", container.pid)
    except Failure as failure:
        core.log(f"container {container.id}: {failure}")


async def kill(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Signal the first process, or with ``all`` SIGKILL everything in the cgroup. Nothing happens to one that has exited."""
    container = core.table.container(request.id)
    if request.body.get("all") and container.group is not None:
        await core.children.call(jobs.KillAll(container.group), "kill container")
    elif container.process is not None:
        container.process.signal(request.body["signal"])
    elif container.job is not None:
        container.job.process.signal(signal.SIGKILL)  # created, with the program still to be forked: nothing of it can handle signals
    return {}


async def delete(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Kill it if it lives, release all it had. Safe to repeat, and for a container that was never known."""
    container = core.table.containers.get(request.id)
    if container is None:
        await leftovers.release(core, "containers", request.id, str(request.body.get("cgroup", "")))
        return {}
    await core.loop.joined(core.table.deleting, container, lambda: _delete(core, logs, container))
    return {}


async def _delete(core: Core, logs: Logs, container: Container) -> None:
    if container.launch is not None and not container.launch.done:
        if container.job is not None:
            container.job.process.signal(signal.SIGKILL)
        await core.loop.within(container.launch, _DEATH)
        if core.table.containers.get(container.id) is not container:
            return
    await _end(core, logs, container)
    if "poststop" in container.hooks:
        try:
            await run_hooks(core, container, "poststop", 0)
        except Failure as failure:
            core.log(f"container {container.id}: {failure}")
    if container.group is not None:
        await core.children.call(jobs.RemoveCgroup(container.group, core.context.pins, container.id), "delete container")
    forget(container.bundle)
    await _discard(core, logs, container)


async def _end(core: Core, logs: Logs, container: Container) -> None:
    """SIGKILL and wait, bounded: a process in D state is reported, not waited for."""
    if container.exit is None and container.process is not None:
        container.process.signal(signal.SIGKILL)
        if not container.own_pids and container.group is not None:
            await core.children.call(jobs.KillAll(container.group), "delete container")
        if not await core.loop.within(container.over, _DEATH):
            if container.group is not None:
                await core.children.call(jobs.KillAll(container.group), "delete container")  # names who is left, and where it waits
            message = f"process {container.pid} is still there {_DEATH:g} s after SIGKILL"
            raise Failure("delete container", path=container.id, message=message)
    elif container.job is not None:
        job = container.job
        job.process.signal(signal.SIGKILL)
        await core.loop.within(job.process.ended, _DEATH)
        if container.starting is not None:
            await core.loop.within(container.starting, _DEATH)  # it kills what has been forked
        if container.group is not None:
            await core.children.call(jobs.KillAll(container.group), "delete container")  # see ``shim.runtime.listener.go_on_in_child``
        if container.slot is not None:
            core.children.release_slot(container.slot)
            container.slot = None


async def update(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    container = core.table.container(request.id)
    if container.group is None:
        raise Failure("update container", path=request.id, message="is being created")
    await core.children.call(jobs.Update(core.context.layout, container.group, request.fds[0]), "update container")
    return {}


async def handles(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Copies of the fds that only we hold and a successor needs: a terminal's master."""
    container = core.table.container(request.id)
    if "console" in container.ends:
        request.lent["console"] = container.ends["console"]
    return {}


async def resize(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    console = core.table.container(request.id).ends.get("console")
    if console is None:
        raise Failure("resize", path=request.id, message="has no terminal")
    set_size(console, request.body["height"], request.body["width"])
    return {}


def set_size(console: int, height: int, width: int) -> None:
    """Raises Failure."""
    if not (0 <= height < 1 << 16 and 0 <= width < 1 << 16):
        raise Failure("resize", message=f"{height}x{width} is no terminal size")
    try:
        fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))
    except OSError as error:
        raise Failure.wrap("resize", "TIOCSWINSZ", error) from error


async def reopen_log(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    container = core.table.container(request.id)
    if container.exit is not None:
        raise Failure("reopen log", path=request.id, message="the container has exited")
    await logs.ask("reopen", container.id)
    return {}
