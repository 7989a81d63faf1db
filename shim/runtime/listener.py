"""How the listener of a seccomp filter gets out of the process that installed it.

The kernel hands the listener to whoever installs the filter, and from then on the filter decides what that process may do: not
necessarily sendmsg. So another process shares its table of open files (CLONE_FILES) and sleeps (CLONE_VFORK) until it executes the program
or ends. execve(2) gives the program a table of its own, in which the listener is closed; the sleeper finds it in the old one, sends it
to the supervisor and exits. The profile need allow nothing for that.

Who sleeps must not be seen inside the container: it is forked before a PID namespace is joined. Where the container's first process is
born into a new one, a thread of its own does it (``program.install_filter``).
"""

from __future__ import annotations

import os
from typing import NoReturn

from shim.linux import libc, process
from shim.runtime import launch
from shim.runtime.channel import Channel
from shim.seccomp import notify

_SHARED = libc.CLONE_FILES | libc.CLONE_VFORK


def go_on_in_child(channel: Channel) -> None:
    """Return in a child of the supervisor's, forked here, while this process waits for it and then hands over what it left."""
    pid, _ = libc.clone3(_SHARED | libc.CLONE_PARENT, exit_signal=0)
    if pid == 0:
        process.set_dumpable(False)
        launch.die_with_supervisor()
        return
    _hand_over(channel)


def _hand_over(channel: Channel) -> NoReturn:
    """After the sleep. A launch that failed left nothing, and has said why."""
    first = 3 if channel.fileno() != 3 else 4  # all but stdio and the channel was closed, and the kernel takes the lowest number
    if notify.is_listener(first):
        channel.send({"ok": {"fds": ["listener"]}}, (first,))
    os._exit(0)
