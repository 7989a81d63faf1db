"""A pod's /etc/hosts, /etc/hostname and /etc/resolv.conf, where its containers write to them: on a small file system of the pod's own.

Bound from the state directory they would let any container fill /run, and with it the node (CVE-2020-8557 was the kubelet's). Here what a
container writes counts as its memory and ends at ``_ROOM``. The daemon's files are the first content; changes are the pod's and last as
long as it does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from shim.errors import Failure
from shim.linux import libc, mount

PREFIX = "pod:/"  # of a mount's source: the daemon's file follows, with its path
WHERE = "/etc"  # in the pod's mount namespace
_NAMES = ("hosts", "hostname", "resolv.conf")
_ROOM = 1 << 20  # bytes beyond the first content


def attach(directory: int, label: str) -> None:
    """Make the file system in a pod's mount namespace, as large as the daemon's files in ``directory`` ask for. ``label``: SELinux's, if
    any, of everything in it."""
    size = _ROOM
    for name in _NAMES:
        with suppress(FileNotFoundError):
            size += os.stat(name, dir_fd=directory).st_size
    attributes = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC
    options = {"source": "pod", "size": str(size), "nr_inodes": "64", "mode": "755"}
    if label:
        options["context"] = label
    mount.attach(mount.new_filesystem("tmpfs", options, attributes), WHERE)


def clones(sources: Iterable[str], pod: int, host: int) -> dict[str, int]:
    """A detached mount for each source. For a process in the host's mount namespace; ``pod`` and ``host`` are fds of the two."""
    found: dict[str, int] = {}
    missing: dict[str, bytes] = {}
    libc.setns(pod, libc.CLONE_NEWNS)
    try:
        for source in sources:
            try:
                found[source] = mount.open_tree(mount.AT_FDCWD, _at(source))
            except FileNotFoundError:
                missing[source] = b""
    finally:
        libc.setns(host, libc.CLONE_NEWNS)
    for source in missing:
        missing[source] = _read(source)
    if missing:
        libc.setns(pod, libc.CLONE_NEWNS)
        try:
            there = os.path.ismount(WHERE)
            for source, content in missing.items() if there else ():
                _publish(_at(source), content)
                found[source] = mount.open_tree(mount.AT_FDCWD, _at(source))
        finally:
            libc.setns(host, libc.CLONE_NEWNS)
        for source in () if there else missing:  # a pod of an earlier version
            found[source] = mount.open_tree(mount.AT_FDCWD, source[len(PREFIX) - 1 :])
    return found


def _at(source: str) -> str:
    name = source.rpartition("/")[2]
    if name not in _NAMES:
        raise Failure("create container", "mount", path=source, message="is no file of a pod")
    return f"{WHERE}/{name}"


def _read(source: str) -> bytes:
    with open(source[len(PREFIX) - 1 :], "rb") as file:
        return file.read()


def _publish(path: str, content: bytes) -> None:
    """Whole or not at all; whoever was faster wins."""
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)  # whatever the umask
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.close(fd)
        os.unlink(temporary)
