"""Programs of system calls: planned in Python, run by some 300 bytes of machine code, in a process that is nothing else.

Forking a warm CPython costs milliseconds (page tables, then a fault for every page that either side touches), and what it forks
carries the parent's memory into the container. So the processes that live there before the user's program does run a program made here
instead: a list of operations of eight words, the data that they point to, and the code of ``program_<machine>.S`` (assembled below; a
test assembles the sources and compares). An exec session gets it by execve (``agent``), what is forked last by ``bare``.
"""

from __future__ import annotations

import array
import os
import resource
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from shim import lsm
from shim.errors import Failure
from shim.linux import caps, libc
from shim.linux.process import Inherited
from shim.oci.spec import Process
from shim.seccomp.filter import NEW_LISTENER
from shim.security import Credentials, Step

CODE = {
    "x86_64": bytes.fromhex(
        "eb3466662e0f1f8400000000000f1f004989f9498b4118498b7920498b7128498b51304531d24531c00f054885c07401"
        "c34c89cdeb31b809000000bf00000010be00000001ba0300000041ba1200000041b8030000004531c90f054839f80f85"
        "c50000004889c5488b5d004531e4440fb66b384180fd060f84b90000004180fd07745a4180fd087446488b03488b7b08"
        "488b7310488b53184c8b53204c8b43284c8b4b300f054885c078494180fd04723a4885c0740c4180fd04752f488b5b30"
        "ebac4180fd057523bf89000000eb5f488b4308f3904883380074f8eb0e488b4308488b00488b4b104889084883c340e9"
        "7afffffff7d84180fd0174ef4180fd0275053a433974e40fb74b3a488b7508890e894604488b7d104885ff780cb80100"
        "0000ba080000000f05bf7f000000b8e70000000f05f44c8b73084d8d7e18498b3f4885ff74324983c708498b36498b56"
        "08b83b0000000f05f7d883f80d741483f802740a83f81474054189c4eb0a4585e475cb4189c4ebc64489e0eb8a"
    ),
    "aarch64": bytes.fromhex(
        "0f0000141f2003d51f2003d51f2003d5e90300aa280d40f9200542a9221940f9030080d2040080d2010000d4400000b4"
        "c0035fd6f80309aa0d0000140000a2d20120a0d2620080d2430280d2640080d2050080d2c81b80d2010000d40100a2d2"
        "1f0001ebc1060054f80300aa130340f91400805275e24039bf1a007180060054bf1e007100030054bf22007120020054"
        "680240f9608640a9628e41a9649642a9010000d4a002f8b7bf12007123020054800000b4e1010054731a40f9eeffff17"
        "bf16007161010054201180d21d000014600640f93f2003d5010040f9c1ffffb404000014618a40a9210040f9220000f9"
        "73020191e0ffff17e003004bbf06007180ffff54bf0a00718100005461e640391f00016be0feff5462764079010740f9"
        "220000b9200400b9000b40f98000f8b7020180d2080880d2010000d4e00f80d2c80b80d2010000d4000020d4760640f9"
        "d7620091e08640f8000200b4c10a40a9a81b80d2010000d4e003004b1f340071000100541f080071a00000541f500071"
        "60000054f403002a0400001454feff35f403002af0ffff17e003142adfffff17"
    ),
}
LAUNCH = 16  # where in it the function is that makes a clone and runs a program in the child
_HEAD = 64  # bytes
DATA = 0x4000  # offset of what operations point to
REPORT = struct.Struct("=II")  # step, errno

