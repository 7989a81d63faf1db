"""The first process of a container with a PID namespace of its own: it is forked early, waits, and becomes the user's program.

Only a member can mount the procfs of a PID namespace, and on cgroup v2 the group's own view of the hierarchy, so there has to be a process
while the root is still being put together. It is no copy of us: a program of system calls (``program``, ``bare``) in three parts.

1. Join the cgroup, mount what takes a member, hand the mounts over. Wait.
2. Take what has become known meanwhile (working directory, terminal), set limits, say so. Wait for start.
3. Restrict itself in the order of ``shim.security``, and execve.

The launch talks to it over a socket pair, whose end of file ends it. From part 2 on it has the supervisor's line: start comes over that,
reports go over it, its end of file tells the supervisor of a successful execve, and the supervisor's end of file ends it.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc
from shim.oci import command
from shim.oci.spec import Process
from shim.rootfs.plan import Filesystem
from shim.runtime import bare, program
from shim.runtime.context import Context
from shim.runtime.program import NONE, At, Kind, Writer

_LINE, _GATE, _FREE = 3, 4, 5  # its fds beside stdio
_RESERVED = 16  # fds that are copied to those numbers lie from here on: else one copy would run over the next one's source
_EACCES = 13
_BPF, _STRINGS = 64 << 10, 16 << 10  # bytes: room for a filter, and for whatever is neither filter nor command
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1


@dataclass(frozen=True, slots=True)
class Birth:
    """How it comes into the world."""

    context: Context
    process: Process
    stdio: tuple[int, int, int] | None  # None: a terminal, which there will be later
    line: int  # its end of the supervisor's line
    slot: int  # where the kernel is to write its pid
    tasks: Sequence[int]  # open files of cgroup v1 to join by
    group: int | None  # directory of cgroup v2 to be born in
    cgroup_namespace: bool
    user_namespace: bool
    pid_namespace: bool  # still to be made; otherwise it is this process's for children
    filesystems: Sequence[Filesystem]  # to be mounted by it


class Init:
    """The launch's side. ``close`` without ``finish`` ends the process."""

    def __init__(self, birth: Birth) -> None:
        """Fork it. Raises Failure."""
        self._birth = birth
        size = program.DATA + _BPF + _STRINGS + len(command.block(birth.process.args, birth.process.env))
        self._region = bare.Region(size, shared=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._gate, self._lifted = ours, list[int]()
        self.pidfd = -1
        try:
            self._writer = _first(birth, self._region.base, self._lift(theirs.fileno()), [self._lift(fd) for fd in self._sources()])
            self._fork()
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
            for fd in self._lifted:
                os.close(fd)

    def _sources(self) -> tuple[int, ...]:
        return self._birth.line, self._birth.context.proc, *(self._birth.stdio or ())

    def _lift(self, fd: int) -> int:
        if fd >= _RESERVED:
            return fd
        self._lifted.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _RESERVED))
        return self._lifted[-1]

    def _fork(self) -> None:
        birth, w = self._birth, self._writer
        flags = libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID | libc.CLONE_PIDFD
        if birth.pid_namespace:
            flags |= libc.CLONE_NEWPID
        if birth.group is not None:
            flags |= libc.CLONE_INTO_CGROUP
        pidfd = w.data(bytes(8))
        tid = birth.context.slots.address(birth.slot)
        args = libc.CLONE_ARGS.pack(flags, pidfd, 0, tid, 0, 0, 0, 0, 0, 0, birth.group or 0)
        w.clone = (program.NR["clone3"], w.data(args), len(args), 0)
        self._region.write(w.image())
        bare.hold_back(self._region)
        try:
            bare.fork(self._region)
        except OSError as error:
            raise Failure.wrap("create container", "clone3", error) from None
        self.pidfd = self._region.integer(pidfd)

    def _hear(self) -> tuple[bytes, array.array[int]]:
        """Its next word, and the fds beside it. Raises Failure with its report, or if it has died."""
        data, ancillary, _, _ = self._gate.recvmsg(program.REPORT.size, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, item in ancillary:
            fds.frombytes(item)
        if len(data) == program.REPORT.size:
            raise program.failure(data, "create container")
        if not data:
            raise Failure("create container", message="the container's first process died")
        return data, fds

    def mounts(self) -> list[int]:
        """What it has mounted, in the order of ``Birth.filesystems``. To be asked for once; raises Failure."""
        _, fds = self._hear()
        return fds.tolist()

    def finish(self, process: Process, home: str, cwd: int, slave: int | None, bpf: bytes, flags: int, *, held: bool) -> None:
        """Part 2, and part 3 as far as that can be told now. ``process`` is complete. ``held``: it waits for ``release`` before the user's
        program, and otherwise for the supervisor's word. Returns when all but start has succeeded; raises Failure."""
        w = self._writer
        before = w.count, len(w.blob)
        _second(w, self._birth, process, slave is not None, held=held)
        _third(w, process, home, slave is not None, program.Bpf(bpf, flags, _LINE, _LINE + 1))
        self._region.complete(w, before)
        fds = [cwd] if slave is None else [cwd, slave]
        self._gate.sendmsg([b"g"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        self._hear()

    def release(self) -> None:
        self._gate.send(b"s")

    def close(self) -> None:
        """Ours only: a process that is on its own stays."""
        self._gate.close()
        self._region.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _first(birth: Birth, base: int, gate: int, sources: Sequence[int]) -> Writer:
    w = Writer(base, _GATE)
    for fd in birth.tasks:
        w.call(At.CGROUP, "write", fd, w.data(b"0"), 1)
    score = b"%d" % (birth.process.oom_score_adj or 0)
    w.call(At.PREPARE, "dup3", gate, _GATE, os.O_CLOEXEC)
    w.call(At.PREPARE, "dup3", sources[0], _LINE, os.O_CLOEXEC)
    w.call(At.PREPARE, "dup3", sources[1], _FREE, os.O_CLOEXEC)
    for number, fd in enumerate(sources[2:]):
        w.call(At.STDIO, "dup3", fd, number, 0)
    w.call(At.PREPARE, "close_range", _FREE + 1, NONE, 0)
    if not birth.user_namespace:  # inside one it may not
        # Through a procfs that is mounted nowhere: "self" is this process in it, too.
        program.write_file(w, At.OOM_SCORE, _FREE, "self/oom_score_adj", score, fd=_FREE + 1, allowed=_EACCES)
    program.label(w, birth.process, _FREE, "self", fd=_FREE + 1)
    w.call(At.PREPARE, "close", _FREE)
    if birth.cgroup_namespace:
        w.call(At.NAMESPACES, "unshare", libc.CLONE_NEWCGROUP)
    for filesystem in birth.filesystems:
        _mount(w, filesystem)
    mounts = range(_FREE + 1, _FREE + 1 + len(birth.filesystems))
    w.call(At.PREPARE, "sendmsg", _GATE, program.message(w, b"m", mounts), socket.MSG_NOSIGNAL)
    w.call(At.PREPARE, "close_range", _FREE, NONE, 0)
    room = w.data(bytes(socket.CMSG_SPACE(4 * 2)))
    w.call(At.PREPARE, "recvmsg", _GATE, program.header(w, w.data(bytes(8)), 8, room, socket.CMSG_SPACE(4 * 2)), 0, kind=Kind.EXPECT)
    return w


def _mount(w: Writer, filesystem: Filesystem) -> None:
    """A detached mount at the lowest free fd above ``_FREE``."""
    w.call(At.MOUNT, "fsopen", w.text(filesystem.fstype), _FSOPEN_CLOEXEC)
    for key, value in filesystem.options.items():
        if value is None:
            w.call(At.MOUNT, "fsconfig", _FREE, _FSCONFIG_SET_FLAG, w.text(key), 0, 0)
        else:
            w.call(At.MOUNT, "fsconfig", _FREE, _FSCONFIG_SET_STRING, w.text(key), w.text(value), 0)
    w.call(At.MOUNT, "fsconfig", _FREE, _FSCONFIG_CMD_CREATE, 0, 0, 0)
    w.call(At.MOUNT, "fsmount", _FREE, _FSMOUNT_CLOEXEC, filesystem.attributes)
    w.call(At.MOUNT, "close", _FREE)


def _second(w: Writer, birth: Birth, process: Process, terminal: bool, *, held: bool) -> None:
    # The root was changed under it (pivot_root(2) moves everybody whose root or working directory was the old root).
    w.call(At.DIRECTORY, "fchdir", _FREE)
    if terminal:
        for number in range(3):
            w.call(At.STDIO, "dup3", _FREE + 1, number, 0)
    w.call(At.PREPARE, "close_range", _FREE, NONE, 0)
    w.call(At.PREPARE, "keyctl", libc.KEYCTL_JOIN_SESSION_KEYRING, 0, kind=Kind.ANY)
    w.call(At.PREPARE, "umask", 0o022 if process.user.umask is None else process.user.umask)
    raising = None if not birth.user_namespace else False  # inside one, nobody can
    program.set_limits(w, process, birth.context.inherited, _current(fresh=birth.user_namespace), raising=raising)
    w.call(At.PREPARE, "write", _GATE, w.data(b"r"), 1)
    if held:
        w.call(At.PREPARE, "read", _GATE, w.data(bytes(8)), 8, kind=Kind.EXPECT)
    w.report_to(_LINE)
    w.call(At.PREPARE, "close", _GATE)
    if not held:
        w.call(At.PREPARE, "read", _LINE, w.data(bytes(64)), 64, kind=Kind.EXPECT)


def _third(w: Writer, process: Process, home: str, terminal: bool, filter_: program.Bpf) -> None:
    env = list(process.env)
    if not any(entry.startswith("HOME=") for entry in env):
        env.append(f"HOME={home}")
    at = w.data(b"")
    block = w.data(command.block(process.args, env, at))
    program.lead_session(w, terminal=terminal)
    program.restrict(w, process, filter_)
    if process.no_new_privileges:
        program.install_filter(w, filter_)
    w.call(At.EXEC, "", block, kind=Kind.CANDIDATES)


_limits: list[tuple[int, int]] = []


def _current(*, fresh: bool) -> list[tuple[int, int]]:
    """The limits of this process, which it changes for user namespaces only."""
    if fresh:
        return [libc.prlimit(0, number) for number in range(16)]
    if not _limits:
        _limits.extend(_current(fresh=True))
    return _limits
