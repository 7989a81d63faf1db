"""Spawning the exec agent: one vfork and execve per session, and a program that is planned once per container."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.errors import Failure
from shim.linux import libc
from shim.oci import codec
from shim.oci.spec import Process
from shim.runtime import agent, kept
from shim.runtime.channel import hang_up, new_report
from shim.runtime.context import Context
from shim.supervisor.children import Children

if TYPE_CHECKING:
    from shim.supervisor.table import Container

_RESERVED = 16  # numbers below are the agent's: what is passed to it must lie above, or one dup2 would run over the next one's source
_PROGRAMS = 8  # kept per container; there is one, unless sessions differ in their streams
_RLIMITS = 16
_TITLE = "cri-shim: exec"


@dataclass(slots=True)
class Program:
    """A planned program: its memfd, and what it was planned for."""

    fd: int
    process: Process


@dataclass(slots=True, eq=False)
class Launch:
    """An agent on its way. ``pid`` is that of the process it forked last, 0 before.

    ``life`` hangs up when it is over, ``report`` has the error: see ``shim.runtime.channel``.
    """

    life: int
    report: int
    result: int
    agent_pid: int

    @property
    def pid(self) -> int:
        return int.from_bytes(os.pread(self.result, 4, 0), "little")

    def close(self) -> None:
        for fd in (self.life, self.report, self.result):
            os.close(fd)


class Agents:
    """``program`` and ``spawn``. ``usable`` is False where this machine does not let memory files be executed (vm.memfd_noexec)."""

    def __init__(self, children: Children, context: Context) -> None:
        self._children, self._context = children, context
        self._image = f"/proc/self/fd/{libc.sealed_memfd('cri-shim-exec', agent.image())}"
        self._limits = [libc.prlimit(0, number) for number in range(_RLIMITS)]
        ignored = (s for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN)
        self._ignored = tuple(int(s) for s in ignored)
        self._devnull = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.usable = self._try()

    def _try(self) -> bool:
        """A program that is none: the agent cannot map it and exits with 127. What may fail is the execve before."""
        try:
            pid = os.posix_spawn(self._image, [_TITLE], {})
        except PermissionError:
            return False
        os.waitpid(pid, 0)
        return True

    def program(self, container: Container, facts: str, streams: dict[str, int]) -> Program | None:
        """The program for sessions of this container that are alike; None for a container that takes the long way."""
        pipes = frozenset(
            number for number, name in enumerate(("stdin", "stdout", "stderr")) if name in streams and _is_pipe(streams[name])
        )
        key = (facts, pipes)
        found = container.programs.get(key)
        if found is not None:
            return found
        process = codec.decode(Process, facts.encode())
        remembered = kept.load(container.bundle)
        if not agent.suits(process, remembered) or container.group is None:
            return None
        if len(container.programs) >= _PROGRAMS:
            os.close(container.programs.pop(next(iter(container.programs))).fd)
        code = agent.plan(process, container.group, remembered, self._context.inherited, self._limits, pipes)
        made = container.programs[key] = Program(libc.sealed_memfd("cri-shim-program", code), process)
        return made

    def spawn(self, program: Program, block: int, init: int, streams: dict[str, int]) -> Launch:
        """Start the agent. Raises Failure."""
        (life, theirs), report = hang_up(), new_report()
        result = os.memfd_create("cri-shim-pid", os.MFD_CLOEXEC)
        os.ftruncate(result, 4096)
        stdio = [streams.get(name, self._devnull) for name in ("stdin", "stdout", "stderr")]
        lifted: list[int] = []
        sources = (*stdio, program.fd, report, init, result, block, theirs)
        actions = [(os.POSIX_SPAWN_DUP2, _lift(source, lifted), number) for number, source in enumerate(sources)]
        launch = Launch(life, report, result, 0)
        self._children.launches.add(launch)
        try:
            launch.agent_pid = os.posix_spawn(
                self._image, [_TITLE], {}, file_actions=actions, setsigmask=(), setsigdef=self._ignored
            )
        except OSError as error:
            self.forget(launch)
            raise Failure.wrap("exec", "spawn", error) from None
        finally:
            os.close(theirs)
            for fd in lifted:
                os.close(fd)
        return launch

    def forget(self, launch: Launch) -> None:
        self._children.launches.discard(launch)
        launch.close()


def _lift(fd: int, lifted: list[int]) -> int:
    """``fd``, or a copy of it above the agent's numbers, which goes into ``lifted``."""
    if fd >= _RESERVED:
        return fd
    lifted.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _RESERVED))
    return lifted[-1]


def _is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)

