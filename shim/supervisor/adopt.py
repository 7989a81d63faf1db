"""Taking over what an earlier supervisor left: containers by pid and start time, pods by pins, living containers and the daemon's fds."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Collection
from typing import Any

from shim import cgroups
from shim.cgroups import oom
from shim.errors import Failure
from shim.linux import libc
from shim.linux import process as processes
from shim.oci import bundle as bundles
from shim.oci.bundle import ExitRecord
from shim.runtime import pins, userns
from shim.runtime.channel import Channel
from shim.supervisor import exits, ooms
from shim.supervisor.children import Process
from shim.supervisor.containers import open_ends
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.restore import Restore
from shim.supervisor.table import RECORD, RECORD_VERSION, Container, Core, Pod

_LIMIT = 1 << 20  # bytes of a record
_GROUPS = 8  # per child: two fds each
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def adopt(core: Core, logs: Logs) -> None:
    """Fill the table from the records. A record that cannot be read costs its container, which is logged, and nobody else."""
    for kind, one in (("pods", _pod), ("containers", _container)):
        for name in sorted(_names(core, kind)):
            try:
                one(core, logs, name)
            except (Failure, OSError, ValueError, KeyError, TypeError) as error:
                core.log(f"cannot adopt {kind}/{name}: {type(error).__name__}: {error}")


def has_scopes(core: Core) -> bool:
    """Whether systemd made groups of what was adopted."""
    pods, containers = core.table.pods.values(), core.table.containers.values()
    groups = [*(pod.group for pod in pods), *(container.group for container in containers)]
    return any(group.unit for group in groups if group is not None)


def check(state: str) -> None:
    """Read every record as ``adopt`` would, and change nothing. Raises what is wrong with the first that cannot be used."""
    directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for kind, names in (("pods", ("pid", "starttime", "cgroup", "names")), ("containers", _CONTAINER_FACTS)):
        for name in sorted(os.listdir(f"{state}/{kind}")):
            inside = os.open(f"{kind}/{name}", _DIRECTORY, dir_fd=directory)
            try:
                record = _read(inside)
                missing = [] if record is None else [key for key in names if key not in record]
                if missing:
                    raise Failure("adopt", path=f"{kind}/{name}", message=f"the record has no {', '.join(missing)}")
                if record is not None and record["cgroup"]:
                    cgroups.Group.from_json(record["cgroup"])
                bundles.read_exit(inside)
            finally:
                os.close(inside)


_CONTAINER_FACTS = tuple("pod pid starttime own_pids tty stdin stdin_once log_path user hooks cgroup started_at".split())


async def watch_groups(core: Core) -> None:
    """Open the OOM fds of adopted containers, which takes children: one for several containers."""
    waiting = [c for c in core.table.containers.values() if c.exit is None and c.oom is None and c.group is not None]
    for start in range(0, len(waiting), _GROUPS):
        some = waiting[start : start + _GROUPS]
        job = WatchOom({c.id: c.group for c in some if c.group is not None})
        try:
            _, fds = await core.children.call(job, "watch oom")
        except Failure as failure:
            core.log(str(failure))
            continue
        for container in some:
            ooms.watch(core, container, [fd for name, fd in fds.items() if name.startswith(container.id)])


async def sweep_pins(core: Core) -> None:
    """Drop the pins of containers that were deleted while nobody could do it."""
    if core.context.pins is not None:
        try:
            await core.children.call(pins.Sweep(core.context.pins, frozenset(core.table.containers)), "sweep pins")
        except Failure as failure:
            core.log(str(failure))


async def settle(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """The daemon has handed over all it had: get the namespaces of pods that are still incomplete from elsewhere."""
    for pod in list(core.table.pods.values()):
        if not pod.ready or "mount" not in pod.fds:
            try:
                await _restore(core, pod)
            except Failure as failure:
                core.log(f"pod {pod.id}: {failure}")
    return {"pods": [pod.facts() for pod in core.table.pods.values()]}


class WatchOom:
    """A job that opens groups' OOM fds: names are the container's id and a number. A group that is gone has none."""

    def __init__(self, groups: dict[str, cgroups.Group]) -> None:
        self._groups = groups
        self.keep: Collection[int] = ()

    def __call__(self, channel: Channel) -> None:
        fds: dict[str, int] = {}
        for name, group in self._groups.items():
            try:
                fds.update({f"{name} {i}": fd for i, fd in enumerate(oom.watch(group))})
            except Failure as failure:
                if failure.errno != errno.ENOENT:
                    raise
        channel.send({"ok": {"fds": list(fds)}}, tuple(fds.values()))


def _names(core: Core, kind: str) -> list[str]:
    try:
        fd = os.open(kind, _DIRECTORY, dir_fd=core.state)
    except FileNotFoundError:
        return []
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def _record(core: Core, directory: int) -> dict[str, Any] | None:
    """The adoption record; None where there is none, or one of an earlier boot."""
    record = _read(directory)
    return record if record is not None and record["boot_id"] == core.boot_id else None


def _read(directory: int) -> dict[str, Any] | None:
    """The adoption record, whatever boot it is of. Raises ValueError for one that cannot be used."""
    try:
        fd = os.open(RECORD, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        record: dict[str, Any] = json.loads(os.read(fd, _LIMIT))
    finally:
        os.close(fd)
    if record["version"] != RECORD_VERSION:
        raise ValueError(f"record version {record['version']}")
    return record


def _process(core: Core, record: dict[str, Any]) -> Process | None:
    """The process of a record if it has not been reaped; the pidfd is opened before the start time is compared."""
    pid = record["pid"]
    if not pid:
        return None
    try:
        pidfd = libc.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        same = processes.starttime(pid) == record["starttime"]
    except (FileNotFoundError, ProcessLookupError):
        same = False
    if not same:
        os.close(pidfd)
        return None
    return Process(core.children, pid, pidfd)


def _pod(core: Core, logs: Logs, name: str) -> None:
    directory = os.open(f"pods/{name}", _DIRECTORY, dir_fd=core.state)
    record = _record(core, directory)
    if record is None:
        os.close(directory)
        return
    pod = core.table.pods[name] = Pod(name, directory)
    pod.init, pod.starttime = _process(core, record), record["starttime"]
    pod.group = cgroups.Group.from_json(record["cgroup"]) if record["cgroup"] else None
    if "network" in record["names"]:
        try:
            pod.fds["network"] = os.open(f"netns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=core.state)
        except FileNotFoundError:
            core.log(f"pod {name}: its network namespace is not pinned any more")
    if "user" in record["names"]:
        try:
            pod.fds["user"] = _user_namespace(core, pod)
        except FileNotFoundError:
            core.log(f"pod {name}: its user namespace is not pinned any more")
    if "pid" in record["names"] and pod.init is not None:
        pod.fds["pid"] = os.open(f"{pod.init.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=core.context.proc)


def _user_namespace(core: Core, pod: Pod) -> int:
    """The owner of the pod's network namespace, or with the host's network the one that is pinned."""
    if "network" in pod.fds:
        return userns.owner(pod.fds["network"])
    return os.open(f"userns/{pod.id}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=core.state)


async def _restore(core: Core, pod: Pod) -> None:
    """From the first container that lives long enough to be asked; only if none lives are namespaces made again."""
    living = [c.process for c in core.table.containers.values() if c.pod == pod.id and c.process is not None and c.exit is None]
    fds: dict[str, int] = {}
    for donor in (*living, None):
        job = Restore(core.context, pod.directory, dict(pod.fds), donor.pidfd if donor else None, donor.pid if donor else 0)
        try:
            _, fds = await core.children.call(job, "restore pod")
            break
        except Failure as failure:
            if donor is None or failure.errno not in (errno.ENOENT, errno.ESRCH):  # it has ended, though not been reaped yet
                raise
    for name, fd in fds.items():
        if name in pod.fds:  # the daemon was faster
            os.close(fd)
        else:
            pod.fds[name] = fd
    pod.ready = True


def _container(core: Core, logs: Logs, name: str) -> None:
    bundle = os.open(f"containers/{name}", _DIRECTORY, dir_fd=core.state)
    record = _record(core, bundle)
    if record is None:  # never created, deleted, or of an earlier boot: the daemon deletes what is left
        os.close(bundle)
        return
    container = Container(
        name, record["pod"], bundle, f"{core.state_path}/containers/{name}", record["tty"], record["stdin"], record["stdin_once"],
        record["log_path"], core.loop.future()
    )  # fmt: skip
    container.own_pids, container.user, container.hooks = record["own_pids"], record["user"], tuple(record["hooks"])
    container.group = cgroups.Group.from_json(record["cgroup"]) if record["cgroup"] else None
    container.started_at, container.starttime = record["started_at"], record["starttime"]
    container.kills_before = record.get("kills_before")
    core.table.containers[name] = container
    container.exit = bundles.read_exit(bundle)
    if container.exit is not None:
        container.over.set(None)
        return
    container.process = _process(core, record)
    try:
        open_ends(container)
    except OSError as error:  # its output is lost; its exit need not be
        core.log(f"container {name}: {error}")
    if not container.tty:  # a terminal's other end comes from the daemon, see ``take_console``
        core.loop.start(logs.add_again(container))
    if not container.started_at:
        # Its launcher's channel died with the earlier supervisor: it can never be started.
        container.start_error = Failure("start container", message="its supervisor died before it was started")
    if container.process is None:
        core.loop.start(_gone(core, logs, container, record["pid"]))
        return
    exits.watch(core, logs, container)
    if not container.started_at:
        container.process.signal(signal.SIGKILL)


async def _gone(core: Core, logs: Logs, container: Container, pid: int) -> None:
    """It ended and was reaped while nobody of ours was there. Only the daemon may have its status."""
    finished = time.time_ns()
    ended = await exits.code_from_pin(core, container.id)
    if ended is None:
        ended = await exits.code_from_daemon(core, pid)
    killed = await _was_out_of_memory(core, container)
    if container.start_error is not None:
        exit = ExitRecord(128, finished, reason="StartError", message=str(container.start_error))
    elif ended is not None:
        exit = ExitRecord(ended.code, finished, killed, signal=ended.signal)
    else:
        exit = ExitRecord(255, finished, killed, reason="Unknown", message="ended while no supervisor was there")
    await exits.record(core, logs, container, exit)


async def _was_out_of_memory(core: Core, container: Container) -> bool:
    """By its group's counter, which is there until the container is deleted. systemd has removed a scope by now; if nobody else is in its
    slice, what that has counted since was this container's."""
    if container.group is None:
        return False
    try:
        _, fds = await core.children.call(WatchOom({container.id: container.group}), "watch oom")
        ooms.watch(core, container, list(fds.values()))
        ooms.count(core, container)
        if container.oom is None and container.kills_before is not None and ooms.alone(core, container):
            facts, _ = await core.children.call(KillsAbove(container.group), "watch oom")
            container.oom_kills = max((facts["kills"] or 0) - container.kills_before, 0)
    except Failure as failure:
        core.log(f"container {container.id}: {failure}")
    return container.oom_kills > 0


class KillsAbove:
    """A job: ``{"ok": {"kills": number or None}}``, see ``oom.kills_above``."""

    keep: Collection[int] = ()

    def __init__(self, group: cgroups.Group) -> None:
        self._group = group

    def __call__(self, channel: Channel) -> None:
        channel.send({"ok": {"kills": oom.kills_above(self._group)}})


async def take_console(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """A terminal's master that the daemon kept for us."""
    container = core.table.container(request.id)
    if "console" not in container.ends and container.exit is None:
        container.ends["console"] = request.take(0)
        await logs.add_again(container)
    return {}
