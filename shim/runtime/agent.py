"""Exec sessions without a copy of the interpreter: a list of system calls, planned here, made by a static program of 300 bytes.

Forking a warm CPython costs two milliseconds of CPU in parent and child (page tables, then a fault for every page that either touches),
more than everything an exec has to do. So the supervisor spawns the agent (``agent_<machine>.S``, vfork and execve: nothing is copied)
and hands it a program: operations of eight words in the order of ``shim.runtime.exec``, from the keyring to execve. The program is
made once per container and kept. It holds nothing secret: arguments and environment come as a block that the daemon has laid out
(``shim.oci.command``), which only the agent maps.

What is seen inside the container is the process forked last, as everywhere: restricted for good, without memory of ours (the program
and the block are all it has), and with nothing to do but setsid and execve.

Terminals, user namespaces and users that have to be looked up take the long way (``shim.runtime.exec``).
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from shim.cgroups import Group
from shim.errors import Failure
from shim.linux import caps, cpus, elf, libc
from shim.linux.process import Inherited
from shim.oci.command import BLOCK, BLOCK_SIZE
from shim.oci.spec import Process
from shim.runtime.kept import Kept
from shim.security import Credentials, Step

_CODE = {
    "x86_64": bytes.fromhex(
        "b809000000bf00000010be00000001ba0300000041ba1200000041b8030000004531c90f054839f80f8599000000488b"
        "184531e4440fb66b384180fd060f84910000004180fd077433488b03488b7b08488b7310488b53184c8b53204c8b4328"
        "4c8b4b300f054885c078254180fd0475194885c07414488b5b30ebb8488b4308488b00488b4b104889084883c340eba4"
        "f7d84180fd0174f24180fd0275053a433974e70fb74b3aba00000010894a0889420cb801000000bf04000000488d7208"
        "ba080000000f05bf7f000000b8e70000000f05f44c8b73084d8d7e18498b3f4885ff74324983c708498b36498b5608b8"
        "3b0000000f05f7d883f80d741483f802740a83f81474054189c4eb0a4585e475cb4189c4ebc64489e0eb88"
    ),
    "aarch64": bytes.fromhex(
        "0000a2d20120a0d2620080d2430280d2640080d2050080d2c81b80d2010000d40100a2d21f0001eb21050054130040f9"
        "1400805275e24039bf1a007100050054bf1e007180010054680240f9608640a9628e41a9649642a9010000d46001f8b7"
        "bf120071e1000054c00000b4731a40f9f1ffff17618a40a9210040f9220000f973020191ecffff17e003004bbf060071"
        "80ffff54bf0a00718100005461e640391f00016be0feff54617640790900a2d2210900b9200d00b9800080d221210091"
        "020180d2080880d2010000d4e00f80d2c80b80d2010000d4000020d4760640f9d7620091e08640f8000200b4c10a40a9"
        "a81b80d2010000d4e003004b1f340071000100541f080071a00000541f50007160000054f403002a0400001454feff35"
        "f403002af0ffff17e003142adfffff17"
    ),
}
PROGRAM = 0x10000000  # where the agent maps its program
_DATA = 0x4000  # offset of what operations point to
_RESULT = 0x0F000000  # where it maps the page in which the kernel leaves the pid
PROGRAM_FD, REPORT_FD, INIT_FD, RESULT_FD, BLOCK_FD, LIFE_FD, FREE_FD = 3, 4, 5, 6, 7, 8, 9
REPORT = struct.Struct("=II")  # step, errno

_NR = {
    # name: (x86_64, aarch64); what libc's table lacks because Python has it
    "write": (1, 64),
    "close": (3, 57),
    "mmap": (9, 222),
    "madvise": (28, 233),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fchdir": (81, 50),
    "fchown": (93, 55),
    "umask": (95, 166),
    "setsid": (112, 157),
    "setgroups": (116, 159),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "sched_setaffinity": (203, 122),
    "openat": (257, 56),
}
_NR_HERE = {name: numbers[0 if libc.MACHINE == "x86_64" else 1] for name, numbers in _NR.items()} | libc.NR
_NAMESPACES = (
    libc.CLONE_NEWNS | libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS | libc.CLONE_NEWPID | libc.CLONE_NEWCGROUP
)
_EACCES, _EAGAIN, _EBUSY = 13, 11, 16
_NONE = 0xFFFFFFFF
_AT_FDCWD = libc.AT_FDCWD & 0xFFFFFFFFFFFFFFFF


class Kind(IntEnum):
    PLAIN = 0
    ANY = 1  # whatever it answers is fine
    ALLOWED = 2  # one errno is
    FORK = 4
    CANDIDATES = 6
    STORE = 7


class At(IntEnum):
    """What was being done, for error reports."""

    PREPARE = 0
    CGROUP = 1
    OOM_SCORE = 2
    LIMITS = 3
    STDIO = 4
    NAMESPACES = 5
    DIRECTORY = 6
    USER = 7
    RESTRICT = 8
    FORK = 9
    SESSION = 10
    SECCOMP = 11
    EXEC = 12
    AFFINITY = 13


_STEPS = frozenset(int(step) for step in At)
_NAMES = {
    At.PREPARE: ("exec", "prepare"),
    At.CGROUP: ("exec", "join cgroup"),
    At.OOM_SCORE: ("exec", "oom_score_adj"),
    At.LIMITS: ("rlimits", "prlimit"),
    At.STDIO: ("exec", "own stdio"),
    At.NAMESPACES: ("exec", "join namespaces"),
    At.DIRECTORY: ("working directory", "open"),
    At.USER: ("restrict", "groups"),
    At.RESTRICT: ("restrict", "capabilities"),
    At.FORK: ("start", "clone"),
    At.SESSION: ("start", "setsid"),
    At.SECCOMP: ("start", "seccomp"),
    At.EXEC: ("start", "exec"),
    At.AFFINITY: ("exec", "processor affinity"),
}


def failure(report: bytes, process: Process) -> Failure:
    """What the agent's report means; ``process`` is what was planned."""
    step, number = REPORT.unpack(report) if len(report) == REPORT.size else (_NONE, 0)
    if step not in _STEPS:
        return Failure("exec", message="something in the container has meddled with the process before its program ran")
    phase, operation = _NAMES[At(step)]
    return Failure(phase, operation, errno=number, path=process.cwd if step == At.DIRECTORY else "")


