"""One stdio per state directory: a lock file that names its holder, and how a successor gets it."""

from __future__ import annotations

import fcntl
import os
import signal
import time

from shim.linux import libc, process

_LOCK = "stdio.lock"


def take_over(state: int) -> int:
    """The lock of the one stdio of this state directory; an older one is asked, then forced, to let go. Returns the lock's fd.

    Two readers of one FIFO would tear lines apart, so this waits; only one that cannot even be killed (stuck in a dead file system)
    is left behind, since it can read nothing more either.
    """
    fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=state)
    for number, patience in ((None, 0.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        if number is not None:
            _signal_holder(fd, number)
        if _wait_lock(fd, patience):
            break
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d %d\n" % (os.getpid(), process.starttime(os.getpid())), 0)
    return fd


def _wait_lock(fd: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        else:
            return True


def _signal_holder(fd: int, number: int) -> None:
    fields = os.pread(fd, 64, 0).split()
    if len(fields) != 2:
        return  # it has the lock but has not written its name yet
    try:
        holder = libc.pidfd_open(int(fields[0]))
    except ProcessLookupError:
        return
    try:
        if process.starttime(int(fields[0])) == int(fields[1]):
            libc.pidfd_send_signal(holder, number)
    except (ProcessLookupError, FileNotFoundError):
        return  # gone between the two looks
    finally:
        os.close(holder)