_NR = {
    # name: (x86_64, aarch64); what libc's table lacks because Python has it
    "write": (1, 64),
    "read": (0, 63),
    "close": (3, 57),
    "mmap": (9, 222),
    "ioctl": (16, 29),
    "madvise": (28, 233),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fchdir": (81, 50),
    "fchown": (93, 55),
    "umask": (95, 166),
    "setsid": (112, 157),
    "setgroups": (116, 159),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "chroot": (161, 51),
    "sched_setaffinity": (203, 122),
    "openat": (257, 56),
    "ppoll": (271, 73),
    "dup3": (292, 24),
}
NR = {name: numbers[0 if libc.MACHINE == "x86_64" else 1] for name, numbers in _NR.items()} | libc.NR
_WORD = 0xFFFFFFFFFFFFFFFF
_ZEROS = (0,) * 6
NONE = 0xFFFFFFFF
AT_FDCWD = libc.AT_FDCWD & _WORD
_TIOCSCTTY = 0x540E
_THREAD = libc.CLONE_VM | libc.CLONE_FILES | 0x200 | 0x800 | 0x10000 | 0x40000  # FS, SIGHAND, THREAD, SYSVSEM
_MSGHDR = struct.Struct("<QIxxxxQQQQixxxx")  # name, its length, vectors, how many, control, its length, flags
_CMSG = struct.Struct("<Qii")  # length, level, type


class Kind(IntEnum):
    PLAIN = 0
    ANY = 1  # whatever it answers is fine
    ALLOWED = 2  # one errno is
    FORK = 4
    EXPECT = 5  # an answer of 0 is the end of a line: the process exits with 137
    CANDIDATES = 6
    STORE = 7
    SPIN = 8


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
    MOUNT = 14
    APPARMOR = 15
    SELINUX = 16


_STEPS = frozenset(int(step) for step in At)
_NAMES = {
    At.PREPARE: ("launch", "prepare"),
    At.CGROUP: ("launch", "join cgroup"),
    At.OOM_SCORE: ("launch", "oom_score_adj"),
    At.LIMITS: ("rlimits", "prlimit"),
    At.STDIO: ("launch", "own stdio"),
    At.NAMESPACES: ("launch", "join namespaces"),
    At.DIRECTORY: ("working directory", "open"),
    At.USER: ("restrict", "groups"),
    At.RESTRICT: ("restrict", "capabilities"),
    At.FORK: ("start", "clone"),
    At.SESSION: ("start", "setsid"),
    At.SECCOMP: ("start", "seccomp"),
    At.EXEC: ("start", "exec"),
    At.AFFINITY: ("launch", "processor affinity"),
    At.MOUNT: ("launch", "mount"),
    At.APPARMOR: ("restrict", "apparmor"),
    At.SELINUX: ("restrict", "selinux"),
}


def failure(report: bytes, phase: str, path: str = "") -> Failure:
    """What a report means; ``phase`` stands for those that only say that something was being launched. It may have been tampered with where
    something in the container can see the process."""
    step, number = REPORT.unpack(report) if len(report) == REPORT.size else (NONE, 0)
    if step not in _STEPS:
        return Failure(phase, message="something in the container has meddled with the process before its program ran")
    own, operation = _NAMES[At(step)]
    return Failure(phase if own == "launch" else own, operation, errno=number, path=path)


