"""From a finished root to execve, for processes of PID namespaces that others live in: containers and exec sessions."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc, process
from shim.oci import command
from shim.oci.spec import Process, User
from shim.runtime import bare, inside, launch, program
from shim.runtime.channel import Channel
from shim.runtime.context import Context
from shim.runtime.program import At, Bpf, Kind
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
        return cls(restriction, inside.Program(spec, home), spec.user, spec.terminal, stdio), master

    @property
    def listened(self) -> bool:
        """Whether the filter has a listener, which is handed over by a line that cannot be narrowed (``listener``)."""
        return self.restriction.filter is not None and self.restriction.filter.notifies

    def close_others(self, channel: Channel) -> None:
        """stdio to 0..2 and everything else but the channel closed, before the user can be told anything about us."""
        inside.place_stdio(self.stdio)
        process.close_all_except({*launch.STDIO, *channel.fds()})

    def run_in_child(self, pid_address: int) -> None:
        """Restrict this process, then fork the program as its sibling; returns in the parent. The kernel writes the pid.

        For PID namespaces that others live in: what they can see is restricted already and does nothing but setsid and execve.
        """
        gc.disable()
        restriction = self.restriction
        last = restriction.filter if restriction.filter is not None and restriction.no_new_privileges else None
        listened = last is not None and last.notifies
        if listened:
            last = None  # its listener has to end up in this process, see ``listener``
        region, status = self._plan(Bpf(last.bpf, last.flags) if last is not None else Bpf(b"", 0), pid_address)
        bare.hold_back(region, status)
        restriction.set_groups()
        restriction.apply()
        if listened:
            restriction.install_last()
        try:
            bare.fork(region)
        except OSError as error:
            raise Failure.wrap("start", "clone", error) from None
        step, number = status.report()
        if number:
            raise self.program.failure(number) if step == At.EXEC else Failure("start", At(step).name.lower(), errno=number)

    def _plan(self, filter_: Bpf, pid_address: int) -> tuple[bare.Region, bare.Region]:
        """The memory of the program, and what it shares with us: the report. CLONE_VFORK makes us wait for its execve or its end."""
        args, env = self.program.args, self.program.env
        size = program.DATA + len(filter_.bpf) + len(command.block(args, env)) + 4096
        region, status = bare.Region(size, shared=False), bare.Region(program.REPORT.size, shared=True)
        w = program.Writer(region.base, -1, report_at=status.base)
        w.clone = (program.NR["clone"], libc.CLONE_VFORK | libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID, 0, pid_address)
        program.lead_session(w, terminal=self.terminal)
        program.install_filter(w, filter_)
        at = w.data(b"")
        w.call(At.EXEC, "", w.data(command.block(args, env, at)), kind=Kind.CANDIDATES)
        region.write(w.image())
        return region, status
