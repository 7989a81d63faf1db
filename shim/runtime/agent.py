"""Exec sessions without a copy of the interpreter: a list of system calls, planned here, made by a static program of 300 bytes.

Forking a warm CPython costs two milliseconds of CPU in parent and child, more than everything an exec has to do. So the supervisor
spawns the agent (vfork and execve: nothing is copied) and hands it a program (``shim.runtime.program``) in the order of
``shim.runtime.exec``, from the keyring to execve. The program is made once per container and kept. It holds nothing secret: arguments
and environment come as a block that the daemon has laid out
(``shim.oci.command``), which only the agent maps.

What is seen inside the container is the process forked last, as everywhere: restricted for good, without memory of ours (the program
and the block are all it has), and with nothing to do but setsid and execve.

Terminals, user namespaces and users that have to be looked up take the long way (``shim.runtime.exec``).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Sequence

from shim.cgroups import Group
from shim.errors import Failure
from shim.linux import cpus, elf, libc
from shim.linux.process import Inherited
from shim.oci.command import BLOCK, BLOCK_SIZE
from shim.oci.spec import Process
from shim.runtime import program
from shim.runtime.kept import Kept
from shim.runtime.program import AT_FDCWD, NONE, REPORT, At, Kind, Writer, write_file

PROGRAM = 0x10000000  # where the agent maps its program
_RESULT = 0x0F000000  # where it maps the page in which the kernel leaves the pid
PROGRAM_FD, REPORT_FD, INIT_FD, RESULT_FD, BLOCK_FD, LIFE_FD, FREE_FD = 3, 4, 5, 6, 7, 8, 9
_NAMESPACES = (
    libc.CLONE_NEWNS | libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS | libc.CLONE_NEWPID | libc.CLONE_NEWCGROUP
)
_EACCES, _EAGAIN, _EBUSY, _EOPNOTSUPP = 13, 11, 16, 95


def failure(report: bytes, process: Process) -> Failure:
    """What the agent's report means; ``process`` is what was planned."""
    return program.failure(report, "exec", process.cwd if report[:4] == At.DIRECTORY.to_bytes(4, "little") else "")


def needs_the_long_way(report: bytes) -> bool:
    """Whether the error is one that ``shim.runtime.exec`` knows how to deal with: a lookup that raced, a group that has groups."""
    return len(report) == REPORT.size and REPORT.unpack(report) in ((At.DIRECTORY, _EAGAIN), (At.CGROUP, _EBUSY), (At.CGROUP, _EOPNOTSUPP))


def image(machine: str = elf.MACHINE) -> bytes:
    """The agent's executable."""
    return elf.executable(program.CODE[machine], machine)


def suits(process: Process, kept: Kept) -> bool:
    """Whether a session can be planned: no terminal, no name to look up, no user namespace to enter, no listener to hand over."""
    plain = not process.terminal and not process.user.username and process.user.groups_policy is None
    return plain and kept.root is None and not kept.notifies


def plan(
    process: Process, group: Group, kept: Kept, inherited: Inherited, current: Sequence[tuple[int, int]], pipes: Collection[int]
) -> bytes:
    """PURE: the program for sessions that are like ``process`` but for arguments and environment.

    ``inherited`` is what containers get back of limits, ``current`` the supervisor's (soft, hard) by resource number, ``pipes`` those of
    0, 1 and 2 that are to belong to the user.
    """
    w = Writer(PROGRAM, REPORT_FD)
    w.call(At.PREPARE, "close_range", FREE_FD, NONE, 0)
    if group.version == 2:
        _be_born_in(w, group)
    program.label(w, process, AT_FDCWD, "/proc/self", fd=FREE_FD)
    _prepare(w, kept)
    if process.exec_cpu_affinity is not None and process.exec_cpu_affinity.initial:
        _set_affinity(w, process.exec_cpu_affinity.initial)
    if group.version == 1:
        for directory in group.directories:
            write_file(w, At.CGROUP, AT_FDCWD, f"{directory}/tasks", b"0", fd=FREE_FD)
        if group.unified:
            write_file(w, At.CGROUP, AT_FDCWD, f"{group.unified}/cgroup.procs", b"0", fd=FREE_FD)
    affinity = process.exec_cpu_affinity
    if affinity is not None and affinity.final:
        _set_affinity(w, affinity.final)
    score = b"%d" % (process.oom_score_adj or 0)
    write_file(w, At.OOM_SCORE, AT_FDCWD, "/proc/self/oom_score_adj", score, fd=FREE_FD, allowed=_EACCES)
    program.set_limits(w, process, inherited, current)
    for fd in sorted(pipes):
        w.call(At.STDIO, "fchown", fd, process.user.uid, NONE)
    w.call(At.NAMESPACES, "setns", INIT_FD, _NAMESPACES)
    _enter_directory(w, process.cwd)
    _restrict(w, process, kept)
    return w.image()


