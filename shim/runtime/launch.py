"""How the supervisor forks a child: clone3, then hygiene in a fixed order before anything is joined (ARCHITECTURE §4, Children)."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn, Protocol

from shim.errors import Failure
from shim.linux import libc, process
from shim.runtime.channel import Channel

STDIO = frozenset({0, 1, 2})  # /dev/null and the supervisor's log; kept so that nothing else lands on these numbers
_SIGNALS = tuple(signal.valid_signals())


class Job(Protocol):
    """What a child does. ``keep`` names the fds that it needs beside stdio and its channel."""

    @property
    def keep(self) -> Collection[int]: ...

    def __call__(self, channel: Channel) -> None: ...


@dataclass(frozen=True, slots=True)
class Child:
    pid: int
    pidfd: int
    channel: socket.socket  # the supervisor's end, non-blocking


def spawn(job: Job, *, title: str, cgroup: int | None = None) -> Child:
    """Fork a child that runs ``job`` and exits; ``cgroup`` is the fd of a cgroup v2 directory to be born in.

    Raises OSError from clone3, for example EBUSY where ``cgroup`` may not hold processes.
    """
    global _parent
    _parent = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid, pidfd = libc.clone3(libc.CLONE_CLEAR_SIGHAND, pidfd=True, cgroup=cgroup)
        if pid == 0:
            run_child(job, Channel(theirs), title)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    ours.setblocking(False)
    return Child(pid, pidfd, ours)


_parent = 0  # pid of the process that spawns, as its children must still find it


def die_with_supervisor() -> None:
    """For a job whose result nobody could take over: SIGKILL when the supervisor dies, also if it has died already.

    Forked children do not inherit this (prctl(2)), so a container's init outlives us both.
    """
    process.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != _parent:
        os._exit(1)


def ids_changed() -> None:
    """A change of ids undoes both (prctl(2)): memory that others may read, and the end that comes with the supervisor's."""
    process.set_dumpable(False)
    die_with_supervisor()


def run_child(job: Job, channel: Channel, title: str) -> NoReturn:
    """The child's whole life. Every way out is ``_exit``: no handler, buffer or traceback of the parent's runs in here."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            # CLONE_CLEAR_SIGHAND resets handlers only. Ignored are those that Python, the supervisor or its starter ignores, and
            # ignored survives execve.
            if signal.getsignal(number) is signal.SIG_IGN:
                libc.default_signal(number)
        libc.set_signal_mask(0)
        process.close_all_except({*STDIO, channel.fileno(), *job.keep})
        process.set_dumpable(False)
        process.set_title(title)
        job(channel)
        code = 0
    except BaseException as error:
        report(channel, error)
    finally:
        os._exit(code)


def report(channel: Channel, error: BaseException) -> None:
    """Tell the supervisor why, with nothing that could touch a file system (no traceback: it would open source paths)."""
    if isinstance(error, Failure):
        failure = error
    elif isinstance(error, OSError):
        failure = Failure.wrap("runtime", "system call", error)
    else:
        failure = Failure("runtime", message=f"{type(error).__name__}: {error}"[:500])
    try:
        channel.send({"error": failure.to_json()})
    except OSError:
        os._exit(2)


@dataclass(frozen=True, slots=True)
class Call:
    """A job that calls one function and answers ``{"ok": {}}``."""

    function: Callable[[], None]
    keep: Collection[int] = ()

    def __call__(self, channel: Channel) -> None:
        self.function()
        channel.send({"ok": {}})
