"""A pod's namespaces: made in one child, handed back as fds, pinned where a path is needed (the network namespace, for CNI)."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from shim.cgroups import manager as cgroups
from shim.errors import Failure
from shim.linux import caps, libc, mount, process
from shim.oci import bundle as bundles
from shim.oci import validate
from shim.oci.sandbox import Sandbox
from shim.oci.spec import NamespaceType
from shim.rootfs import idmap
from shim.runtime import launch, namespaces, pid1, podfiles, sysctl, userns
from shim.runtime.channel import Channel
from shim.runtime.context import Context

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NEW = {NamespaceType.NETWORK: libc.CLONE_NEWNET, NamespaceType.IPC: libc.CLONE_NEWIPC, NamespaceType.UTS: libc.CLONE_NEWUTS}
_FILES = {NamespaceType.NETWORK: "net", NamespaceType.IPC: "ipc", NamespaceType.UTS: "uts"}
_NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Pod:
    """The job of ``pod.create``: ``{"ok": {"pid": 0 or that of PID 1, "fds": [names]}}``.

    fds: ``mount`` always; ``network`` and ``netlink`` (a rtnetlink socket inside it), ``ipc``, ``uts``, ``user`` where the pod has its
    own; ``pid`` and ``cgroup`` facts where its containers share a PID namespace.
    """

    context: Context
    directory: int  # fd of the pod's state directory
    slot: int

    @property
    def keep(self) -> Collection[int]:
        return {self.directory, *self.context.fds()}

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        process.reset_inherited(self.context.inherited)
        self.make(bundles.load_sandbox(self.directory), channel)

    def order(self) -> tuple[dict[str, object], tuple[int, ...]]:
        return {"job": "pod", "slot": self.slot}, (self.directory,)

    def again(self, facts: dict[str, object]) -> bool:
        return not facts["pid"] and "user" not in facts["fds"]  # type: ignore[operator]

    def make(self, sandbox: Sandbox, channel: Channel) -> None:
        """Make them and answer, in a process that has shed what it inherited."""
        validate.validate_sandbox(sandbox)
        facts: dict[str, object] = {"pid": 0}
        make = self._in_user_namespace if NamespaceType.USER in sandbox.namespaces else self._plain
        fds = make(sandbox, channel, facts)
        channel.send({"ok": {**facts, "fds": list(fds)}}, tuple(fds.values()))

    def _plain(self, sandbox: Sandbox, channel: Channel, facts: dict[str, object]) -> dict[str, int]:
        making = self._make_group(sandbox, channel, facts)
        flags = sum(_NEW[kind] for kind in sandbox.namespaces if kind in _NEW)
        libc.unshare(flags)
        fds = {kind.value: self._own(_FILES[kind]) for kind in sandbox.namespaces if kind in _FILES}
        if NamespaceType.UTS in sandbox.namespaces and sandbox.hostname:
            libc.sethostname(sandbox.hostname)
        if NamespaceType.NETWORK in sandbox.namespaces:
            fds["netlink"] = _bring_up_network(sandbox)
        sysctl.apply(self.context.proc, sandbox.sysctl)
        birthplace = _join(making) if making is not None else None
        fds["mount"] = self._mount_namespace(sandbox)
        if making is not None:
            facts["pid"], fds["pid"] = self._pid1(sandbox, birthplace)
            making.release()
        return fds

    def _in_user_namespace(self, sandbox: Sandbox, channel: Channel, facts: dict[str, object]) -> dict[str, int]:
        """The same with everything but the mount namespace inside a new user namespace, which this process sets up but never joins."""
        proc, mappings = self.context.proc, (sandbox.uid_mappings, sandbox.gid_mappings)
        making = self._make_group(sandbox, channel, facts)
        birthplace = _join(making) if making is not None else None
        fds = {"mount": self._mount_namespace(sandbox)}
        if making is not None:
            facts["pid"], made = self._pid1_in_user_namespace(sandbox, birthplace)
            making.release()
            fds |= made
            procfs = namespaces.proc_of(fds["pid"], proc)
        else:
            fds |= userns.new(proc, mappings, sandbox.namespaces)
            procfs = mount.new_proc()
        launch.ids_changed()
        userns.show(procfs)
        for kind, flag in _NEW.items():
            if kind in sandbox.namespaces:
                libc.setns(fds[kind.value], flag)
        libc.setns(self.context.host_mntns, libc.CLONE_NEWNS)
        if NamespaceType.UTS in sandbox.namespaces and sandbox.hostname:
            libc.sethostname(sandbox.hostname)
        if NamespaceType.NETWORK in sandbox.namespaces:
            fds["netlink"] = _bring_up_network(sandbox)
        else:
            pin(f"/proc/self/fd/{fds['user']}", sandbox.userns_path)
        sysctl.apply(proc, sandbox.sysctl, owner=idmap.root_ids(mappings)[0])
        return fds

    def _mount_namespace(self, sandbox: Sandbox) -> int:
        """A mount namespace for the pod with its /dev/shm at /shm and its files at /etc; containers' namespaces start as copies of it."""
        libc.setns(self.context.lean_mntns, libc.CLONE_NEWNS)
        libc.unshare(libc.CLONE_NEWNS)
        if sandbox.shm_size:
            attributes = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC
            mount.attach(mount.new_filesystem("tmpfs", shm_options(sandbox), attributes), "/shm")
        podfiles.attach(self.directory, sandbox.mount_label)
        return self._own("mnt")

    def _own(self, name: str) -> int:
        return os.open(f"self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc)

    def _make_group(self, sandbox: Sandbox, channel: Channel, facts: dict[str, object]) -> cgroups.Making | None:
        """Begin the cgroup of the pod's PID 1, if it has one."""
        if NamespaceType.PID not in sandbox.namespaces:
            return None
        making = cgroups.begin(self.context.layout, sandbox.cgroups_path)
        facts["cgroup"] = making.group.to_json()
        channel.note("cgroup", facts["cgroup"])
        return making

    def _pid1(self, sandbox: Sandbox, birthplace: int | None) -> tuple[int, int]:
        """Fork and exec PID 1 of a shared PID namespace: its pid and the namespace. The pod's mount namespace gets its procfs."""
        image = libc.sealed_memfd("cri-shim-pause", pid1.image())
        ready, told = os.pipe()
        flags = libc.CLONE_NEWPID | libc.CLONE_PARENT
        address = self.context.slots.address(self.slot)
        pid, _ = libc.clone3(flags, exit_signal=0, cgroup=birthplace, parent_tid_address=address)
        if pid == 0:
            _become_pid1(image, told)
        os.close(told)
        _await_pid1(ready, sandbox)
        return pid, os.open(f"{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc)

    def _pid1_in_user_namespace(self, sandbox: Sandbox, birthplace: int | None) -> tuple[int, dict[str, int]]:
        """The same, born with the pod's user namespace and all that belongs to it: its pid and the namespaces."""
        image = libc.sealed_memfd("cri-shim-pause", pid1.image())
        ready, told = os.pipe()
        hold, go = os.pipe2(os.O_CLOEXEC)
        flags = libc.CLONE_NEWPID | libc.CLONE_PARENT | sum(_NEW[kind] for kind in sandbox.namespaces if kind in _NEW)
        address, mappings = self.context.slots.address(self.slot), (sandbox.uid_mappings, sandbox.gid_mappings)
        pid, _ = userns.clone(flags, mappings, exit_signal=0, cgroup=birthplace, parent_tid_address=address)
        if pid == 0:
            os.close(go)
            if os.read(hold, 1) != b"g":
                os._exit(127)
            last = sum(part.size for part in sandbox.uid_mappings) - 1
            _become_pid1(image, told, procfs=False, nobody=min(_NOBODY, last))
        os.close(told)
        proc = self.context.proc
        idmap.write_maps(proc, pid, mappings)
        fds = userns.opened(proc, pid, sandbox.namespaces)
        fds["pid"] = os.open(f"{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        os.write(go, b"g")
        _await_pid1(ready, sandbox)
        os.close(go)
        os.close(hold)
        return pid, fds


def _join(making: cgroups.Making) -> int | None:
    """A directory fd to be born in, or None where this process has joined the group (v1)."""
    group = making.finish()
    where = cgroups.open_dir(group)
    if where is None:
        cgroups.join(group)
    return where


def shm_options(sandbox: Sandbox) -> dict[str, str]:
    """Of the file system that is the pod's /dev/shm; it belongs to the containers' root, wherever that is mapped to."""
    options = {"source": "shm", "size": str(sandbox.shm_size), "mode": "1777"}
    if sandbox.uid_mappings:
        uid, gid = idmap.root_ids((sandbox.uid_mappings, sandbox.gid_mappings))
        options |= {"uid": str(uid), "gid": str(gid)}
    if sandbox.mount_label:
        options["context"] = sandbox.mount_label
    return options


def _await_pid1(ready: int, sandbox: Sandbox) -> None:
    said = os.read(ready, 64)  # nothing: close-on-exec closed it, so the program runs
    os.close(ready)
    if said:
        raise Failure("create pod", "PID 1", errno=int(said), path=sandbox.id)


def _bring_up_network(sandbox: Sandbox) -> int:
    """Loopback up, the namespace pinned; returns a netlink socket inside it (the daemon itself never joins a namespace)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
    if sandbox.netns_path:
        pin("/proc/self/ns/net", sandbox.netns_path)
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE).detach()


def pin(namespace: str, target: str) -> None:
    """Bind a namespace file over an empty file, so that it lives without a process."""
    try:
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileExistsError:
        unpin(target)
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
    mount.bind(namespace, target)


def unpin(target: str) -> None:
    """Undo ``pin``; nothing to do where there is none. Blocking: for a child of the supervisor."""
    try:
        mount.umount2(target, mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount point, or gone
            raise Failure.wrap("delete pod", "umount", error, target) from None
    try:
        os.unlink(target)
    except FileNotFoundError:
        return


def _become_pid1(image: int, told: int, *, procfs: bool = True, nobody: int = _NOBODY) -> NoReturn:
    """PID 1: procfs for the pod, then no capabilities, no fds, an empty read-only root, nothing of ours in memory."""
    try:
        if procfs:
            mount.attach(mount.new_proc(), "/proc")
        libc.unshare(libc.CLONE_NEWNS)
        mount.empty_root()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        process.close_all_except({image, told})
        caps.drop_bounding(0)
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        caps.set_caps(0, 0, 0)
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        libc.execveat(image, "", [b"/pause"], [])
    except OSError as error:
        os.write(told, str(error.errno).encode())
    finally:
        os._exit(127)

