"""Getting a pod's namespaces back when the processes that held them by fd are all gone.

The network namespace is pinned, and its owner is the pod's user namespace; PID 1 is a process. ipc, uts and /dev/shm are those of any
container of the pod that still lives (the donor); with none, nothing used them any more and they are made again.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc, mount
from shim.oci import bundle as bundles
from shim.oci.sandbox import Sandbox
from shim.oci.spec import NamespaceType
from shim.rootfs import idmap
from shim.runtime import namespaces, podfiles, sysctl, userns
from shim.runtime import pod as making
from shim.runtime.channel import Channel
from shim.runtime.context import Context

_SHARED = {NamespaceType.IPC: (libc.CLONE_NEWIPC, "ipc"), NamespaceType.UTS: (libc.CLONE_NEWUTS, "uts")}


@dataclass(frozen=True, slots=True)
class Restore:
    """A job: ``{"ok": {"fds": [names]}}`` with ``mount``, ``ipc`` and ``uts`` where the pod has them and ``have`` does not name them."""

    context: Context
    directory: int  # fd of the pod's state directory
    have: dict[str, int]
    donor: int | None = None  # pidfd
    donor_pid: int = 0

    @property
    def keep(self) -> Collection[int]:
        fds = {self.directory, *self.context.fds(), *self.have.values()}
        return fds if self.donor is None else fds | {self.donor}

    def __call__(self, channel: Channel) -> None:
        sandbox = bundles.load_sandbox(self.directory)
        if "network" in self.have:
            libc.setns(self.have["network"], libc.CLONE_NEWNET)
        fds = {}
        missing = [kind for kind in _SHARED if kind in sandbox.namespaces and kind.value not in self.have]
        if missing and self.donor is None and "user" in self.have:
            fds = userns.further(self.context.proc, self.have["user"], missing)
            for kind in missing:
                libc.setns(fds[kind.value], _SHARED[kind][0])
        else:
            for kind in missing:
                fds[kind.value] = self._shared(*_SHARED[kind])
        if self.donor is None and NamespaceType.UTS in sandbox.namespaces and sandbox.hostname and "uts" in fds:
            libc.sethostname(sandbox.hostname)
        if self.donor is None and fds:
            owner = idmap.root_ids((sandbox.uid_mappings, sandbox.gid_mappings))[0] if sandbox.uid_mappings else 0
            sysctl.apply(self.context.proc, sandbox.sysctl, owner=owner)
        if "mount" not in self.have:
            fds["mount"] = self._mounts(sandbox)
        channel.send({"ok": {"fds": list(fds)}}, tuple(fds.values()))

    def _shared(self, flag: int, file: str) -> int:
        if self.donor is None:
            libc.unshare(flag)
            return self._own(file)
        fd = os.open(f"{self.donor_pid}/ns/{file}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc)
        libc.pidfd_send_signal(self.donor, 0)  # it still lives, so the pid was its own when we opened the file
        return fd

    def _own(self, file: str) -> int:
        return os.open(f"self/ns/{file}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc)

    def _mounts(self, sandbox: Sandbox) -> int:
        """The pod's small mount namespace, with the donor's /dev/shm at /shm."""
        proc = self._proc() if "pid" in self.have else None
        shm = self._donated_shm() if sandbox.shm_size and self.donor is not None else None
        libc.setns(self.context.lean_mntns, libc.CLONE_NEWNS)
        libc.unshare(libc.CLONE_NEWNS)
        if sandbox.shm_size and shm is None:
            attributes = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC
            shm = mount.new_filesystem("tmpfs", making.shm_options(sandbox), attributes)
        if shm is not None:
            mount.attach(shm, "/shm")
            os.close(shm)
        podfiles.attach(self.directory, sandbox.mount_label)
        if NamespaceType.USER in sandbox.namespaces:
            userns.show(mount.new_proc() if proc is None else proc)
        elif proc is not None:
            mount.attach(proc, "/proc")
            os.close(proc)
        return self._own("mnt")

    def _proc(self) -> int:
        """procfs of the shared PID namespace: the donor's, or made inside where nobody lives but PID 1."""
        if self.donor is None:
            return namespaces.proc_of(self.have["pid"], self.context.proc)
        return namespaces.proc_from(self.donor, self.context.host_mntns, self.context.proc)

    def _donated_shm(self) -> int:
        """A clone of the donor's /dev/shm. The donor may have put anything there, which harms nobody but its own pod."""
        assert self.donor is not None
        try:
            libc.setns(self.donor, libc.CLONE_NEWNS)
            return mount.open_tree(libc.AT_FDCWD, "/dev/shm")
        except OSError as error:
            raise Failure.wrap("restore pod", "open_tree", error, "/dev/shm") from None
