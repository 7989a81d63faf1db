"""A container's log file: appended to in whole records, repaired after a crash, reopened when the kubelet has renamed it."""

from __future__ import annotations

import errno
import os
import stat

from shim.errors import Failure
from shim.linux.path import open_beneath

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LONGEST = 20 * 1024  # bytes, above any record


def open_log(path: str) -> int:
    """Open for appending, 0640 as containerd creates it, and drop a record that a killed writer left torn.

    A symlink or anything but a regular file is refused: whoever may write to the log directory must not choose what we append to.
    That directory is what is left of a double slash; its own path may lead over symlinks. Raises Failure.
    """
    try:
        fd = _open(path)
    except OSError as error:
        raise Failure("log", "open", errno=error.errno, path=path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Failure("log", "open", path=path, message="not a regular file")
        _repair(fd, status.st_size)
    except OSError as error:
        os.close(fd)
        raise Failure("log", "open", errno=error.errno, path=path) from error
    except Failure:
        os.close(fd)
        raise
    return fd


def _open(path: str) -> int:
    top, _, name = path.partition("//")
    if not name:
        return os.open(path, _FLAGS, 0o640)
    directory = os.open(top or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(directory, name, _FLAGS, 0o640)
    finally:
        os.close(directory)


def _repair(fd: int, size: int) -> None:
    """A fatal signal can stop write(2) between two pages, so a file may end inside a record; its bytes were that read's."""
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return
    start = max(0, size - _LONGEST)
    end = os.pread(fd, size - start, start).rfind(b"\n")
    if end >= 0 or start == 0:
        os.ftruncate(fd, start + end + 1)
    else:
        os.write(fd, b"\n")  # not our format at all: only make sure that our next record starts a line


class LogFile:
    """``append`` writes all or nothing; an empty path discards."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = open_log(path) if path else -1

    def append(self, records: bytes) -> None:
        """Raises OSError, after cutting off what had been written of ``records``."""
        if self._fd < 0:
            return
        done = os.write(self._fd, records)
        if done == len(records):
            return
        view = memoryview(records)
        try:
            while done < len(records):
                written = os.write(self._fd, view[done:])
                if not written:
                    raise OSError(errno.EIO, "short write")
                done += written
        except OSError:
            size = os.fstat(self._fd).st_size
            if size >= done:
                os.ftruncate(self._fd, size - done)
            raise

    def reopen(self) -> None:
        """Switch to a new file at the same path. The old one stays in use when that fails. Raises Failure."""
        if self._fd < 0:
            raise Failure("log", "reopen", message="the container has no log")
        fd = open_log(self.path)
        os.close(self._fd)
        self._fd = fd

    def discard_empty(self) -> None:
        """Unlink the file if nothing was ever written to it and the path still names it. Raises OSError."""
        if self._fd < 0:
            return
        mine = os.fstat(self._fd)
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            return
        if mine.st_size == 0 and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            os.unlink(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
