"""From a pidfd that became readable to an exit record, in the order that readers rely on.

OOM counters, then the rest of the output into the log (bounded), then ``exit.json``, then the event: a container that reads as exited
has its whole log.
"""

from __future__ import annotations

import os
import time

from shim.errors import Failure
from shim.linux import libc
from shim.oci import bundle as bundles
from shim.oci.bundle import ExitRecord
from shim.runtime import jobs, pins
from shim.supervisor import ooms
from shim.supervisor.children import Ended, Process
from shim.supervisor.logs import Logs
from shim.supervisor.loop import Future
from shim.supervisor.table import Container, Core

DRAIN = 2.0  # s for the rest of the output to reach the log
_CODE = 2.0  # s for whoever became the parent to reap an adopted process
_UNKNOWN = 255
SECCOMP_KILLED = "seccomp killed"  # reason, as CRI-O has it


def watch(core: Core, logs: Logs, container: Container) -> None:
    """Run the exit once the container's process has ended. One whose process is forked at start is represented by its job until then."""
    process, job = container.process, container.job
    if process is not None:
        process.ended.then(lambda: core.loop.start(_exited(core, logs, container, process)))
    elif job is not None:
        job.process.ended.then(lambda: core.loop.start(_never_started(core, logs, container, job.process)))


async def _never_started(core: Core, logs: Logs, container: Container, process: Process) -> None:
    if container.starting is not None or container.exit is not None:
        return
    ended = process.ended.result() or Ended(_UNKNOWN)
    await record(core, logs, container, ExitRecord(ended.code, time.time_ns(), signal=ended.signal))


async def _exited(core: Core, logs: Logs, container: Container, process: Process) -> None:
    finished = time.time_ns()
    ended = process.ended.result()
    if container.starting is not None:
        await container.starting  # its answer comes before the event
    reason = message = ""
    if ended is None:
        ended = await code_of_adopted(core, process)
    if ended is None:
        ended, reason, message = Ended(_UNKNOWN), "Unknown", "the exit code went to a process that is gone"
    if container.start_error is not None:
        ended, reason, message = Ended(128), "StartError", str(container.start_error)
    if not reason and (refusals := _refusals(core, container)):
        reason, message = SECCOMP_KILLED, refusals
    ooms.count(core, container)
    if not container.own_pids and container.group is not None:
        try:  # what it had started goes with it, as in a PID namespace of its own
            await core.children.call(jobs.KillAll(container.group), "end container")
        except Failure as failure:
            core.log(f"container {container.id}: {failure}")
    oom_killed = container.oom_kills > 0
    await record(core, logs, container, ExitRecord(ended.code, finished, oom_killed, reason, ended.signal, message))


def _refusals(core: Core, container: Container) -> str:
    """What a container was ended for by ``shim.runtime.notifier``, if it was."""
    try:
        refusals = bundles.read_refusals(container.bundle)
    except (Failure, ValueError) as error:
        core.log(f"container {container.id}: {error}")
        return ""
    return f"Used forbidden syscalls: {refusals}" if refusals is not None and refusals.stopped else ""


async def record(core: Core, logs: Logs, container: Container, exit: ExitRecord) -> None:
    """Drain, write, report."""
    draining: Future[dict[str, object]] = logs.ask("drain", container.id)
    if not await core.loop.within(draining, DRAIN):
        core.log(f"container {container.id}: its last output was not written within {DRAIN:g} s")
    container.exit = exit
    try:
        bundles.write_exit(container.bundle, exit)
    except (Failure, OSError) as error:
        core.log(f"container {container.id}: {error}")  # the event still tells the daemon, which keeps a record of its own
    core.publish({"event": "container.exit", "id": container.id, **exit_fields(exit)})
    container.over.set(None)


def exit_fields(exit: ExitRecord) -> dict[str, object]:
    return {
        "exit_code": exit.exit_code,
        "finished_at": exit.finished_at,
        "oom_killed": exit.oom_killed,
        "reason": exit.reason,
        "signal": exit.signal,
        "message": exit.message,
    }


class Codes:
    """Wait statuses that the daemon reaped for us (``container.reaped``), until the exit that wants them comes along."""

    def __init__(self) -> None:
        self.waiting: dict[int, Future[Ended]] = {}
        self.early: dict[int, Ended] = {}


CODES = Codes()


def reaped(pid: int, status: int) -> None:
    future = CODES.waiting.get(pid)
    if future is not None:
        future.set(Ended.from_status(status))
    else:
        CODES.early[pid] = Ended.from_status(status)


async def code_of_adopted(core: Core, process: Process) -> Ended | None:
    """How an adopted process ended: its new parent tells us, or the kernel does once that parent has reaped it (Linux 6.15)."""
    return await _code(core, process.pid, process)


async def code_from_daemon(core: Core, pid: int) -> Ended | None:
    """The same for a process that was reaped before anybody had a pidfd of it."""
    return await _code(core, pid, None)


async def code_from_pin(core: Core, name: str) -> Ended | None:
    """The same by the pidfd that was pinned when the container was created."""
    if core.context.pins is None:
        return None
    try:
        facts, _ = await core.children.call(pins.Status(core.context.pins, name), "read pin")
    except Failure as failure:
        core.log(f"container {name}: {failure}")
        return None
    return None if facts["status"] is None else Ended.from_status(facts["status"])


async def _code(core: Core, pid: int, process: Process | None) -> Ended | None:
    if pid in CODES.early:
        return CODES.early.pop(pid)
    future: Future[Ended] = CODES.waiting.setdefault(pid, core.loop.future())
    deadline, pause = time.monotonic() + _CODE, 0.002
    try:
        while time.monotonic() < deadline:
            status = libc.pidfd_info_exit(process.pidfd) if process is not None and process.pidfd >= 0 else None
            if status is not None:
                return Ended.from_status(status)
            if await core.loop.within(future, pause):
                return future.result()
            pause = min(pause * 2, 0.1)
        return None
    finally:
        CODES.waiting.pop(pid, None)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
