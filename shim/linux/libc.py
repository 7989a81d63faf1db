"""The only foreign-function binding: system calls that the ``os`` module lacks, by number, for x86_64 and aarch64.

Calls go through ``ctypes.PyDLL``, which keeps the interpreter lock: a raw ``clone3`` in a process with one thread then returns in the
child with the lock held by the one thread there is, exactly as in the parent. Every wrapper raises ``OSError`` with the kernel's
errno and retries EINTR; Python's own signal handlers run between the tries. Numbers and layouts are those of the kernel's uapi headers.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

Buffer: TypeAlias = "ctypes.Array[Any]"
Argument: TypeAlias = "int | bytes | Buffer | None"

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, AT_RECURSIVE = 0x100, 0x1000, 0x8000

CLONE_VM, CLONE_FILES, CLONE_PIDFD, CLONE_VFORK, CLONE_PARENT = 0x100, 0x400, 0x1000, 0x4000, 0x8000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
CLONE_PARENT_SETTID = 0x100000
CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP = 0x100000000, 0x200000000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME = 1, 4, 3, 8, 15
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER = 23, 24, 28, 36
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4

SECCOMP_SET_MODE_FILTER, SECCOMP_GET_ACTION_AVAIL, SECCOMP_GET_NOTIF_SIZES = 1, 2, 3
KEYCTL_JOIN_SESSION_KEYRING, KEYCTL_SETPERM, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING = 1, 5, 0, -3
F_ADD_SEALS, SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE = 1033, 1, 2, 4, 8
CLOSE_RANGE_CLOEXEC = 4

# name: (x86_64, aarch64)
_NUMBERS = {
    "bpf": (321, 280),
    "capget": (125, 90),
    "capset": (126, 91),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fstatfs": (138, 44),
    "ioprio_get": (252, 31),
    "ioprio_set": (251, 30),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "openat2": (437, 437),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "sched_setattr": (314, 274),
    "seccomp": (317, 277),
    "setdomainname": (171, 162),
    "setfsgid": (123, 152),
    "setfsuid": (122, 151),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "umount2": (166, 39),
    "unshare": (272, 97),
}
MACHINE = os.uname().machine
if MACHINE not in ("x86_64", "aarch64"):
    raise ImportError(f"unsupported architecture {MACHINE}: only x86_64 and aarch64 have system call tables here")
_column = 0 if MACHINE == "x86_64" else 1
NR = {name: numbers[_column] for name, numbers in _NUMBERS.items()}

_library = ctypes.PyDLL(None, use_errno=True)
_syscall = _library.syscall
_syscall.restype = ctypes.c_long
# The C function is variadic: without argtypes an int would be passed as 32 bits. A void pointer takes ints (negative ones too),
# bytes and arrays, and the argument tuple keeps the buffers alive for the length of the call.
_syscall.argtypes = (ctypes.c_long, *(ctypes.c_void_p,) * 6)
_get_errno = ctypes.get_errno
addressof = ctypes.addressof


def syscall(
    nr: int,
    a: Argument = 0,
    b: Argument = 0,
    c: Argument = 0,
    d: Argument = 0,
    e: Argument = 0,
    f: Argument = 0,
    *,
    path: str | bytes | None = None,
) -> int:
    """The raw call. Raises ``OSError(errno, strerror[, path])``; retries EINTR."""
    while True:
        result: int = _syscall(nr, a, b, c, d, e, f)
        if result != -1:
            return result
        number = _get_errno()
        if number != errno.EINTR:
            raise _error(number, path)


def _error(number: int, path: str | bytes | None) -> OSError:
    if path is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), os.fsdecode(path))


def encode(path: str | bytes) -> bytes:
    """A path as the kernel takes it. A NUL inside would silently name another file, so it is EINVAL."""
    raw = path if isinstance(path, bytes) else os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, "embedded NUL", os.fsdecode(raw))
    return raw


class Memory:
    """Bytes at an address that the kernel or machine code is given. No ctypes array: a new array type costs a forked child some
    seventy page faults, and each length is a type of its own."""

    __slots__ = ("_bytes", "address")

    def __init__(self, data: bytes | bytearray) -> None:
        self._bytes = bytearray(data)
        self.address = addressof(ctypes.c_char.from_buffer(self._bytes))

    @property
    def raw(self) -> bytes:
        return bytes(self._bytes)


_scratch = Memory(bytes(128))  # what small calls return; there is one thread


def _returned(size: int) -> bytes:
    return bytes(memoryview(_scratch._bytes)[:size])


# ---- processes

_pidfd_slot = ctypes.c_int(-1)
_pidfd_address = ctypes.addressof(_pidfd_slot)
CLONE_ARGS = struct.Struct("=11Q")  # flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
_SIGCHLD = 17


_before_fork: Callable[[], None] | None = None


def before_fork(action: Callable[[], None] | None) -> None:
    """What ``clone3`` has to do first, if anything: see ``shim.runtime.bare``."""
    global _before_fork
    _before_fork = action


def clone3(
    flags: int, *, exit_signal: int = _SIGCHLD, pidfd: bool = False, cgroup: int | None = None, parent_tid_address: int = 0
) -> tuple[int, int]:
    """Fork with flags. Returns (pid, pidfd or -1), and (0, -1) in the child, which runs on a copy of this stack.

    Only for a process with one thread. ``cgroup`` is a directory fd on cgroup v2. ``parent_tid_address``: where the kernel stores the
    child's pid as the caller's PID namespace sees it (shared memory, so that a sibling can read it). With CLONE_PARENT the exit signal
    must be 0.
    """
    if _before_fork is not None:
        _before_fork()
    if pidfd:
        flags |= CLONE_PIDFD
        _pidfd_slot.value = -1
    if parent_tid_address:
        flags |= CLONE_PARENT_SETTID
    if cgroup is not None:
        flags |= CLONE_INTO_CGROUP
    args = CLONE_ARGS.pack(
        flags, _pidfd_address if pidfd else 0, 0, parent_tid_address, exit_signal, 0, 0, 0, 0, 0, 0 if cgroup is None else cgroup
    )
    pid = syscall(NR["clone3"], args, 88)
    if pid == 0:
        return 0, -1
    return pid, _pidfd_slot.value if pidfd else -1


def unshare(flags: int) -> None:
    syscall(NR["unshare"], flags)


def setns(fd: int, nstype: int) -> None:
    """Join the namespace of ``fd``, or with a pidfd those in ``nstype`` of its process."""
    syscall(NR["setns"], fd, nstype)


def pivot_root(new: str, old: str) -> None:
    syscall(NR["pivot_root"], encode(new), encode(old), path=new)


def sethostname(name: str) -> None:
    raw = encode(name)
    syscall(NR["sethostname"], raw, len(raw))


def setdomainname(name: str) -> None:
    raw = encode(name)
    syscall(NR["setdomainname"], raw, len(raw))


_NR_PRCTL = NR["prctl"]


def prctl(op: int, a: Argument = 0, b: Argument = 0, c: Argument = 0, d: Argument = 0) -> int:
    return syscall(_NR_PRCTL, op, a, b, c, d)


def seccomp(op: int, flags: int, address: Argument) -> int:
    """seccomp(2); for SET_MODE_FILTER ``address`` is that of a sock_fprog that the caller keeps alive."""
    return syscall(NR["seccomp"], op, flags, address)


def keyctl(op: int, a: Argument = 0, b: Argument = 0, c: Argument = 0, d: Argument = 0) -> int:
    return syscall(NR["keyctl"], op, a, b, c, d)


# ---- capabilities (version 3: two words of 32 bits each)

_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
_cap_data = struct.Struct("=6I")


def capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of this thread as bit masks."""
    syscall(NR["capget"], _CAPABILITY_HEADER, _scratch.address)
    e0, p0, i0, e1, p1, i1 = _cap_data.unpack(_returned(24))
    return e0 | e1 << 32, p0 | p1 << 32, i0 | i1 << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    low = 0xFFFFFFFF
    data = _cap_data.pack(effective & low, permitted & low, inheritable & low, effective >> 32, permitted >> 32, inheritable >> 32)
    syscall(NR["capset"], _CAPABILITY_HEADER, data)


