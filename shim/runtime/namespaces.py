"""Joining and making namespaces: by fd from the pod, by fd of a target container, by path, or new."""

from __future__ import annotations

import array
import os
import socket
from enum import Enum, auto

from shim.errors import Failure
from shim.linux import libc, mount
from shim.oci.spec import NamespaceType, Spec
from shim.runtime import userns
from shim.runtime.context import PodHandles

FLAGS = {
    NamespaceType.USER: libc.CLONE_NEWUSER,
    NamespaceType.NETWORK: libc.CLONE_NEWNET,
    NamespaceType.IPC: libc.CLONE_NEWIPC,
    NamespaceType.UTS: libc.CLONE_NEWUTS,
    NamespaceType.PID: libc.CLONE_NEWPID,
    NamespaceType.TIME: libc.CLONE_NEWTIME,
}
# Later: the mount namespace, from the pod's small one; the user namespace with it, after everything that the host's owns; the cgroup
# namespace once the process is in its cgroup.
_LATER = frozenset({NamespaceType.MOUNT, NamespaceType.CGROUP, NamespaceType.USER})


class PidMode(Enum):
    NEW = auto()
    JOINED = auto()
    HOST = auto()


def pid_mode(spec: Spec) -> PidMode:
    """Where the container's processes get their pids."""
    entry = spec.namespace(NamespaceType.PID)
    if entry is None:
        return PidMode.HOST
    return PidMode.JOINED if entry.path else PidMode.NEW


def own_cgroup(spec: Spec) -> bool:
    """Whether the container gets a cgroup namespace of its own."""
    entry = spec.namespace(NamespaceType.CGROUP)
    return entry is not None and not entry.path


def own_time(spec: Spec) -> bool:
    """Whether there is a time namespace, which decides for all later children of who joins or makes it."""
    return spec.namespace(NamespaceType.TIME) is not None


def join(spec: Spec, pod: PodHandles, target: int | None) -> None:
    """Join what the spec names and unshare what it wants new, except user, mount, cgroup and a new PID namespace.

    A joined PID namespace takes effect for children only. Raises Failure with the namespace's type.
    """
    if spec.namespace(NamespaceType.MOUNT) is None:
        raise Failure("namespaces", message="a container needs a mount namespace of its own", path="linux.namespaces")
    fresh, named = 0, pod.named()
    for entry in spec.linux.namespaces:
        if entry.type in _LATER:
            continue
        if not entry.path:
            fresh |= FLAGS[entry.type] if entry.type is not NamespaceType.PID else 0
            continue
        try:
            _join_one(entry.type, entry.path, named, target)
        except OSError as error:
            raise Failure.wrap("namespaces", f"join {entry.type.value}", error, entry.path) from None
    if fresh:
        libc.unshare(fresh)


def _join_one(kind: NamespaceType, where: str, pod: dict[str, int], target: int | None) -> None:
    scheme, _, name = where.partition(":")
    if scheme == "pod":
        if name not in pod:
            raise Failure("namespaces", f"join {kind.value}", path=where, message="the pod has none")
        libc.setns(pod[name], FLAGS[kind])
    elif scheme == "target":
        if target is None:
            raise Failure("namespaces", f"join {kind.value}", path=where, message="no target container was given")
        libc.setns(target, FLAGS[kind])
    else:
        fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        libc.setns(fd, FLAGS[kind])
        os.close(fd)


def shared(spec: Spec, pod: PodHandles) -> list[tuple[int, int]]:
    """Fds and types of those network, IPC and UTS namespaces that the container has in common with its pod."""
    kinds = (NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS)
    named = pod.named()
    return [(named[n.type.value], FLAGS[n.type]) for n in spec.linux.namespaces if n.type in kinds and n.path == f"pod:{n.type.value}"]


def new_mount_namespace(pod_mount: int, user: int | None = None) -> None:
    """A mount namespace with a copy of the pod's few mounts: its cost does not grow with the host's mount table. With ``user`` it belongs
    to that user namespace, whose root this process is from then on."""
    libc.setns(pod_mount, libc.CLONE_NEWNS)
    if user is not None:
        libc.setns(user, libc.CLONE_NEWUSER)
        userns.become_root()
    libc.unshare(libc.CLONE_NEWNS)


def user_namespace(spec: Spec, pod: PodHandles) -> int | None:
    """The pod's user namespace where the container is in it. Raises Failure for one of the container's own: it would own nothing."""
    entry = spec.namespace(NamespaceType.USER)
    if entry is None:
        return None
    if entry.path != "pod:user" or pod.user is None:
        raise Failure("namespaces", "join user", path=entry.path, message="only the pod's user namespace can be joined")
    return pod.user


def set_names(spec: Spec) -> None:
    """Host and domain name, where the container has a UTS namespace of its own."""
    uts = spec.namespace(NamespaceType.UTS)
    if uts is None or uts.path:
        return
    if spec.hostname:
        libc.sethostname(spec.hostname)
    if spec.domainname:
        libc.setdomainname(spec.domainname)


def proc_from(process: int, host_mntns: int, proc: int) -> int:
    """A detached copy of the procfs that the process behind a pidfd has at /proc.

    Nobody of ours enters its PID namespace, where a process with CAP_SYS_PTRACE could take over whoever does. What is at /proc there
    is the container's to choose, so it is verified to be the root of that namespace's procfs.
    """
    try:
        libc.setns(process, libc.CLONE_NEWNS)
        try:
            fd = mount.open_tree(libc.AT_FDCWD, "/proc")
        finally:
            libc.setns(host_mntns, libc.CLONE_NEWNS)
        wanted = os.stat(f"{_pid_of(process)}/ns/pid", dir_fd=proc).st_ino
        genuine = libc.fstatfs_type(fd) == mount.PROC_SUPER_MAGIC and os.stat("1/ns/pid", dir_fd=fd).st_ino == wanted
    except OSError as error:
        raise Failure.wrap("namespaces", "open_tree", error, "/proc") from None
    if not genuine:
        os.close(fd)
        raise Failure("namespaces", "verify", path="/proc", message="the target has something else there")
    return fd


def _pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"Pid:"))


def proc_of(target: int, proc: int) -> int:
    """A detached procfs of the PID namespace ``target``; ``proc`` is a procfs of this process's.

    procfs belongs to the PID namespace of whoever opens it, and setns(2) moves only children there: so a child makes it. Only for a
    namespace in which nobody is but our own PID 1: the child is privileged and can be traced from inside. See ``proc_from``.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    libc.setns(target, libc.CLONE_NEWPID)
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        code = 1
        try:
            fd = mount.new_proc()
            theirs.sendmsg([b"p"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            code = 0
        except OSError as error:
            theirs.send(str(error.errno).encode())
        finally:
            os._exit(code)
    libc.setns(before, libc.CLONE_NEWPID)
    os.close(before)
    theirs.close()
    data, ancillary, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(4))
    ours.close()
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    if not ancillary:
        number = int(data) if data else None
        raise Failure("namespaces", "mount", errno=number, path="/proc", message="procfs of the target's PID namespace")
    return array.array("i", ancillary[0][2])[0]
