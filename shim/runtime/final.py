"""From a finished root to execve: the part that creating a container and an exec session share."""

from __future__ import annotations

import fcntl
import gc
import os
import termios
from dataclasses import dataclass
from typing import NoReturn

from shim.errors import Failure
from shim.linux import process
from shim.oci.spec import Process, User
from shim.runtime import inside, launch
from shim.runtime.channel import Channel
from shim.runtime.context import Context
from shim.runtime.lastfork import LastFork, LastForkFailed
from shim.seccomp import Filter
from shim.security import Restriction


def start_clean(context: Context, oom_score_adj: int | None) -> None:
    """Shed what the supervisor's attributes would lend the process; everything set here survives forks and execve."""
    process.reset_inherited(context.inherited)
    process.set_oom_score_adj(context.proc, oom_score_adj or 0)


@dataclass(slots=True)
class Final:
    """A process that is ready but for its restrictions and execve."""

    restriction: Restriction
    program: inside.Program
    user: User
    terminal: bool
    stdio: tuple[int, int, int]

    @classmethod
    def prepare(
        cls, spec: Process, home: str, rootfd: int, stdio: tuple[int, int, int] | None, filter_: Filter | None
    ) -> tuple[Final, int | None]:
        """Open a console if one is asked for, set limits, build what is to be executed. Returns the pty's master too.

        The user is resolved. ``stdio`` is None exactly where ``spec.terminal`` is set.
        """
        master: int | None = None
        if stdio is None:
            console = inside.open_console(rootfd, spec.console_size, spec.user)
            master, stdio = console.master, (console.slave, console.slave, console.slave)
        else:
            inside.own_stdio(stdio, spec.user)
        inside.set_rlimits(spec)
        os.umask(0o022 if spec.user.umask is None else spec.user.umask)
        restriction = Restriction(spec, filter_)
        program = inside.Program(spec, home)
        return cls(restriction, program, spec.user, spec.terminal, stdio), master

    @property
    def listened(self) -> bool:
        """Whether the filter has a listener, which is handed over by a line that cannot be narrowed (``listener``)."""
        return self.restriction.filter is not None and self.restriction.filter.notifies

    def close_others(self, channel: Channel) -> None:
        """stdio to 0..2 and everything else but the channel closed, before the user can be told anything about us."""
        inside.place_stdio(self.stdio)
        process.close_all_except({*launch.STDIO, *channel.fds()})

    def run(self, channel: Channel) -> NoReturn:
        """Become the program in this process."""
        gc.disable()
        self.program.build()
        try:
            self._lead_session()
            self.restriction.set_groups()
            self.restriction.apply()
            self.restriction.install_last()
            self.program.run()
        except BaseException as error:
            launch.report(channel, error)
            os._exit(127)

    def run_in_child(self, pid_address: int) -> None:
        """Restrict this process, then fork the program as its sibling; returns in the parent. The kernel writes the pid.

        For PID namespaces that others live in: what they can see is restricted already and does nothing but execve.
        """
        gc.disable()
        last = self.restriction.filter if self.restriction.no_new_privileges else None
        listened = last is not None and last.notifies
        if listened:
            last = None  # its listener has to end up in this process, see ``listener``
        fork = LastFork(self.program.command, terminal=self.terminal, filter_=last, pid_address=pid_address)
        self.restriction.set_groups()
        self.restriction.apply()
        if listened:
            self.restriction.install_last()
        try:
            fork.run()
        except LastForkFailed as failed:
            if failed.step == "exec":
                raise self.program.failure(failed.errno) from None
            raise Failure("start", failed.step, errno=failed.errno) from None

    def _lead_session(self) -> None:
        os.setsid()
        if self.terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