def needs_the_long_way(report: bytes) -> bool:
    """Whether the error is one that ``shim.runtime.exec`` knows how to deal with: a lookup that raced, a group that has groups."""
    return len(report) == REPORT.size and REPORT.unpack(report) in ((At.DIRECTORY, _EAGAIN), (At.CGROUP, _EBUSY), (At.CGROUP, 95))


def image(machine: str = elf.MACHINE) -> bytes:
    """The agent's executable."""
    return elf.executable(_CODE[machine], machine)


@dataclass(slots=True)
class _Writer:
    """Operations and what they point to, at their final addresses."""

    operations: list[bytes] = field(default_factory=list)
    blob: bytearray = field(default_factory=bytearray)
    forks: list[int] = field(default_factory=list)  # indexes of operations whose parent goes to the exit

    def call(self, at: At, name: str, *args: int, kind: Kind = Kind.PLAIN, allowed: int = 0) -> None:
        words = [_NR_HERE[name] if name else 0, *(a & 0xFFFFFFFFFFFFFFFF for a in args), *(0,) * (6 - len(args))]
        self.operations.append(struct.pack("<7QBBHI", *words, kind, allowed, at, 0))

    def fork(self, at: At, name: str, *args: int) -> None:
        """The child goes on with what follows, the parent exits."""
        self.forks.append(len(self.operations))
        self.call(at, name, *args, kind=Kind.FORK)

    def data(self, content: bytes) -> int:
        """The address of ``content``, aligned for what the kernel reads there."""
        self.blob += bytes(-len(self.blob) % 8)
        address = PROGRAM + _DATA + len(self.blob)
        self.blob += content
        return address

    def text(self, content: str) -> int:
        return self.data(os.fsencode(content) + b"\0")

    def finish(self) -> bytes:
        exit_at = PROGRAM + 64 * (1 + len(self.operations))
        self.call(At.EXEC, "exit_group", 0)
        for index in self.forks:
            operation = self.operations[index]
            self.operations[index] = operation[:48] + struct.pack("<Q", exit_at) + operation[56:]
        head = struct.pack("<Q", PROGRAM + 64).ljust(64, b"\0") + b"".join(self.operations)
        if len(head) > _DATA:
            raise Failure("exec", message="too many steps")
        return head.ljust(_DATA, b"\0") + bytes(self.blob)


