"""Learn of out-of-memory kills in a container, also of the one that ended it.

The fds are made in a child (``watch``) and used by whoever waits (``OomWatch``), before exits in each batch of events. They stay
readable as long as the group exists; the last count is remembered beyond that. Of a scope of systemd's the group above is watched, too.
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
            own = _events(directory)
            return own + _events(os.path.dirname(directory)) if own and group.unit else own
        return _register(directory)
    except OSError as error:
        raise Failure.wrap("watch memory", "open", error) from error


def kills_above(group: Group) -> int | None:
    """What the group above a scope has counted for all below it; None where it does not."""
    for fd in _events(os.path.dirname(group.paths[""])) if group.version == 2 and group.unit else []:
        try:
            return _kills(fd)
        finally:
            os.close(fd)
    return None


def _events(directory: str) -> list[int]:
    try:
        return [os.open(f"{directory}/memory.events", os.O_RDONLY | os.O_CLOEXEC)]
    except FileNotFoundError:  # the controller is not on in this group, or it is the root
        return []


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
    """Counts kills. Never blocks.

    systemd removes a scope when its last process is dead, which may be before the kill that did it has been read here: then ``gone`` is
    True, and what the group above says of itself and all below it (``above``) is the only trace of the last kill.
    """

    __slots__ = ("_above", "_fds", "_signalled", "_version", "accounted", "count", "gone", "settled")

    def __init__(self, version: int, fds: list[int]) -> None:
        """Owns ``fds`` from here on."""
        self._version, self._fds, self.count, self.gone = version, fds, 0, False
        self._above = fds.pop() if version == 2 and len(fds) > 1 else -1
        self.settled = False  # what may be found in ``above`` has been
        self._signalled = False  # version 1: of an event whose kill has not been counted yet
        self.read()  # version 2 reports a change since the last read, and the first poll counts as one otherwise
        self.above()
        self.accounted = self.count  # how many of them whoever compares with ``above`` has seen

    def filenos(self) -> list[int]:
        """What to poll; empty if there is nothing to watch."""
        return [*self._fds[:1], *([self._above] if self._above >= 0 else [])]

    @property
    def events(self) -> int:
        """The epoll mask to wait for."""
        return select.EPOLLIN if self._version == 1 else select.EPOLLPRI

    def read(self) -> int:
        """Processes killed for want of memory so far, in the group itself (version 1) or in it and below (version 2).

        To be read after an event and once more when the container has exited: the event of version 1 comes before its kill.
        """
        if not self._fds or self.gone:
            return self.count
        signals = self._signals() if self._version == 1 else 0
        found = _kills(self._fds[-1])
        if found is None:
            self.gone = True
            # The removal signals too. More than that, or one that came while the group was there, was a kill.
            if self._version == 1 and (self._signalled or signals > 1):
                self.count += 1
        elif found > self.count:
            self.count, self._signalled = found, False
        elif signals:
            self._signalled = True
        return self.count

    def _signals(self) -> int:
        try:
            return os.eventfd_read(self._fds[0])
        except BlockingIOError:
            return 0

    def above(self) -> int | None:
        """Kills in the group above and everything below that; None where that is not watched, or gone too."""
        return _kills(self._above) if self._above >= 0 else None

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        if self._above >= 0:
            os.close(self._above)
            self._above = -1


def _kills(fd: int) -> int | None:
    """The counter in an events file; None once its group is gone."""
    try:
        text = os.pread(fd, 4096, 0).decode()
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return None
        raise
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0
