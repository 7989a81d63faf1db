"""Control groups, version 1: the same path in every mounted hierarchy."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

from shim.cgroups import devices, plan
from shim.cgroups import group as files
from shim.cgroups.execute import change, execute
from shim.cgroups.group import Group
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.linux import libc
from shim.oci.spec import DeviceCgroup, Resources


def create(layout: Layout, path: str, resources: Resources) -> Group:
    """Make the group in every hierarchy, also where nothing is limited: an update must find it, and accounting needs it."""
    writes = plan.resources(resources, layout)
    policy = devices.policy(resources.devices) if resources.devices else None
    group = Group(1, path, {controller: mount + path for controller, mount in layout.controllers.items()})
    made: list[str] = []
    try:
        for directory in group.directories:
            files.make(directory, made)
        if "cpuset" in layout.controllers:
            _inherit_cpuset(group.paths["cpuset"])
        execute(group, writes, "create cgroup")
        if policy is not None:
            _restrict_devices(group, policy)
    except BaseException as error:
        files.undo(made, error)
        raise
    return group


def complete(group: Group, layout: Layout, writes: Sequence[plan.Write], policy: devices.Policy | None, made: list[str]) -> None:
    """The same for a group that systemd made in its hierarchies: it is made in the others, which go to ``made``."""
    for directory in group.directories:
        if not os.path.isdir(directory):
            files.make(directory, made)
            if directory == group.paths.get("cpuset"):
                _inherit_cpuset(directory)
    execute(group, writes, "create cgroup")
    if policy is not None:
        _restrict_devices(group, policy, in_use=True)


def _inherit_cpuset(directory: str) -> None:
    """A new cpuset has no CPUs and no memory nodes, and takes no process (ENOSPC) until it is given some."""
    parent = os.path.dirname(directory)
    for name in ("cpuset.cpus", "cpuset.mems"):
        try:
            value = files.read_value(f"{parent}/{name}")
            if not value:
                _inherit_cpuset(parent)  # made by us a moment ago, or by someone who left it unusable
                value = files.read_value(f"{parent}/{name}")
            files.write(f"{directory}/{name}", value)
        except OSError as error:
            raise Failure.wrap("create cgroup", "inherit cpuset", error) from error


def _restrict_devices(group: Group, policy: devices.Policy, *, in_use: bool = False) -> None:
    directory = group.directory("devices")
    if directory is None:
        raise Failure("cgroup", path="devices", message="device rules need the devices controller, and its hierarchy is not mounted")
    present = files.read(f"{directory}/devices.list") if in_use else None
    for file, values in devices.v1_writes(policy, present):
        path = f"{directory}/{file}"
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for value in values:
                os.write(fd, value)
        except OSError as error:
            message = f"rule {value.decode()!r}"
            hint = "the parent group does not allow this device" if error.errno == errno.EPERM else ""
            raise Failure("cgroup", "write", errno=error.errno, path=path, message=message, hint=hint) from error
        finally:
            os.close(fd)


def join(group: Group) -> None:
    """Move the calling process, which must have one thread, into the group.

    "0" in ``tasks`` means the writer itself: the one form for which the kernel does not take the lock that stops every fork and exit
    of the machine for an RCU grace period.
    """
    for directory in group.directories:
        try:
            files.write(f"{directory}/tasks", "0")
        except OSError as error:
            raise Failure.wrap("join cgroup", "write", error) from error
    if group.unified:
        try:
            files.write(f"{group.unified}/cgroup.procs", "0")
        except OSError as error:
            raise Failure.wrap("join cgroup", "write", error) from error


def apply(group: Group, layout: Layout, resources: Resources) -> None:
    """New limits for a group in use. Version 1 itself answers EBUSY to a memory limit that reclaim cannot reach."""
    change(group, plan.resources(resources, layout, update=True))
    if resources.devices:
        set_devices(group, resources.devices)


def set_devices(group: Group, rules: Iterable[DeviceCgroup]) -> None:
    _restrict_devices(group, devices.policy(rules), in_use=True)


# ---- processes


def pids(group: Group) -> list[int]:
    """Processes in the group and below it, by one hierarchy: containers are placed in all of them together."""
    for controller in ("pids", "freezer", "devices"):
        if controller in group.paths:
            return sorted(files.processes(group.paths[controller]))
    return sorted(files.processes(group.directories[0]))


def _all_pids(group: Group) -> set[int]:
    # A privileged process can move itself in one hierarchy; it would have to in all of them to escape this.
    return set().union(*(files.processes(directory) for directory in group.directories))


def kill(group: Group, deadline: float) -> set[int]:
    """SIGKILL for everything in the group until it is empty or ``deadline`` (monotonic) has passed. Returns who is left.

    Once as it is, which is enough for most; then in rounds that stop the group first, so that nothing forks past the signals. A group
    that does not stop in time (a process in D state) is signalled all the same, and thawed at the end, whoever froze it.
    """
    pause = 0.002
    left = _signal_all(group)
    while left:
        left = _until_empty(group, min(deadline, time.monotonic() + pause))
        if not left or time.monotonic() >= deadline:
            break
        _set_frozen(group, True)
        _await_state(group, "FROZEN", 0.02)
        _signal_all(group)
        _set_frozen(group, False)
        pause = min(pause * 2, 0.1)
    return left


def _signal_all(group: Group) -> set[int]:
    members = _all_pids(group)
    for pid in members:
        _kill_member(group, pid)
    return members


def _until_empty(group: Group, deadline: float) -> set[int]:
    while (left := _all_pids(group)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    return left


def _kill_member(group: Group, pid: int) -> None:
    try:
        fd = libc.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError as error:
        if error.errno == errno.EINVAL:  # the thread group's leader is gone: its threads die by a plain kill
            os.kill(pid, signal.SIGKILL)
            return
        raise
    try:
        # The pidfd may be of a process that got this pid after the list was read; a member now is one whatever it was then.
        if any(pid in files.processes(directory) for directory in group.directories):
            libc.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # gone in between, which is what was wanted
    finally:
        os.close(fd)


def freeze(group: Group, deadline: float) -> None:
    """Stop every process of the group; Failure EBUSY if one does not stop by ``deadline`` (monotonic)."""
    if "freezer" not in group.paths:
        raise Failure("freeze cgroup", path=group.path, message="the freezer hierarchy is not mounted")
    _set_frozen(group, True)
    if not _await_state(group, "FROZEN", deadline - time.monotonic()):
        _set_frozen(group, False)
        raise Failure("freeze cgroup", errno=errno.EBUSY, path=group.path, message="a process does not stop")


def thaw(group: Group) -> None:
    """Let the group run again, and every group below it that something froze."""
    _set_frozen(group, False)


def _set_frozen(group: Group, frozen: bool) -> None:
    top = group.paths.get("freezer")
    if top is None:
        return
    for directory in [top] if frozen else files.tree(top):
        try:
            files.write(f"{directory}/freezer.state", "FROZEN" if frozen else "THAWED")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise Failure.wrap("freeze cgroup", "write", error) from error


def _await_state(group: Group, state: str, seconds: float) -> bool:
    top = group.paths.get("freezer")
    deadline = time.monotonic() + seconds
    while top is not None:
        try:
            if files.read(f"{top}/freezer.state").strip() == state:
                return True
        except FileNotFoundError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return False


def remove(group: Group, retry: Callable[[str], None]) -> None:
    """rmdir the group and what is below it in every hierarchy; ``retry`` handles one directory that may be busy for a moment."""
    for directory in group.directories:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError:
            for below in files.tree(directory):
                retry(below)
