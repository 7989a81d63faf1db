"""Attributes that a child inherits and must not keep, one small function each, plus process identity.

ARCHITECTURE §4: "inherited attributes, as one table, reset in every child". Python leaves SIGPIPE and SIGXFSZ ignored through exec;
a session keyring is shared with whoever forked; so each piece is set to what a freshly logged in process would have.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

from shim.linux import libc

_RLIMITS = 16


class Inherited(NamedTuple):
    """What the supervisor found when it started, before it changed anything for itself; containers get this back."""

    rlimits: tuple[tuple[int, int, int], ...]  # (resource, soft, hard)
    affinity: tuple[int, ...]
    umask: int = 0o022


def save_inherited() -> Inherited:
    """Call once, before raising RLIMIT_NOFILE."""
    limits = tuple((number, *libc.prlimit(0, number)) for number in range(_RLIMITS))
    return Inherited(limits, tuple(sorted(os.sched_getaffinity(0))))


def reset_inherited(saved: Inherited, *, join_keyring: bool = True) -> None:
    """Everything in the table except signals, which were reset right after the fork, and oom_score_adj, which needs a procfs."""
    os.umask(saved.umask)
    os.chdir("/")
    if join_keyring:
        new_session_keyring()
    restore_limits(saved.rlimits)
    reset_scheduling(saved.affinity)


def new_session_keyring(name: str | None = None) -> None:
    """A keyring of its own; a kernel without keys, or a filter above us, answers ENOSYS, EPERM or EDQUOT and there is none to share."""
    try:
        libc.keyctl(libc.KEYCTL_JOIN_SESSION_KEYRING, None if name is None else libc.encode(name))
    except OSError as error:
        if error.errno not in (1, 38, 122):
            raise


def restore_limits(limits: Sequence[tuple[int, int, int]]) -> None:
    """Set each (resource, soft, hard) that differs. A hard limit that may not be raised again keeps its present value."""
    for number, soft, hard in limits:
        current = libc.prlimit(0, number)
        if current == (soft, hard):
            continue
        try:
            libc.prlimit(0, number, (soft, hard))
        except PermissionError:
            libc.prlimit(0, number, (min(soft, current[1]), current[1]))


def reset_scheduling(affinity: Collection[int]) -> None:
    """Affinity, policy SCHED_OTHER at nice 0, no io priority. A nice or policy that may not be lowered stays."""
    if affinity and os.sched_getaffinity(0) != set(affinity):
        os.sched_setaffinity(0, affinity)
    if os.sched_getscheduler(0) != os.SCHED_OTHER or os.getpriority(os.PRIO_PROCESS, 0):
        try:
            libc.sched_setattr(os.SCHED_OTHER, 0)
        except PermissionError:
            libc.sched_setattr(os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0))
    libc.ioprio_set(0)


def set_oom_score_adj(proc: int, score: int) -> int:
    """Write this process's score through the procfs root ``proc``. Returns the score in effect: lowering it below what was inherited
    needs CAP_SYS_RESOURCE, and without it the nearest allowed value stays (ARCHITECTURE §6)."""
    fd = os.open("self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC, dir_fd=proc)
    try:
        try:
            os.write(fd, b"%d" % score)
        except PermissionError:
            return int(os.pread(fd, 16, 0))
        return score
    finally:
        os.close(fd)


def close_all_except(keep: Collection[int]) -> None:
    """Close every fd not in ``keep``. Closed, not close-on-exec: what the container could reach through /proc is gone before it joins."""
    first = 0
    for fd in sorted(keep):
        if fd > first:
            libc.close_range(first, fd - 1)
        first = max(first, fd + 1)
    libc.close_range(first, 0xFFFFFFFF)


def set_dumpable(dumpable: bool) -> None:
    libc.prctl(libc.PR_SET_DUMPABLE, int(dumpable))


def set_subreaper(subreaper: bool = True) -> None:
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, int(subreaper))


def set_parent_death_signal(signal: int) -> None:
    """Cleared by the kernel at execve of a set-id file and whenever credentials change: set it after those."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal)


class _Title:
    """The argv area of this process image, found once; children forked later have it at the same address."""

    __slots__ = ("end", "start")

    def __init__(self) -> None:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        self.start, self.end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49


_title: _Title | None = None


def locate_title() -> None:
    """Find the argv area; needs a visible /proc, so call it at start-up. ``set_title`` in a child then makes no file access."""
    global _title
    if _title is None:
        _title = _Title()


def set_title(title: str) -> None:
    """What ps shows, and the thread name (15 bytes). Only the argv area is overwritten, so a longer title is cut to its length."""
    raw = title.encode(errors="replace").replace(b"\0", b" ")
    libc.prctl(libc.PR_SET_NAME, raw.rpartition(b"/")[2][:15])
    if _title is None or _title.start == 0:
        return
    size = _title.end - _title.start
    libc.overwrite(_title.start, raw[: size - 1].ljust(size, b"\0"))


def starttime(pid: int, proc: int | None = None) -> int:
    """Field 22 of /proc/PID/stat: clock ticks after boot. With the pid it names a process for as long as the machine runs."""
    name = f"{pid}/stat"
    fd = os.open(f"/proc/{name}" if proc is None else name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        # The name in parentheses may hold anything, also ") R 1"; the last parenthesis ends it.
        return int(os.read(fd, 4096).rpartition(b")")[2].split()[19])
    finally:
        os.close(fd)


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
