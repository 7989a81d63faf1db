"""Upgrade in place: the supervisor becomes a new version of itself, with the same pid and the same children (as systemd's daemon-reexec).

The new version first reads every record as a child, without touching anything: one that cannot leaves this one running. Then nothing
may be in flight, the fds that no record leads to (namespaces of pods, terminals) are written down with their numbers, and execve
replaces the program. What follows is the usual adoption from the records, only that the processes still are our children.
"""

from __future__ import annotations

import json
import os
import select
from dataclasses import dataclass
from typing import Any

from shim.errors import Failure
from shim.linux import libc
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.table import Core

_QUIET = 5.0  # s that work in flight gets to end
_PREFLIGHT = 30.0  # s for the new version to read the records


async def upgrade(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Replace this program by ``argv`` run from the image that comes as fd. Does not return, or raises Failure and changes nothing."""
    argv = [str(word) for word in request.body["argv"]]
    env = {str(key): str(value) for key, value in request.body["env"].items()}
    image = request.take(0)
    await preflight(core, f"/proc/self/fd/{image}", argv, env)
    await _quiet(core)
    pods = {pod.id: pod.fds for pod in core.table.pods.values()}
    consoles = {c.id: c.ends["console"] for c in core.table.containers.values() if "console" in c.ends}
    fds = [core.lock, core.listener, *(fd for named in pods.values() for fd in named.values()), *consoles.values()]
    handed = {"lock": core.lock, "listener": core.listener, "pods": pods, "consoles": consoles}
    memory = libc.sealed_memfd("cri-shim-handed", json.dumps(handed).encode())
    core.log(f"becoming a new version of myself, with {len(core.table.pods)} pods and {len(core.table.containers)} containers")
    for fd in (*fds, memory):
        os.set_inheritable(fd, True)
    try:
        os.execve(f"/proc/self/fd/{image}", [*argv[:-2], with_setting(argv[-2], handed=memory), argv[-1]], env)
    except OSError as error:
        for fd in fds:
            os.set_inheritable(fd, False)
        os.close(memory)
        os.close(image)
        raise Failure.wrap("upgrade", "execve", error) from None


def with_setting(settings: str, **more: object) -> str:
    """The settings, which are JSON, with something added."""
    return json.dumps({**json.loads(settings), **more})


async def preflight(core: Core, image: str, argv: list[str], env: dict[str, str]) -> None:
    """Let the new version read what it would adopt. Raises Failure with what it said."""
    read, write = os.pipe()
    command = [*argv[:-2], with_setting(argv[-2], preflight=True), argv[-1]]
    try:
        pid = os.posix_spawn(image, command, env, file_actions=[(os.POSIX_SPAWN_DUP2, write, 2)], setsigmask=())
    except OSError as error:
        os.close(read)
        raise Failure.wrap("upgrade", "spawn", error) from None
    finally:
        os.close(write)
    process = core.children.watch(pid)
    try:
        if not await core.loop.within(process.ended, _PREFLIGHT):
            process.signal(9)
            raise Failure("upgrade", message=f"the new version has not read the records in {_PREFLIGHT:g} s")
        ended = process.ended.result()
        if ended is None or ended.code != 0:
            raise Failure("upgrade", message=f"the new version cannot take over ({ended}): {_said(read)}")
    finally:
        process.close()
        os.close(read)


def _said(fd: int) -> str:
    if not select.select([fd], [], [], 0)[0]:
        return ""
    return os.read(fd, 4096).decode("utf-8", "replace").strip()[-500:]


async def _quiet(core: Core) -> None:
    """Wait until no launch is in flight. A container that is created and not started has a launcher that waits for us: not to be left."""
    for _ in range(int(_QUIET / 0.05)):
        waiting = [c.id for c in core.table.containers.values() if c.exit is None and not c.started_at]
        if not waiting and not core.children.launches and not core.table.deleting:
            return
        await core.loop.sleep(0.05)
    raise Failure("upgrade", message=f"work is in flight after {_QUIET:g} s: containers {', '.join(waiting) or 'being deleted'}")


@dataclass(frozen=True, slots=True)
class Handed:
    """In the new version: the fds that were written down. The lock was never given up, and who connects meanwhile waits."""

    lock: int
    listener: int
    pods: dict[str, dict[str, int]]
    consoles: dict[str, int]

    @classmethod
    def read(cls, memory: int) -> Handed:
        fields = json.loads(os.pread(memory, os.fstat(memory).st_size, 0))
        os.close(memory)
        found = cls(fields["lock"], fields["listener"], fields["pods"], fields["consoles"])
        for fd in (found.lock, found.listener, *(fd for named in found.pods.values() for fd in named.values()), *found.consoles.values()):
            os.set_inheritable(fd, False)
        return found

    def give(self, core: Core) -> None:
        """To what has been adopted; fds that nobody knows are closed."""
        for pod_id, named in self.pods.items():
            pod = core.table.pods.get(pod_id)
            for name, fd in named.items():
                if pod is None or name in pod.fds:
                    os.close(fd)
                else:
                    pod.fds[name] = fd
            if pod is not None:
                pod.ready = True
        for container_id, fd in self.consoles.items():
            container = core.table.containers.get(container_id)
            if container is None or "console" in container.ends:
                os.close(fd)
            else:
                container.ends["console"] = fd
