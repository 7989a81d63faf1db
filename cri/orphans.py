"""Processes whose supervisor died: they are the daemon's children now, if the daemon started that supervisor, or somebody else's.

Each is watched and reaped by its own pidfd, so that nothing of asyncio's is ever taken. What nobody knows by pid is told from the
daemon's own children: helpers of the dead supervisor by their session; containers and exec'd processes whose start was never answered by
their PID namespace, which cannot end, nor its pod, before they are reaped; and anything else by nobody having reaped it for a while.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from shim.linux import libc, process

_TRIES, _PAUSE = 20, 0.1  # of asking the kernel for a status that another parent has still to reap
_STALE = 5.0  # seconds after which an ended child is nobody's: asyncio reaps its own at once


class Orphans:
    """``ended(pid, wait status)`` is called once for each watched process; ``statuses`` keeps them for a successor."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ended: Callable[[int, int], None]) -> None:
        self._loop, self._ended = loop, ended
        self._pidfds: dict[int, int] = {}
        self._sessions: set[int] = set()  # of dead supervisors and of processes they left
        self._listening = False
        self._unclaimed: dict[int, float] = {}  # ended children that may be asyncio's, and when they were first seen
        self._again: asyncio.TimerHandle | None = None
        self.statuses: dict[int, int] = {}

    def watch(self, pid: int, starttime: int | None, *, pidfd: int = -1) -> None:
        """Watch ``pid``; without a pidfd it is looked up, and is the right one only if it started at ``starttime``."""
        if pid in self._pidfds:
            if pidfd >= 0:
                os.close(pidfd)
            return
        if pidfd < 0:
            try:
                pidfd = libc.pidfd_open(pid)
            except ProcessLookupError:
                return
            if not _started_at(pid, starttime):
                os.close(pidfd)
                return
        self._pidfds[pid] = pidfd
        self._sessions.add(pid)
        self._loop.add_reader(pidfd, self._readable, pid, pidfd)

    def _readable(self, pid: int, pidfd: int, tries: int = 0) -> None:
        if self._pidfds.get(pid) != pidfd:
            return
        self._loop.remove_reader(pidfd)
        status = _reap(pidfd)
        if status is None and tries < _TRIES:
            self._loop.call_later(_PAUSE, self._readable, pid, pidfd, tries + 1)
            return
        del self._pidfds[pid]
        os.close(pidfd)
        if status is not None:
            self.statuses[pid] = status
            self._ended(pid, status)

    def reap_supervisor(self, pid: int, pidfd: int) -> None:
        """Take over from a supervisor that has died or is about to: it is reaped if it was ours, and so are its helpers as they end."""
        self._sessions.add(pid)
        if not self._listening:
            self._listening = True
            self._loop.add_signal_handler(signal.SIGCHLD, self._reap_helpers)

        def dead() -> None:
            self._loop.remove_reader(pidfd)
            _reap(pidfd)
            os.close(pidfd)
            self._reap_helpers()

        self._loop.add_reader(pidfd, dead)

    def _reap_helpers(self) -> None:
        now, unclaimed = self._loop.time(), {}
        for pid in _children():
            if pid in self._pidfds:
                continue
            state, session = _state_and_session(pid)
            if state != "Z":
                continue
            inside = _pid_inside(pid)
            since = self._unclaimed.get(pid, now)
            if inside or session in self._sessions or pid in self._sessions or now - since >= _STALE:
                self._reap_unknown(pid, first=inside == 1)
            else:
                unclaimed[pid] = since
        self._unclaimed = unclaimed
        if unclaimed and self._again is None:
            self._again = self._loop.call_later(_STALE, self._look_again)

    def _look_again(self) -> None:
        self._again = None
        self._reap_helpers()

    def _reap_unknown(self, pid: int, first: bool) -> None:
        """``first``: it was a container, and whoever adopts that wants its status."""
        try:
            result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return
        if first and result is not None:
            self.statuses[pid] = result.si_status << 8 if result.si_code == os.CLD_EXITED else result.si_status
            self._ended(pid, self.statuses[pid])

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._listening:
            self._loop.remove_signal_handler(signal.SIGCHLD)
            self._listening = False
        for pidfd in self._pidfds.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._pidfds.clear()


def _reap(pidfd: int) -> int | None:
    """The wait status of an ended process: by reaping it, or from the kernel after its parent has (Linux 6.15)."""
    try:
        result = libc.waitid_pidfd(pidfd)
    except ChildProcessError:
        return libc.pidfd_info_exit(pidfd)
    if result is None:
        return None
    return result.status << 8 if result.code == os.CLD_EXITED else result.status


def _started_at(pid: int, starttime: int | None) -> bool:
    try:
        return process.starttime(pid) == starttime
    except (FileNotFoundError, ProcessLookupError):
        return False


def _pid_inside(pid: int) -> int:
    """Its number in the innermost PID namespace; 0 if that is our own."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            numbers = next((line.split()[1:] for line in file if line.startswith(b"NSpid:")), [])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(numbers[-1]) if len(numbers) > 1 else 0


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        try:
            yield from map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue


def _state_and_session(pid: int) -> tuple[str, int]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0].decode(), int(fields[3])
