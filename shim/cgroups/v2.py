"""Control groups, version 2: one directory, its controllers switched on from the root down."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from shim.cgroups import bpf, devices, plan
from shim.cgroups import group as files
from shim.cgroups.execute import change, execute
from shim.cgroups.group import Group
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci.spec import DeviceCgroup, Resources


def create(layout: Layout, path: str, resources: Resources) -> Group:
    """Make the group with every controller the machine has, so that an update and the statistics find them."""
    writes = plan.resources(resources, layout)
    policy = devices.policy(resources.devices) if resources.devices else None
    directory = layout.root + path
    made: list[str] = []
    try:
        files.make(directory, made)
        group = Group(2, path, {"": directory})
        complete(group, layout, writes)
        if policy is not None:
            bpf.attach(directory, policy)
    except BaseException as error:
        files.undo(made, error)
        raise
    return group


def complete(group: Group, layout: Layout, writes: Sequence[plan.Write]) -> None:
    """Controllers and limits of a group that exists."""
    _require(layout, group.path, group.paths[""], {write.controller for write in writes if not write.optional})
    execute(group, writes, "create cgroup")


def delegate(group: Group, uid: int, gid: int) -> None:
    """Let this user, root of a user namespace, make groups below and move its processes among them: the files that the kernel names for
    that, and none with a limit in it."""
    directory = group.paths[""]
    try:
        names = files.read("/sys/kernel/cgroup/delegate").split()
        os.chown(directory, uid, gid)
        for name in names:
            try:
                os.chown(f"{directory}/{name}", uid, gid, follow_symlinks=False)
            except FileNotFoundError:
                continue  # of a controller that is not on here
    except OSError as error:
        raise Failure.wrap("create cgroup", "delegate", error, directory) from error


# ---- controllers


def _require(layout: Layout, path: str, directory: str, needed: set[str]) -> None:
    """Switch on what the machine has in every ancestor. Failure only if a controller that a limit needs could not be."""
    wanted = set(layout.controllers)
    if wanted <= _names(f"{directory}/cgroup.controllers"):
        return
    refused: dict[str, tuple[str, OSError]] = {}
    ancestor = layout.root
    for part in path.strip("/").split("/"):
        for controller, error in _switch_on(ancestor, wanted).items():
            refused.setdefault(controller, (ancestor, error))
        ancestor = f"{ancestor}/{part}"
    present = _names(f"{directory}/cgroup.controllers")
    kind = files.read(f"{directory}/cgroup.type").strip()
    if kind != "domain":
        raise Failure(
            "create cgroup",
            path=directory,
            message=f"it is {kind!r}: an ancestor is threaded, and a container needs a domain of its own",
            hint="use a parent whose cgroup.type is domain, outside the threaded subtree",
        )
    for controller in sorted(needed - present - {"cgroup"}):
        raise _unavailable(controller, directory, refused.get(controller))


def _switch_on(ancestor: str, wanted: set[str]) -> dict[str, OSError]:
    file = f"{ancestor}/cgroup.subtree_control"
    missing = sorted((wanted & _names(f"{ancestor}/cgroup.controllers")) - _names(file))
    if not missing:
        return {}
    try:
        files.write(file, " ".join(f"+{name}" for name in missing))
        return {}
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EOPNOTSUPP):
            # True of the group, not of one controller. Some alone would be taken even so, and turn it into a threaded domain.
            return dict.fromkeys(missing, error)
        refused = {}
        for name in missing:  # one that is refused must not keep the others away
            try:
                files.write(file, f"+{name}")
            except OSError as error:
                refused[name] = error
        return refused


def _names(file: str) -> set[str]:
    try:
        return set(files.read_value(file).split())
    except OSError as error:
        raise Failure.wrap("create cgroup", "read", error) from error


def _unavailable(controller: str, directory: str, refusal: tuple[str, OSError] | None) -> Failure:
    if refusal is None:
        return Failure("create cgroup", path=directory, message=f"the {controller} controller is not delegated to this group")
    ancestor, error = refusal
    where = f"{ancestor}/cgroup.subtree_control"
    if error.errno == errno.EBUSY:
        members = " ".join(files.read(f"{ancestor}/cgroup.procs").split()[:8])
        return Failure(
            "create cgroup",
            f"enable {controller}",
            errno=errno.EBUSY,
            path=where,
            message=f"{ancestor} holds processes itself ({members}), and such a group cannot limit children (no internal processes)",
            hint="move those processes into a child group, or use another parent",
        )
    return Failure("create cgroup", f"enable {controller}", errno=error.errno, path=where)


# ---- processes


def open_dir(group: Group, member: int | None) -> int:
    """For CLONE_INTO_CGROUP: the child is born in the group, without the lock that moving a process takes."""
    directory = group.paths[""]
    try:
        if member is not None and files.read_value(f"{directory}/cgroup.subtree_control"):
            directory = _directory_of(member, group)
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure.wrap("join cgroup", "open", error, directory) from error


def _directory_of(pid: int, group: Group) -> str:
    """Where inside the group a process is; the group's own directory if it is somewhere else."""
    top = group.paths[""]
    for line in files.read(f"/proc/{pid}/cgroup").splitlines():
        path = line.removeprefix("0::")
        if path.startswith(f"{group.path}/") and ".." not in path.split("/"):
            return top + path.removeprefix(group.path)
    return top


