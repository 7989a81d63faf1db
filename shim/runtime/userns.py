"""The two sides of a pod's user namespace: making it from outside, and becoming its root.

Namespaces made inside it (network, IPC, UTS, PID) belong to it, which decides whether sysfs, mqueue and proc may be mounted by the pod's
containers. A process that joins it has every capability in it and none outside: whatever needs the host is done before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Collection, Iterable

from shim.errors import Failure
from shim.linux import libc, mount, process
from shim.oci.spec import Linux, NamespaceType
from shim.rootfs import idmap
from shim.rootfs.plan import Mappings

FILES = {NamespaceType.NETWORK: "net", NamespaceType.IPC: "ipc", NamespaceType.UTS: "uts", NamespaceType.USER: "user"}
FLAGS = {NamespaceType.NETWORK: libc.CLONE_NEWNET, NamespaceType.IPC: libc.CLONE_NEWIPC, NamespaceType.UTS: libc.CLONE_NEWUTS}
_NS_GET_USERNS = 0xB701


def new(proc: int, mappings: Mappings, kinds: Collection[NamespaceType]) -> dict[str, int]:
    """Fds of a new user namespace and of those of ``kinds`` that can live without a process, made inside it. ``proc``: a procfs root."""
    hold, release = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = clone(_flags(kinds), mappings, pidfd=True)
    if pid == 0:
        _wait_and_exit(release, hold)
    try:
        idmap.write_maps(proc, pid, mappings)
        return opened(proc, pid, {*kinds, NamespaceType.USER})
    finally:
        _end(release, hold, pidfd)


def clone(
    flags: int,
    mappings: Mappings,
    *,
    exit_signal: int = signal.SIGCHLD,
    pidfd: bool = False,
    cgroup: int | None = None,
    parent_tid_address: int = 0,
) -> tuple[int, int]:
    """``libc.clone3`` into a new user namespace, whose maps are still to be written. What comes into being with it (the IPC namespace's
    mqueue) belongs to its root: that is who this process is to file systems meanwhile."""
    try:
        libc.setfsids(*idmap.root_ids(mappings))
        return libc.clone3(
            libc.CLONE_NEWUSER | flags, exit_signal=exit_signal, pidfd=pidfd, cgroup=cgroup, parent_tid_address=parent_tid_address
        )
    except OSError as error:
        hint = "is user.max_user_namespaces high enough?" if error.errno in (errno.ENOSPC, errno.EUSERS) else ""
        raise Failure("user namespace", "clone3", errno=error.errno, hint=hint) from None
    finally:
        libc.setfsids(0, 0)


def further(proc: int, user: int, kinds: Collection[NamespaceType]) -> dict[str, int]:
    """Fds of new namespaces that belong to the user namespace ``user``."""
    hold, release = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        try:
            libc.setns(user, libc.CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            libc.unshare(_flags(kinds))
            os.write(told, b"r")
        finally:
            _wait_and_exit(release, hold)
    os.close(told)
    try:
        if os.read(ready, 1) != b"r":
            raise Failure("user namespace", "unshare", message="the namespaces of the pod cannot be made again in its user namespace")
        return opened(proc, pid, kinds)
    finally:
        os.close(ready)
        _end(release, hold, pidfd)


def opened(proc: int, pid: int, kinds: Iterable[NamespaceType]) -> dict[str, int]:
    """The namespaces of a process, by type."""
    wanted = ((kind.value, FILES[kind]) for kind in kinds if kind in FILES)
    return {name: os.open(f"{pid}/ns/{file}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc) for name, file in wanted}


def owner(namespace: int) -> int:
    """An fd of the user namespace that owns ``namespace``."""
    return fcntl.ioctl(namespace, _NS_GET_USERNS)


def show(procfs: int) -> None:
    """In the pod's own mount namespace: a procfs (given) and a sysfs. Containers mount theirs in a copy of that namespace, and the kernel
    allows it in a user namespace only where one can be seen. Nothing ever runs there, and they go when the root changes."""
    mount.attach(procfs, "/proc")
    mount.attach(mount.new_filesystem("sysfs", {"source": "sysfs"}), "/sys")


def become_root() -> None:
    """In a user namespace that this process has just joined: take the ids of its root, and a session keyring that belongs to it."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    process.new_session_keyring()


def root_of(linux: Linux) -> tuple[int, int] | None:
    """The host's ids of the container's root; None without a user namespace."""
    if not linux.uid_mappings:
        return None
    return idmap.root_ids((linux.uid_mappings, linux.gid_mappings))


def _flags(kinds: Iterable[NamespaceType]) -> int:
    return sum(FLAGS[kind] for kind in kinds if kind in FLAGS)


def _wait_and_exit(release: int, hold: int) -> None:
    """What a child does whose namespaces are wanted, not itself."""
    try:
        os.close(release)
        os.read(hold, 1)
    finally:
        os._exit(0)


def _end(release: int, hold: int, pidfd: int) -> None:
    os.close(release)
    os.close(hold)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