def setfsids(uid: int, gid: int) -> None:
    """The ids that file systems see. Leaving uid 0 takes the file capabilities out of the effective set. The kernel reports no failure,
    and an id that the caller's user namespace does not map changes nothing."""
    syscall(NR["setfsgid"], gid)
    syscall(NR["setfsuid"], uid)


# ---- execve


class ExecImage:
    """An execve whose strings and vectors lie in memory before the seccomp filter is installed: ``exec()`` makes that one system call."""

    __slots__ = ("_memory", "_path", "path", "vectors")

    def __init__(self, path: bytes, argv: Sequence[bytes], env: Sequence[bytes]) -> None:
        words = [*argv, None, *env, None]
        offset, offsets, texts = 8 * len(words), array.array("Q"), []
        for text in words:
            offsets.append(0 if text is None else offset)
            if text is not None:
                texts.append(_checked(text))
                offset += len(text) + 1
        self._memory = Memory(bytes(8 * len(words)) + b"\0".join(texts) + b"\0")
        base = self._memory.address
        self._memory._bytes[: 8 * len(words)] = array.array("Q", [o and base + o for o in offsets]).tobytes()
        self.vectors = base, base + 8 * (len(argv) + 1)  # addresses of argv and envp, valid as long as this object
        self.path, self._path = path, Memory(_checked(path) + b"\0")

    @property
    def path_address(self) -> int:
        return self._path.address

    def at(self, path: bytes) -> ExecImage:
        """The same arguments and environment, shared, for another path."""
        other = ExecImage.__new__(ExecImage)
        other._memory, other.vectors = self._memory, self.vectors
        other.path, other._path = path, Memory(_checked(path) + b"\0")
        return other

    def exec(self) -> NoReturn:
        """Raises OSError; otherwise does not return."""
        while _syscall(_NR_EXECVE, self._path.address, *self.vectors, 0, 0, 0) == -1 and _get_errno() == errno.EINTR:
            pass
        raise _error(_get_errno(), self.path)


