"""Kernel parameters of the namespaces that this process is in, written through a procfs that nobody else can have mounted over."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shim.errors import Failure
from shim.linux import path


def file_of(name: str) -> str:
    """``net.ipv4.ip_forward`` or ``net/ipv4/ip_forward`` as a path below /proc/sys, by sysctl(8)'s rule: the first separator
    decides which of the two separates and which is part of a name."""
    dot, slash = name.find("."), name.find("/")
    if slash < 0 or 0 <= dot < slash:
        return name.translate(str.maketrans("./", "/."))
    return name


def apply(proc: int, values: Mapping[str, str], *, owner: int = 0) -> None:
    """Write each value through the private procfs ``proc``. Raises Failure naming the parameter.

    ``owner``: the uid of root of the user namespace that the namespaces belong to. Some files (IPC) may be written by it only, whatever
    capabilities the host's root has, and some (kernel.domainname) by the host's root only.
    """
    for name, value in values.items():
        try:
            try:
                write(proc, file_of(name), value)
            except PermissionError:
                if not owner:
                    raise
                os.seteuid(owner)
                try:
                    write(proc, file_of(name), value)
                finally:
                    os.seteuid(0)
        except OSError as error:
            raise Failure.wrap("sysctl", "write", error, name) from None


def write(proc: int, file: str, value: str) -> None:
    """``file`` is relative to /proc/sys."""
    fd = path.open_in_root(proc, f"sys/{file}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read(proc: int, file: str) -> str:
    """Its value without the newline at the end."""
    fd = path.open_in_root(proc, f"sys/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode(errors="replace").removesuffix("\n")
    finally:
        os.close(fd)
