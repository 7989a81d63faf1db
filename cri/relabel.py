"""SELinux labels on files of the host: volumes whose mount says ``selinux_relabel``, and the pod's files.

Only what the request flags is labelled (CVE-2021-43816: an attacker had the host's files labelled through a volume), by a walk over
descriptors that follows no symlink and enters no other file system: whoever writes to the volume meanwhile cannot lead it out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from functools import partial

from cri.errors import FailedPrecondition, InvalidArgument
from protos.runtime.v1 import api_pb2 as v1

_ATTRIBUTE = "security.selinux"
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# What a host cannot live without its own labels; below them anything may be a volume.
_NEVER = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp"}
    | {"/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin", "/var", "/var/lib", "/var/log", "/var/run"}
)


async def volumes(mounts: Iterable[v1.Mount], label: str) -> None:
    """Label what the flagged mounts show, in a thread. Raises InvalidArgument or FailedPrecondition naming the mount."""
    for i, mount in enumerate(mounts):
        if mount.selinux_relabel and mount.host_path:
            field = f"config.mounts[{i}].selinux_relabel"
            await asyncio.to_thread(partial(tree, mount.host_path, label, field))


async def directory(path: str, label: str) -> None:
    """One that we have made: an image's VOLUME, before anything is copied into it."""
    await asyncio.to_thread(partial(tree, path, label, "image config.Volumes"))


def file(fd: int, label: str) -> None:
    """One that we are writing. Raises OSError."""
    try:
        os.setxattr(fd, _ATTRIBUTE, label.encode())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def tree(path: str, label: str, field: str) -> None:
    """``path`` itself, through symlinks as a mount takes it, and all below."""
    try:
        top = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"{path!r:.200}: {error.strerror}", field=field) from None
    open_directories: list[tuple[int, Iterator[str]]] = []  # from the top down to where the walk is
    try:
        real = os.readlink(f"/proc/self/fd/{top}")
        if real in _NEVER:
            raise InvalidArgument(f"{real!r} may not be relabelled: the host needs its labels", field=field)
        device = os.fstat(top).st_dev
        wanted = label.encode()
        _label(top, wanted, real, field)
        _enter(top, open_directories)
        while open_directories:
            directory, names = open_directories[-1]
            name = next(names, None)
            if name is None:
                os.close(open_directories.pop()[0])
                continue
            try:
                child = os.open(name, _PATH, dir_fd=directory)
            except FileNotFoundError:
                continue  # removed meanwhile
            try:
                if os.fstat(child).st_dev == device:
                    _label(child, wanted, real, field)
                    _enter(child, open_directories)
            finally:
                os.close(child)
    finally:
        os.close(top)
        for directory, _ in open_directories:
            os.close(directory)


def _enter(fd: int, open_directories: list[tuple[int, Iterator[str]]]) -> None:
    """Go on inside, where ``fd`` is a directory."""
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    open_directories.append((readable, iter(os.listdir(readable))))


def _label(fd: int, label: bytes, path: str, field: str) -> None:
    """Through the descriptor's own link, which leads to this very file and no further."""
    name = f"/proc/self/fd/{fd}"
    try:
        if os.getxattr(name, _ATTRIBUTE).rstrip(b"\0") == label:
            return
    except OSError:
        pass  # it has none yet, or setting one tells why it cannot
    try:
        os.setxattr(name, _ATTRIBUTE, label)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # a file system that has no labels of its own gets one by its mount
            raise FailedPrecondition(f"{field}: {path!r:.200} cannot be labelled {label.decode()}: {error.strerror}") from None