def suits(process: Process, kept: Kept) -> bool:
    """Whether a session can be planned: no terminal, no name to look up, no user namespace to enter, no listener to hand over."""
    plain = not process.terminal and not process.user.username and process.user.groups_policy is None
    return plain and kept.root is None and not kept.notifies and not process.apparmor_profile and not process.selinux_label


def plan(
    process: Process, group: Group, kept: Kept, inherited: Inherited, current: Sequence[tuple[int, int]], pipes: Collection[int]
) -> bytes:
    """PURE: the program for sessions that are like ``process`` but for arguments and environment.

    ``inherited`` is what containers get back of limits, ``current`` the supervisor's (soft, hard) by resource number, ``pipes`` those of
    0, 1 and 2 that are to belong to the user.
    """
    w = _Writer()
    w.call(At.PREPARE, "close_range", FREE_FD, _NONE, 0)
    if group.version == 2:
        _be_born_in(w, group)
    _prepare(w, kept)
    if process.exec_cpu_affinity is not None and process.exec_cpu_affinity.initial:
        _set_affinity(w, process.exec_cpu_affinity.initial)
    if group.version == 1:
        for directory in group.directories:
            _write_file(w, At.CGROUP, f"{directory}/tasks", b"0")
        if group.unified:
            _write_file(w, At.CGROUP, f"{group.unified}/cgroup.procs", b"0")
    affinity = process.exec_cpu_affinity
    if affinity is not None and affinity.final:
        _set_affinity(w, affinity.final)
    _write_file(w, At.OOM_SCORE, "/proc/self/oom_score_adj", b"%d" % (process.oom_score_adj or 0), allowed=_EACCES)
    for number, soft, hard in _limits(process, inherited, current):
        w.call(At.LIMITS, "prlimit64", 0, number, w.data(struct.pack("<QQ", soft, hard)), 0)
    for fd in sorted(pipes):
        w.call(At.STDIO, "fchown", fd, process.user.uid, _NONE)
    w.call(At.NAMESPACES, "setns", INIT_FD, _NAMESPACES)
    _enter_directory(w, process.cwd)
    _restrict(w, process, kept)
    return w.finish()


