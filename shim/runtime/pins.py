"""Exit codes that outlive every process of ours: pidfds bound in a mount namespace that is itself pinned (Linux 6.15).

A pidfd's file keeps the exit status of its process for as long as the file exists, whoever reaped it. So each container's pidfd is
bind-mounted once. The mounts lie in a namespace of their own, whose only trace on the host is the bind of that namespace at
``<state>/pins``: the host's mount table does not grow with the containers. A supervisor that finds a container gone without having
been there reads the status from its pin. Older kernels cannot bind pidfds, and have no pins (exit 255, reason Unknown, then).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc, mount
from shim.runtime.channel import Channel

NAME = "pins"  # in the state directory
_NS_GET_NSTYPE = 0xB703


@dataclass(frozen=True, slots=True)
class Open:
    """The job of finding or making the namespace: ``{"ok": {"fds": ["pins"]}}``, without fds where the kernel cannot."""

    state: str  # path of the state directory
    keep: Collection[int] = ()

    def __call__(self, channel: Channel) -> None:
        if not supported():
            channel.send({"ok": {"fds": []}})
            return
        path = f"{self.state}/{NAME}"
        fd = _existing(path)
        if fd is None:
            fd = _make(self.state, path)
        # A volume of the host's root has it below, and a namespace file that is older than the container's namespace may not be mounted in
        # there (ELOOP): recursive binds pass over what is unbindable.
        mount.mount("none", path, flags=mount.MS_UNBINDABLE)
        channel.send({"ok": {"fds": ["pins"]}}, (fd,))


def supported() -> bool:
    """Whether pidfds can be bound (6.14) and keep exit statuses (6.15): asked of the kernel, not of its version."""
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    try:
        if libc.pidfd_info_exit(pidfd) is None:
            return False
        os.close(mount.open_tree(pidfd, "", mount.OPEN_TREE_CLONE))
        return True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(pidfd)


def _existing(path: str) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if fcntl.ioctl(fd, _NS_GET_NSTYPE) == libc.CLONE_NEWNS:
            return fd
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):  # the bare file of a start that was killed
            raise
    os.close(fd)
    return None


def _make(state: str, path: str) -> int:
    """A namespace with nothing but a tmpfs for the pins, bound at ``path``."""
    here = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if mount.propagation_of(here)[0]:
        # A mount namespace may not be bound where the bind would propagate, possibly into itself (unshare(1), --mount=file).
        mount.mount(state, state, flags=mount.MS_BIND)
        mount.mount("none", state, flags=mount.MS_PRIVATE)
    os.close(here)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        try:
            os.close(done_write)  # its end of file is what lets this process go
            libc.unshare(libc.CLONE_NEWNS)
            mount.make_private("/")
            attributes = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC
            root = mount.new_filesystem("tmpfs", {"source": "cri-shim-pins", "mode": "700"}, attributes)
            mount.attach(root, "/")
            mount.enter_root(root)
            os.write(ready_write, b"ok")
            os.read(done_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    try:
        if os.read(ready_read, 2) != b"ok":
            raise Failure("start supervisor", "make pins namespace", path=path)
        mount.bind(f"/proc/{pid}/ns/mnt", path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise Failure.wrap("start supervisor", "pin mount namespace", error, path) from None
    finally:
        os.close(done_write)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def close(state: str) -> None:
    """Give the namespace up: nothing of ours is left on the host. For a supervisor that ends with no container left."""
    path = f"{state}/{NAME}"
    with suppress(OSError):  # ending goes on: what stays is found and used by the next start
        mount.umount2(path, mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
        os.unlink(path)


def pin(pins: int, name: str, pidfd: int) -> None:
    """Bind ``pidfd`` as ``name``. Moves the calling child into the namespace of the pins."""
    libc.setns(pins, libc.CLONE_NEWNS)
    tree = mount.open_tree(pidfd, "", mount.OPEN_TREE_CLONE)
    with suppress(FileExistsError):
        os.close(os.open(f"/{name}", os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    mount.attach(tree, f"/{name}")
    os.close(tree)


def unpin(pins: int, names: Collection[str]) -> None:
    """Let go of pins; one that is not there is fine. Moves the calling child into their namespace."""
    libc.setns(pins, libc.CLONE_NEWNS)
    for name in names:
        with suppress(FileNotFoundError):
            try:
                mount.umount2(f"/{name}", mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # made, but never mounted on
                    raise
            os.unlink(f"/{name}")


@dataclass(frozen=True, slots=True)
class Pin:
    """The job of pinning a process that was forked at start, when its launcher could not do it any more."""

    pins: int
    name: str
    pidfd: int

    @property
    def keep(self) -> Collection[int]:
        return (self.pins, self.pidfd)

    def __call__(self, channel: Channel) -> None:
        pin(self.pins, self.name, self.pidfd)
        channel.send({"ok": {}})


@dataclass(frozen=True, slots=True)
class Status:
    """The job of reading one pin: ``{"ok": {"status": wait status or null}}``; null without a pin, or while nobody has reaped."""

    pins: int
    name: str

    @property
    def keep(self) -> Collection[int]:
        return (self.pins,)

    def __call__(self, channel: Channel) -> None:
        libc.setns(self.pins, libc.CLONE_NEWNS)
        status = None
        with suppress(FileNotFoundError):
            fd = os.open(f"/{self.name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                status = libc.pidfd_info_exit(fd)
            finally:
                os.close(fd)
        channel.send({"ok": {"status": status}})


@dataclass(frozen=True, slots=True)
class Sweep:
    """The job of dropping pins of containers that nobody knows any more."""

    pins: int
    known: Collection[str]

    @property
    def keep(self) -> Collection[int]:
        return (self.pins,)

    def __call__(self, channel: Channel) -> None:
        libc.setns(self.pins, libc.CLONE_NEWNS)
        unpin(self.pins, [name for name in os.listdir("/") if name not in self.known])
        channel.send({"ok": {}})