def _be_born_in(w: Writer, group: Group) -> None:
    """Version 2: a move takes long there, so fork into the group and go on as the child."""
    w.call(At.CGROUP, "openat", AT_FDCWD, w.text(group.directories[0]), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    flags = libc.CLONE_PARENT | libc.CLONE_INTO_CGROUP
    args = w.data(struct.pack("<11Q", flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, FREE_FD))
    w.fork(At.CGROUP, "clone3", args, 88)
    w.call(At.CGROUP, "close", FREE_FD)


def _prepare(w: Writer, kept: Kept) -> None:
    private, shared, fixed, read_write = 2, 1, 16, 3
    w.call(At.PREPARE, "prctl", libc.PR_SET_PDEATHSIG, 9)
    w.call(At.PREPARE, "prctl", libc.PR_SET_DUMPABLE, 0)
    w.call(At.PREPARE, "mmap", _RESULT, 4096, read_write, shared | fixed, RESULT_FD, 0)
    w.call(At.PREPARE, "madvise", _RESULT, 4096, 10)  # MADV_DONTFORK: who gets to see the process forked last cannot write there
    w.call(At.PREPARE, "mmap", BLOCK, BLOCK_SIZE, read_write, private | fixed, BLOCK_FD, 0)
    w.call(At.PREPARE, "", BLOCK + 16, w.text(f"HOME={kept.home}"), kind=Kind.STORE)
    for number in (32, 33):  # posix_spawn leaves the C library's own signals ignored
        w.call(At.PREPARE, "rt_sigaction", number, w.data(bytes(32)), 0, 8)
    w.call(At.PREPARE, "keyctl", libc.KEYCTL_JOIN_SESSION_KEYRING, 0, kind=Kind.ANY)
    w.call(At.PREPARE, "ioprio_set", 1, 0, 0)


def _set_affinity(w: Writer, processors: str) -> None:
    try:
        mask = cpus.mask(processors)
    except ValueError as error:
        raise Failure("exec", message=str(error), path="process.execCPUAffinity") from None
    w.call(At.AFFINITY, "sched_setaffinity", 0, len(mask), w.data(mask))


def _enter_directory(w: Writer, cwd: str) -> None:
    """The working directory, found below the root without magic links (CVE-2024-21626)."""
    path_directory = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = w.data(struct.pack("<QQQ", path_directory, 0, 0x10 | 0x02))  # RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    w.call(At.DIRECTORY, "openat", AT_FDCWD, w.text("/"), path_directory)
    w.call(At.DIRECTORY, "openat2", FREE_FD, w.text(cwd), how, 24)
    w.call(At.DIRECTORY, "fchdir", FREE_FD + 1)
    w.call(At.DIRECTORY, "close_range", INIT_FD, BLOCK_FD, 0)
    w.call(At.DIRECTORY, "close_range", FREE_FD, FREE_FD + 1, 0)
    w.call(At.DIRECTORY, "close", PROGRAM_FD)
    for fd in (REPORT_FD, LIFE_FD):
        w.call(At.DIRECTORY, "fcntl", fd, 2, 1)  # F_SETFD, FD_CLOEXEC: the end of the latter tells of a successful execve


def _restrict(w: Writer, process: Process, kept: Kept) -> None:
    """The restrictions, the last fork, and the program."""
    w.call(At.PREPARE, "umask", 0o022 if process.user.umask is None else process.user.umask)
    filter_ = program.Bpf(kept.bpf, kept.flags)
    program.restrict(w, process, filter_)
    w.fork(At.FORK, "clone", libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID, 0, _RESULT, 0, 0)
    program.lead_session(w, terminal=False)
    if process.no_new_privileges:
        program.install_filter(w, filter_)
    w.call(At.EXEC, "", BLOCK, kind=Kind.CANDIDATES)