def join(group: Group) -> None:
    """Move the calling process into the group. Takes milliseconds (a lock against every fork and exit); prefer ``open_dir``."""
    try:
        files.write(f"{group.paths['']}/cgroup.procs", "0")
    except OSError as error:
        raise _not_joined(group, error) from error


def _not_joined(group: Group, error: OSError) -> Failure:
    failure = Failure.wrap("join cgroup", "write", error)
    if error.errno == errno.EBUSY:
        failure.message = "the group has children with controllers, and then holds no processes itself (no internal processes)"
    elif error.errno == errno.EOPNOTSUPP:
        failure.message = "the group is threaded or below a threaded one, and takes no processes"
    return failure


def pids(group: Group) -> list[int]:
    return sorted(files.processes(group.paths[""]))


def kill(group: Group, deadline: float) -> set[int]:
    """cgroup.kill reaches everything below at once, forks and frozen processes included. Returns who is left at ``deadline``."""
    try:
        files.write(f"{group.paths['']}/cgroup.kill", "1")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # gone, perhaps just now
            return set()
        raise Failure.wrap("kill cgroup", "write", error) from error
    pause = 0.0005
    while (left := files.processes(group.paths[""])) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return left


def freeze(group: Group, deadline: float) -> None:
    """Stop every process of the group; Failure EBUSY if one does not stop by ``deadline`` (monotonic)."""
    _set_frozen(group, True)
    while "frozen 1" not in _events(group):
        if time.monotonic() >= deadline:
            _set_frozen(group, False)
            raise Failure("freeze cgroup", errno=errno.EBUSY, path=group.paths[""], message="a process does not stop")
        time.sleep(0.001)


def thaw(group: Group) -> None:
    """Let the group run again, and every group below it that something froze."""
    _set_frozen(group, False)


def _events(group: Group) -> list[str]:
    return files.read(f"{group.paths['']}/cgroup.events").splitlines()


def _set_frozen(group: Group, frozen: bool) -> None:
    top = group.paths[""]
    for directory in [top] if frozen else files.tree(top):
        try:
            files.write(f"{directory}/cgroup.freeze", str(int(frozen)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise Failure.wrap("freeze cgroup", "write", error) from error


# ---- update


def apply(group: Group, layout: Layout, resources: Resources) -> None:
    """New limits for a group in use. Lowering memory.max below what is in use would have the kernel kill: refused with EBUSY."""
    resources = _keep_quota(group, resources)
    writes = plan.resources(resources, layout, update=True)
    for write in writes:
        if write.file == "memory.max" and write.value != "max":
            _make_room(group, int(write.value))
    change(group, writes)
    if resources.devices:
        set_devices(group, resources.devices)


def _keep_quota(group: Group, resources: Resources) -> Resources:
    """A period alone changes the period: cpu.max takes both in one line, so the quota that is there goes with it."""
    cpu = resources.cpu
    if cpu is None or not cpu.period or cpu.quota:
        return resources
    try:
        quota = files.read(f"{group.paths['']}/cpu.max").split()[0]
    except OSError as error:
        raise Failure.wrap("update cgroup", "read", error) from error
    return replace(resources, cpu=replace(cpu, quota=-1 if quota == "max" else int(quota)))


def _make_room(group: Group, limit: int) -> None:
    """As version 1 does by itself: reclaim first, then refuse if that was not enough. What the group allocates between this look and
    the write it would have allocated beyond its new limit anyway."""
    top = group.paths[""]
    try:
        excess = int(files.read(f"{top}/memory.current")) - limit
        if excess <= 0:
            return
        try:
            files.write(f"{top}/memory.reclaim", str(excess))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOENT):  # could not reclaim so much; before Linux 5.19 there is no such file
                raise
        usage = int(files.read(f"{top}/memory.current"))
    except OSError as error:
        raise Failure.wrap("update cgroup", "make room", error) from error
    if usage > limit:
        raise Failure(
            "update cgroup",
            "write",
            errno=errno.EBUSY,
            path=f"{top}/memory.max",
            message=f"{usage} bytes are in use, more than the new limit of {limit}",
            hint="nothing was changed or killed",
        )


def set_devices(group: Group, rules: Iterable[DeviceCgroup]) -> None:
    bpf.attach(group.paths[""], devices.policy(rules), in_use=True)


def remove(group: Group, retry: Callable[[str], None]) -> None:
    """rmdir the group and what is below it; ``retry`` handles one directory that may be busy for a moment."""
    try:
        os.rmdir(group.paths[""])
    except FileNotFoundError:
        return
    except OSError:
        for below in files.tree(group.paths[""]):
            retry(below)
