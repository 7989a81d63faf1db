"""Learn of out-of-memory kills in a container, also of the one that ended it.

The fds are made in a child (``watch``) and used by whoever waits (``OomWatch``), before exits in each batch of events. They stay
readable as long as the group exists; the last count is remembered beyond that.
"""

from __future__ import annotations

import errno
import os
import select

from shim.cgroups import group as files
from shim.cgroups.group import Group
from shim.errors import Failure
from shim.linux import libc


def watch(group: Group) -> list[int]:
    """The fds an ``OomWatch`` takes, in its order; none where the machine does not account memory."""
    directory = group.directory("memory")
    if directory is None:
        return []
    try:
        if group.version == 2:
            try:
                return [os.open(f"{directory}/memory.events", os.O_RDONLY | os.O_CLOEXEC)]
            except FileNotFoundError:  # the controller is not on in this group
                return []
        return _register(directory)
    except OSError as error:
        raise Failure.wrap("watch memory", "open", error) from error


def _register(directory: str) -> list[int]:
    event = libc.eventfd()
    control = -1
    try:
        control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        files.write(f"{directory}/cgroup.event_control", f"{event} {control}")
    except BaseException:
        os.close(event)
        if control >= 0:
            os.close(control)
        raise
    return [event, control]


class OomWatch:
    """Counts kills. Never blocks."""

    __slots__ = ("_count", "_fds", "_version")

    def __init__(self, version: int, fds: list[int]) -> None:
        """Owns ``fds`` from here on."""
        self._version, self._fds, self._count = version, fds, 0
        self.read()  # version 2 reports a change since the last read, and the first poll counts as one otherwise

    def fileno(self) -> int:
        """What to poll, -1 if there is nothing to watch."""
        return self._fds[0] if self._fds else -1

    @property
    def events(self) -> int:
        """The epoll mask to wait for."""
        return select.EPOLLIN if self._version == 1 else select.EPOLLPRI

    def read(self) -> int:
        """Processes killed for want of memory so far, in the group itself (version 1) or in it and below (version 2).

        To be read after an event and once more when the container has exited: the event of version 1 comes before its kill.
        """
        if not self._fds:
            return self._count
        if self._version == 1:
            try:
                os.eventfd_read(self._fds[0])
            except BlockingIOError:
                pass
        try:
            text = os.pread(self._fds[-1], 4096, 0).decode()
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENOENT):  # the group is gone
                return self._count
            raise
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                self._count = max(self._count, int(value))
        return self._count

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
