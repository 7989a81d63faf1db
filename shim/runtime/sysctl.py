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


def apply(proc: int, values: Mapping[str, str]) -> None:
    """Write each value through the private procfs ``proc``. Raises Failure naming the parameter."""
    for name, value in values.items():
        try:
            fd = path.open_in_root(proc, f"sys/{file_of(name)}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise Failure.wrap("sysctl", "write", error, name) from None