_NR_EXECVE = NR["execve"]


def _checked(text: bytes) -> bytes:
    if b"\0" in text:
        raise OSError(errno.EINVAL, "embedded NUL", os.fsdecode(text))
    return text


def execveat(fd: int, path: str, argv: Sequence[bytes], env: Sequence[bytes], flags: int = AT_EMPTY_PATH) -> NoReturn:
    """Run the file ``fd`` (path empty) or ``path`` below it. The fd must not be close-on-exec if the file is a script."""
    image = ExecImage(encode(path), argv, env)
    syscall(NR["execveat"], fd, image.path_address, *image.vectors, flags, path=path or f"fd {fd}")
    raise AssertionError("execveat returned")


# ---- file descriptors


def close_range(first: int, last: int, flags: int = 0) -> None:
    syscall(NR["close_range"], first, last, flags)


def eventfd(initial: int = 0) -> int:
    return os.eventfd(initial, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def sealed_memfd(name: str, data: bytes) -> int:
    """A memory file holding ``data`` that nobody can change, positioned at its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_WRITE)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def bpf(cmd: int, attr: bytes | Buffer) -> int:
    """bpf(2). Pass a ctypes array where the kernel writes results into the attributes; pointers inside are the caller's to keep."""
    return syscall(NR["bpf"], cmd, attr, len(attr))


# ---- pidfds


def pidfd_open(pid: int) -> int:
    """Close-on-exec, as the kernel makes them."""
    return syscall(NR["pidfd_open"], pid, 0)


def pidfd_send_signal(fd: int, signal: int) -> None:
    syscall(NR["pidfd_send_signal"], fd, signal, 0, 0)


class Exit(NamedTuple):
    """How a process ended: ``code`` is CLD_EXITED, CLD_KILLED or CLD_DUMPED, ``status`` the exit code or signal number."""

    code: int
    status: int


def waitid_pidfd(fd: int) -> Exit | None:
    """Reap the child behind a pidfd, without waiting; None while it runs. ECHILD if it is not ours (any more)."""
    result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    return None if result is None else Exit(result.si_code, result.si_status)


_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3
_pidfd_info = struct.Struct("=QQ3I8Ii")  # mask cgroupid pid tgid ppid, 8 ids, exit_code


def pidfd_info_exit(fd: int) -> int | None:
    """Wait status (as waitpid gives it) of a process that somebody else reaped; None before that, or before Linux 6.15."""
    buffer = bytearray(64)
    _pidfd_info.pack_into(buffer, 0, _PIDFD_INFO_EXIT, *(0,) * 13)
    try:
        fcntl.ioctl(fd, _PIDFD_GET_INFO, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.ESRCH, errno.EOPNOTSUPP):
            return None
        raise
    fields = _pidfd_info.unpack(buffer)
    status: int = fields[-1]
    return status if fields[0] & _PIDFD_INFO_EXIT else None


# ---- scheduling and limits

_rlimit = struct.Struct("=QQ")
RLIM_INFINITY = 0xFFFFFFFFFFFFFFFF


def prlimit(pid: int, resource: int, new: tuple[int, int] | None = None) -> tuple[int, int]:
    """(soft, hard) as they were; unlimited is ``RLIM_INFINITY``."""
    syscall(NR["prlimit64"], pid, resource, None if new is None else _rlimit.pack(*new), _scratch.address)
    soft, hard = _rlimit.unpack(_returned(16))
    return soft, hard


def ioprio_set(value: int) -> None:
    """Of this process; 0 is "none", which follows the nice value."""
    syscall(NR["ioprio_set"], 1, 0, value)


def sched_setattr(policy: int, nice: int, priority: int = 0) -> None:
    """Of this process: scheduling policy with everything else at its default."""
    syscall(NR["sched_setattr"], 0, struct.pack("=IIQiIQQQ", 48, policy, 0, nice, priority, 0, 0, 0), 0)


# ---- signals

_KERNEL_SIGSET = 8
_DEFAULT_ACTION = bytes(32)  # struct sigaction: SIG_DFL, no flags, no restorer, empty mask


def default_signal(number: int) -> None:
    """SIG_DFL for any signal, including the two that the C library hides."""
    syscall(NR["rt_sigaction"], number, _DEFAULT_ACTION, None, _KERNEL_SIGSET)


def set_signal_mask(mask: int) -> int:
    """Block exactly the signals of the bit mask (bit n-1 = signal n); returns the mask before."""
    syscall(NR["rt_sigprocmask"], 2, mask.to_bytes(8, "little"), _scratch.address, _KERNEL_SIGSET)
    return int.from_bytes(_returned(8), "little")


# ---- paths

_open_how = struct.Struct("=QQQ")
_NR_OPENAT2 = NR["openat2"]


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """One try; close-on-exec always. EAGAIN (a rename or mount raced with ".." in the path) is the caller's to repeat."""
    return syscall(_NR_OPENAT2, dirfd, encode(path), _open_how.pack(flags | os.O_CLOEXEC, mode, resolve), 24, path=path)


def fstatfs_type(fd: int) -> int:
    """The magic number of the file system behind ``fd`` (statfs f_type)."""
    syscall(NR["fstatfs"], fd, _scratch.address)
    return int.from_bytes(_returned(8), "little")


def overwrite(address: int, data: bytes) -> None:
    """Copy bytes to a raw address: for the argv area only."""
    ctypes.memmove(address, data, len(data))