def _be_born_in(w: _Writer, group: Group) -> None:
    """Version 2: a move takes long there, so fork into the group and go on as the child."""
    w.call(At.CGROUP, "openat", _AT_FDCWD, w.text(group.directories[0]), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    flags = libc.CLONE_PARENT | libc.CLONE_INTO_CGROUP
    args = w.data(struct.pack("<11Q", flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, FREE_FD))
    w.fork(At.CGROUP, "clone3", args, 88)
    w.call(At.CGROUP, "close", FREE_FD)


def _prepare(w: _Writer, kept: Kept) -> None:
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


def _write_file(w: _Writer, at: At, path: str, content: bytes, *, allowed: int = 0) -> None:
    w.call(at, "openat", _AT_FDCWD, w.text(path), os.O_WRONLY | os.O_CLOEXEC)
    w.call(at, "write", FREE_FD, w.data(content), len(content), kind=Kind.ALLOWED if allowed else Kind.PLAIN, allowed=allowed)
    w.call(at, "close", FREE_FD)


def _set_affinity(w: _Writer, processors: str) -> None:
    try:
        mask = cpus.mask(processors)
    except ValueError as error:
        raise Failure("exec", message=str(error), path="process.execCPUAffinity") from None
    w.call(At.AFFINITY, "sched_setaffinity", 0, len(mask), w.data(mask))


def _limits(process: Process, inherited: Inherited, current: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(resource, soft, hard) to set: the process's own, else what the supervisor was started with; a hard limit is never raised
    above what is in force, which only CAP_SYS_RESOURCE may do."""
    wanted = {number: (soft, hard) for number, soft, hard in inherited.rlimits}
    for limit in process.rlimits:
        number = getattr(resource, limit.type, None) if limit.type.startswith("RLIMIT_") else None
        if number is None:
            raise Failure("rlimits", message=f"unknown limit {limit.type!r}", path="process.rlimits")
        wanted[number] = (limit.soft, limit.hard)
    may_raise = bool(libc.capget()[0] >> caps.NUMBERS["CAP_SYS_RESOURCE"] & 1)
    found = []
    for number, (soft, hard) in sorted(wanted.items()):
        soft, hard = soft & 0xFFFFFFFFFFFFFFFF, hard & 0xFFFFFFFFFFFFFFFF
        if not may_raise:
            hard = min(hard, current[number][1])
        soft = min(soft, hard)
        if (soft, hard) != current[number]:
            found.append((number, soft, hard))
    return found


def _enter_directory(w: _Writer, cwd: str) -> None:
    """The working directory, found below the root without magic links (CVE-2024-21626)."""
    path_directory = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = w.data(struct.pack("<QQQ", path_directory, 0, 0x10 | 0x02))  # RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    w.call(At.DIRECTORY, "openat", _AT_FDCWD, w.text("/"), path_directory)
    w.call(At.DIRECTORY, "openat2", FREE_FD, w.text(cwd), how, 24)
    w.call(At.DIRECTORY, "fchdir", FREE_FD + 1)
    w.call(At.DIRECTORY, "close_range", INIT_FD, BLOCK_FD, 0)
    w.call(At.DIRECTORY, "close_range", FREE_FD, FREE_FD + 1, 0)
    w.call(At.DIRECTORY, "close", PROGRAM_FD)
    for fd in (REPORT_FD, LIFE_FD):
        w.call(At.DIRECTORY, "fcntl", fd, 2, 1)  # F_SETFD, FD_CLOEXEC: the end of the latter tells of a successful execve


def _restrict(w: _Writer, process: Process, kept: Kept) -> None:
    """The table of ``shim.security``, the last fork, and the program."""
    own = Credentials.of(process)
    w.call(At.PREPARE, "umask", 0o022 if process.user.umask is None else process.user.umask)
    w.call(At.USER, "setgroups", len(own.groups), w.data(struct.pack(f"<{len(own.groups)}I", *own.groups)))
    for step in own.order:
        if step is Step.SECCOMP:
            if not process.no_new_privileges:
                _install_filter(w, kept)
        elif step is Step.NO_NEW_PRIVS:
            w.call(At.RESTRICT, "prctl", libc.PR_SET_NO_NEW_PRIVS, 1)
        elif step is Step.BOUNDING:
            for number in range(caps.last_cap() + 1):
                if not own.bounding >> number & 1:
                    w.call(At.RESTRICT, "prctl", libc.PR_CAPBSET_DROP, number)
        elif step is Step.IDS:
            w.call(At.RESTRICT, "prctl", libc.PR_SET_KEEPCAPS, 1)
            w.call(At.RESTRICT, "setresgid", *(own.gid,) * 3)
            w.call(At.RESTRICT, "setresuid", *(own.uid,) * 3)
        else:
            _set_capabilities(w, own)
    w.fork(At.FORK, "clone", libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID, 0, _RESULT, 0, 0)
    w.call(At.SESSION, "setsid")
    if process.no_new_privileges:
        _install_filter(w, kept)
    w.call(At.EXEC, "", BLOCK, kind=Kind.CANDIDATES)


def _set_capabilities(w: _Writer, own: Credentials) -> None:
    header = w.data(struct.pack("=Ii", 0x20080522, 0))
    low = 0xFFFFFFFF
    words = [mask >> shift & low for shift in (0, 32) for mask in (own.effective, own.permitted, own.inheritable)]
    w.call(At.RESTRICT, "capset", header, w.data(struct.pack("=6I", *words)))
    w.call(At.RESTRICT, "prctl", libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(caps.last_cap() + 1):
        if own.ambient >> number & 1:
            w.call(At.RESTRICT, "prctl", libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_RAISE, number)
    w.call(At.RESTRICT, "prctl", libc.PR_SET_KEEPCAPS, 0)


def _install_filter(w: _Writer, kept: Kept) -> None:
    if kept.bpf:
        program = w.data(struct.pack("<HHIQ", len(kept.bpf) // 8, 0, 0, w.data(kept.bpf)))
        w.call(At.SECCOMP, "seccomp", libc.SECCOMP_SET_MODE_FILTER, kept.flags, program)
