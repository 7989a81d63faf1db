"""What the runtime core does with control groups, the same for both versions.

All of it may block (1 to 13 ms for a move on version 2, seconds for a kill): call it in a child of the supervisor, never in it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shim.cgroups import names, v1, v2
from shim.cgroups.group import Group, checked_path
from shim.cgroups.group import read as _read
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci.spec import Resources

KILL_TIMEOUT = 5.0  # seconds that kill waits for the dead to go
BUSY_TIMEOUT = 2.0  # seconds that remove waits for the last exits to be accounted


class _Backend(Protocol):
    """What the modules v1 and v2 both are; the type checker compares."""

    def create(self, layout: Layout, path: str, resources: Resources) -> Group: ...
    def join(self, group: Group) -> None: ...
    def apply(self, group: Group, layout: Layout, resources: Resources) -> None: ...
    def pids(self, group: Group) -> list[int]: ...
    def kill(self, group: Group, deadline: float) -> set[int]: ...
    def freeze(self, group: Group, deadline: float) -> None: ...
    def thaw(self, group: Group) -> None: ...
    def remove(self, group: Group, retry: Callable[[str], None]) -> None: ...


def _backend(version: int) -> _Backend:
    if version == 1:
        return v1
    return v2


class Making(Protocol):
    """A group on its way: with systemd, work that somebody else does meanwhile."""

    @property
    def group(self) -> Group:
        """Where it will be."""
        ...

    def finish(self) -> Group:
        """Wait for it. Nothing is left of it after a Failure. May be repeated."""
        ...

    def release(self) -> None:
        """To be called once a process of the container is in the group, which until then is kept by one that is not."""
        ...


@dataclass(frozen=True, slots=True)
class _Made:
    group: Group

    def finish(self) -> Group:
        return self.group

    def release(self) -> None:
        return


class _Systemd(Protocol):
    """What the module systemd is."""

    def Starting(self, layout: Layout, cgroups_path: str, wanted: Resources) -> Making: ...
    def apply(self, group: Group, layout: Layout, wanted: Resources) -> None: ...
    def remove(self, group: Group, retry: Callable[[str], None], deadline: float) -> None: ...
    def enter(self, layout: Layout, cgroups_path: str) -> None: ...
    def warm(self) -> frozenset[int]: ...


_systemd: _Systemd | None = None


def use_systemd() -> None:
    """Have paths of the form ``slice:prefix:name`` taken as scopes of systemd. Imports what that needs, which is not the standard
    library: to be called before anything forks, with a ``sys.path`` that leads to it."""
    global _systemd
    from shim.cgroups import systemd

    _systemd = systemd


def _scopes(where: str) -> _Systemd:
    if _systemd is None:
        raise Failure("cgroup", path=where, message="this belongs to the systemd driver, and the cgroupfs driver is in use")
    return _systemd


def enter(layout: Layout, cgroups_path: str) -> None:
    """Move this process, which runs on, into a scope of systemd's that is made where it is missing."""
    _scopes(cgroups_path).enter(layout, cgroups_path)


def warm() -> frozenset[int]:
    """Whatever makes the next ``begin`` of this process faster; fds to keep for it."""
    return frozenset() if _systemd is None else _systemd.warm()


def begin(layout: Layout, cgroups_path: str, resources: Resources | None = None) -> Making:
    """``create`` in two steps, between which the caller does what does not need the group."""
    if names.is_scope(cgroups_path):
        return _scopes(cgroups_path).Starting(layout, cgroups_path, resources or Resources())
    return _Made(create(layout, cgroups_path, resources))


def delegate(group: Group, uid: int, gid: int) -> None:
    """Hand the group to root of a user namespace, who may divide it. Nothing on version 1, where that is not safe."""
    if group.version == 2:
        v2.delegate(group, uid, gid)


def create(layout: Layout, cgroups_path: str, resources: Resources | None = None) -> Group:
    """Make the group with its limits and device rules; parents that are missing too. Nothing is left after a Failure.

    A group of that path that holds processes or groups is EEXIST; an empty one is replaced. Resources without device rules leave
    devices to the parent.
    """
    path = checked_path(cgroups_path)
    return _backend(layout.version).create(layout, path, resources or Resources())


