"""What travels to the supervisor as an fd: directories, and objects in sealed memory files, which it never reads."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shim.errors import Failure
from shim.linux import libc
from shim.oci import codec, command
from shim.oci.spec import Process, Resources

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@contextlib.contextmanager
def _held(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def directory(path: Path) -> contextlib.AbstractContextManager[int]:
    """A directory's fd for the length of a ``with``."""
    return _held(os.open(path, _DIRECTORY))


def sealed(value: Process | Resources) -> contextlib.AbstractContextManager[int]:
    """An OCI object as JSON."""
    return _held(libc.sealed_memfd("cri-shim-payload", codec.encode(value)))


def block(process: Process) -> contextlib.AbstractContextManager[int]:
    """Arguments and environment as the exec agent maps them."""
    return _held(libc.sealed_memfd("cri-shim-block", command.block(process.args, process.env)))


class Facts:
    """All of a process but its arguments and environment, as JSON: the same text for all sessions of a container."""

    def __init__(self) -> None:
        self._last: tuple[Process, str] | None = None

    def of(self, process: Process) -> str:
        bare = replace(process, args=(), env=())
        if self._last is None or self._last[0] != bare:
            self._last = bare, codec.encode(bare).decode()
        return self._last[1]


def named(failure: Failure, process: Process) -> Failure:
    """An error of execve with the program's name, which the supervisor does not know."""
    if (failure.operation, failure.path) != ("exec", "") or failure.errno is None or not process.args:
        return failure
    name = process.args[0]
    searched = "/" not in name and failure.errno in (errno.ENOENT, errno.ENOTDIR)
    message = "executable file not found in $PATH" if searched else failure.message
    return Failure(failure.phase, "exec", errno=failure.errno, path=name, message=message)
