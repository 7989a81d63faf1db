"""What AppArmor and SELinux are told about a process before its execve: writes to its own attributes in procfs.

The kernel keeps each until the execve and copies it to what is forked, so that they may be made early; only the process itself can make
them. They go through a procfs that is mounted nowhere (CVE-2019-16884: a volume over /proc took the label instead of the kernel).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from shim.errors import Failure
from shim.oci.spec import Process


class Write(NamedTuple):
    """``file`` is below the process's directory in procfs."""

    what: str  # for errors
    file: str
    content: bytes


def before_keyring(process: Process) -> tuple[Write, ...]:
    """What has to be told before a session keyring is joined: a new one gets this label. execve forgets it."""
    return (Write("selinux", "attr/keycreate", os.fsencode(process.selinux_label)),) if process.selinux_label else ()


def on_exec(process: Process) -> tuple[Write, ...]:
    """What takes effect with the next execve."""
    writes = []
    if process.apparmor_profile:
        writes.append(Write("apparmor", "attr/apparmor/exec", b"exec " + os.fsencode(process.apparmor_profile)))
    if process.selinux_label:
        writes.append(Write("selinux", "attr/exec", os.fsencode(process.selinux_label)))
    return tuple(writes)


def apply(proc: int, writes: Iterable[Write]) -> None:
    """Make them for this process; ``proc`` is a directory fd of procfs. Raises Failure."""
    for write in writes:
        try:
            fd = os.open(f"self/{write.file}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            try:
                os.write(fd, write.content)
            finally:
                os.close(fd)
        except OSError as error:
            raise failure(write, error.errno or 0) from None


def failure(write: Write, number: int) -> Failure:
    """What an errno of a write means."""
    name = os.fsdecode(write.content.removeprefix(b"exec "))
    hints = {("apparmor", 2): "load the profile on this node", ("selinux", 22): "the loaded policy does not know this label"}
    hint = hints.get((write.what, number), "")
    return Failure("restrict", write.what, errno=number, path=name, hint=hint)