@dataclass(slots=True)
class Writer:
    """Operations and what they point to, at their final addresses from ``base`` on."""

    base: int
    report_fd: int  # -1: reports are only left in memory
    report_at: int = 0  # 0: in the head
    operations: array.array[int] = field(default_factory=lambda: array.array("Q"))
    blob: bytearray = field(default_factory=bytearray)
    forks: dict[int, int] = field(default_factory=dict)  # operations whose parent goes elsewhere, and to which; -1: to the exit
    clone: tuple[int, int, int, int] = (0, 0, 0, 0)  # number and arguments of the call that ``bare`` launches it with

    def call(self, at: At, name: str, *args: int, kind: Kind = Kind.PLAIN, allowed: int = 0) -> None:
        last = kind | allowed << 8 | at << 16
        words = (NR[name] if name else 0, *args, *_ZEROS[len(args) :], last)
        try:
            self.operations.extend(words)
        except OverflowError:  # a negative argument
            del self.operations[len(self.operations) // 8 * 8 :]
            self.operations.extend([word & _WORD for word in words])

    def fork(self, at: At, name: str, *args: int) -> int:
        """The child goes on with what follows, the parent exits or goes to where this is said to ``land``."""
        self.forks[self.count] = -1
        self.call(at, name, *args, kind=Kind.FORK)
        return self.count - 1

    def land(self, fork: int) -> None:
        """The parent of that fork goes on here."""
        self.forks[fork] = self.count

    def store(self, address: int, value: int) -> None:
        self.call(At.PREPARE, "", self.data(struct.pack("<Q", address)), value, kind=Kind.STORE)

    def spin(self, address: int) -> None:
        """Wait for another thread's ``store``."""
        self.call(At.PREPARE, "", address, kind=Kind.SPIN)

    @property
    def count(self) -> int:
        return len(self.operations) // 8

    def data(self, content: bytes | bytearray) -> int:
        """The address of ``content``, aligned for what the kernel reads there."""
        self.blob += bytes(-len(self.blob) % 8)
        address = self.base + DATA + len(self.blob)
        self.blob += content
        return address

    def text(self, content: str) -> int:
        return self.data(os.fsencode(content) + b"\0")

    def report_to(self, fd: int) -> None:
        """From here on."""
        self.store(self.base + 16, fd)

    def image(self) -> bytes:
        """Head, operations and data, as far as they are planned."""
        for index, target in self.forks.items():
            self.operations[8 * index + 6] = self.base + _HEAD * (1 + (self.count if target < 0 else target))
        report_at = self.report_at or self.base + 56
        head = struct.pack("<8Q", self.base + _HEAD, report_at, self.report_fd & _WORD, *(word & _WORD for word in self.clone), 0)
        head += self.operations.tobytes() + struct.pack("<8Q", NR["exit_group"], *_ZEROS, At.EXEC << 16)
        if len(head) > DATA:
            raise Failure("launch", message="too many steps")
        return head.ljust(DATA, b"\0") + bytes(self.blob)


# ---- what several programs have in common


def write_file(w: Writer, at: At, directory: int, path: str, content: bytes, *, fd: int, allowed: int = 0) -> None:
    """``fd`` is the lowest number that is free."""
    w.call(at, "openat", directory, w.text(path), os.O_WRONLY | os.O_CLOEXEC)
    w.call(at, "write", fd, w.data(content), len(content), kind=Kind.ALLOWED if allowed else Kind.PLAIN, allowed=allowed)
    w.call(at, "close", fd)


def label(w: Writer, process: Process, directory: int, prefix: str, *, fd: int) -> None:
    """What the kernel's security modules are told, before a session keyring is joined; through procfs, where ``prefix`` is the process."""
    for write in (*lsm.before_keyring(process), *lsm.on_exec(process)):
        at = At.APPARMOR if write.what == "apparmor" else At.SELINUX
        write_file(w, at, directory, f"{prefix}/{write.file}", write.content, fd=fd)


def set_limits(
    w: Writer, process: Process, inherited: Inherited, current: Sequence[tuple[int, int]], *, raising: bool | None = None
) -> None:
    for number, soft, hard in limits(process, inherited, current, raising=raising):
        w.call(At.LIMITS, "prlimit64", 0, number, w.data(struct.pack("<QQ", soft, hard)), 0)


def limits(
    process: Process, inherited: Inherited, current: Sequence[tuple[int, int]], *, raising: bool | None = None
) -> list[tuple[int, int, int]]:
    """(resource, soft, hard) to set: the process's own, else what the supervisor was started with. A hard limit is raised above what is
    in force only by who may: ``raising``, or else whoever has CAP_SYS_RESOURCE."""
    wanted = {number: (soft, hard) for number, soft, hard in inherited.rlimits}
    for limit in process.rlimits:
        number = getattr(resource, limit.type, None) if limit.type.startswith("RLIMIT_") else None
        if number is None:
            raise Failure("rlimits", message=f"unknown limit {limit.type!r}", path="process.rlimits")
        wanted[number] = (limit.soft, limit.hard)
    if raising is None:
        raising = bool(libc.capget()[0] >> caps.NUMBERS["CAP_SYS_RESOURCE"] & 1)
    found = []
    for number, (soft, hard) in sorted(wanted.items()):
        soft, hard = soft & _WORD, hard & _WORD
        if not raising:
            hard = min(hard, current[number][1])
        soft = min(soft, hard)
        if (soft, hard) != current[number]:
            found.append((number, soft, hard))
    return found


@dataclass(frozen=True, slots=True)
class Bpf:
    """BPF (none: no filter) and the flags of seccomp(2). If it has a listener, that goes over ``line`` to the supervisor; ``free`` is the
    lowest number that is free then."""

    bpf: bytes
    flags: int
    line: int = -1
    free: int = -1


def restrict(w: Writer, process: Process, filter_: Bpf) -> None:
    """The table of ``shim.security`` but for a filter that belongs last: groups first, which no filter has to allow."""
    own = Credentials.of(process)
    w.call(At.USER, "setgroups", len(own.groups), w.data(struct.pack(f"<{len(own.groups)}I", *own.groups)))
    for step in own.order:
        if step is Step.SECCOMP:
            if not process.no_new_privileges:
                install_filter(w, filter_)
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


def _set_capabilities(w: Writer, own: Credentials) -> None:
    header = w.data(struct.pack("=Ii", 0x20080522, 0))
    low = 0xFFFFFFFF
    words = [mask >> shift & low for shift in (0, 32) for mask in (own.effective, own.permitted, own.inheritable)]
    w.call(At.RESTRICT, "capset", header, w.data(struct.pack("=6I", *words)))
    w.call(At.RESTRICT, "prctl", libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(caps.last_cap() + 1):
        if own.ambient >> number & 1:
            w.call(At.RESTRICT, "prctl", libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_RAISE, number)
    w.call(At.RESTRICT, "prctl", libc.PR_SET_KEEPCAPS, 0)


def install_filter(w: Writer, filter_: Bpf) -> None:
    if not filter_.bpf:
        return
    program = w.data(struct.pack("<HHIQ", len(filter_.bpf) // 8, 0, 0, w.data(filter_.bpf)))
    notifies = bool(filter_.flags & NEW_LISTENER) and filter_.line >= 0
    flags = (_hand_over(w, filter_.line, filter_.free),) if notifies else ()
    w.call(At.SECCOMP, "seccomp", libc.SECCOMP_SET_MODE_FILTER, filter_.flags, program)
    for installed, taken in flags:
        w.store(installed, 1)
        w.spin(taken)


def _hand_over(w: Writer, line: int, free: int) -> tuple[int, int]:
    """Start a thread that sends the listener away: from when there is one, the filter decides what its owner may do. A thread does not come
    under it, and ends at execve(2). Addresses of the words by which the two wait for each other."""
    installed, taken = w.data(bytes(8)), w.data(bytes(8))
    fork = w.fork(At.SECCOMP, "clone", _THREAD, 0, 0, 0, 0)
    w.spin(installed)
    w.call(At.SECCOMP, "sendmsg", line, message(w, b'{"ok":{"fds":["listener"]}}', (free,)), socket.MSG_NOSIGNAL)
    w.store(taken, 1)
    w.call(At.SECCOMP, "ppoll", 0, 0, 0, 0, 0, kind=Kind.ANY)
    w.land(fork)
    return installed, taken


def message(w: Writer, payload: bytes, fds: Sequence[int]) -> int:
    """The address of a message header (sendmsg(2))."""
    control = b""
    if fds:
        numbers = struct.pack(f"<{len(fds)}i", *fds)
        control = _CMSG.pack(_CMSG.size + len(numbers), socket.SOL_SOCKET, socket.SCM_RIGHTS) + numbers
    length = len(control)
    return header(w, w.data(payload), len(payload), w.data(control.ljust(-(-length // 8) * 8, b"\0")) if fds else 0, length)


def header(w: Writer, payload: int, size: int, control: int, length: int) -> int:
    vector = w.data(struct.pack("<QQ", payload, size))
    return w.data(_MSGHDR.pack(0, 0, vector, 1, control, length, 0))


def lead_session(w: Writer, *, terminal: bool) -> None:
    """A session of its own, with the terminal at fd 0 as its controlling one if it has one."""
    w.call(At.SESSION, "setsid")
    if terminal:
        w.call(At.SESSION, "ioctl", 0, _TIOCSCTTY, 0)