def join(group: Group) -> None:
    """Move the calling process, which must have one thread, into the group."""
    _backend(group.version).join(group)


def open_tasks(group: Group) -> list[int]:
    """Version 1: files by which a process that cannot see them joins the group, by writing "0" to each. Nothing on version 2."""
    if group.version != 1:
        return []
    paths = [f"{directory}/tasks" for directory in group.directories]
    if group.unified:
        paths.append(f"{group.unified}/cgroup.procs")
    return [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in paths]


def open_dir(group: Group, member: int | None = None) -> int | None:
    """A directory fd for CLONE_INTO_CGROUP; None on version 1, where the child has to ``join``.

    ``member`` is the container's first process, for an exec session: a container that manages groups itself (systemd or another
    runtime inside) has moved its processes down, and then its own group takes none; the new process goes where that one is.
    """
    return None if group.version == 1 else v2.open_dir(group, member)


def apply(layout: Layout, group: Group, resources: Resources) -> None:
    """New limits for a group in use; what ``resources`` leaves out stays. All or nothing, apart from lists of devices.

    Failure with EBUSY if the group uses more memory than the new limit: nothing is killed.
    """
    if group.unit:
        _scopes(group.unit).apply(group, layout, resources)
    else:
        _backend(group.version).apply(group, layout, resources)


def pids(group: Group) -> list[int]:
    """Processes in the group and below, without zombies; empty for a group that is gone."""
    return _backend(group.version).pids(group)


def kill(group: Group, timeout: float = KILL_TIMEOUT) -> None:
    """SIGKILL everything in the group and below, frozen or not, and wait until it is gone.

    Failure EBUSY naming who is left after ``timeout`` seconds: a process in D state, or one in a group frozen further up.
    """
    left = _backend(group.version).kill(group, time.monotonic() + timeout)
    if left:
        names = ", ".join(_describe(pid) for pid in sorted(left)[:8])
        message = f"{len(left)} not gone {timeout:g} s after SIGKILL: {names}"
        raise Failure("kill cgroup", errno=errno.EBUSY, path=group.path, message=message)


def _describe(pid: int) -> str:
    """``1234 (cat, state D in request_wait_answer)``: what it is and where in the kernel it waits."""
    try:
        name, _, rest = _read(f"/proc/{pid}/stat").rpartition(")")
        where = _read(f"/proc/{pid}/wchan").strip()
    except OSError:
        return f"{pid} (gone by now)"
    # A process chooses its name: it must not end a line, or a log would say what it likes.
    comm = "".join(c if c.isprintable() else "?" for c in name.partition("(")[2])
    return f"{pid} ({comm}, state {rest.split()[0]}" + (f" in {where})" if where not in ("", "0") else ")")


def freeze(group: Group, timeout: float = 2.0) -> None:
    _backend(group.version).freeze(group, time.monotonic() + timeout)


def thaw(group: Group) -> None:
    _backend(group.version).thaw(group)


def remove(group: Group, timeout: float = BUSY_TIMEOUT) -> None:
    """Remove the group and the groups that the container made in it. Already gone is success; parents stay.

    Kills nothing. Failure EBUSY naming the processes if there are any after ``timeout`` seconds; a dead process counts until its exit
    is done, which is shortly after it has been reaped.
    """
    deadline = time.monotonic() + timeout
    if group.unit:
        _scopes(group.unit).remove(group, lambda directory: _rmdir(directory, deadline), deadline)
    else:
        _backend(group.version).remove(group, lambda directory: _rmdir(directory, deadline))


def _rmdir(directory: str, deadline: float) -> None:
    pause = 0.0005
    while True:
        try:
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise _not_removed(directory, error) from error
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _not_removed(directory: str, error: OSError) -> Failure:
    failure = Failure.wrap("remove cgroup", "rmdir", error, directory)
    try:
        members = _read(f"{directory}/cgroup.procs").split()
    except OSError:
        return failure
    if members:
        failure.message = "it holds " + ", ".join(_describe(int(pid)) for pid in members[:8])
    return failure
