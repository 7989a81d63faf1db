"""Steps inside the container's root, before anything of the container runs: user, stdio, console, working directory, program.

Nothing here imports, executes or loads anything from the root; every path is resolved with openat2 below the root's fd.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import struct
import termios
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import cpus, libc, mount, path, process
from shim.oci.spec import Box, Process, User
from shim.runtime import users

MAX_ACCOUNTS_FILE = 10 << 20  # bytes of /etc/passwd or /etc/group that are read (CVE-2025-4437: unbounded reads)
_NR_GETCWD = 79 if libc.MACHINE == "x86_64" else 17
_TIOCSPTLCK, _TIOCGPTN, _TIOCGPTPEER = 0x40045431, 0x80045430, 0x5441


def resolve_user(process_: Process, rootfd: int) -> users.Resolved:
    """The process's user by the root's own account files."""

    def read(name: str) -> bytes:
        return read_small_file(rootfd, name)

    return users.resolve(process_.user, read)


def read_small_file(rootfd: int, name: str, limit: int = MAX_ACCOUNTS_FILE) -> bytes:
    """A regular file below the root, or empty bytes where there is none. A FIFO, device or giant is refused, never read."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        probe = path.open_in_root(rootfd, name, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return b""
        raise
    try:
        _refuse_odd_file(probe, name, limit)
    finally:
        os.close(probe)
    fd = path.open_in_root(rootfd, name, flags)
    try:
        _refuse_odd_file(fd, name, limit)  # once more: a volume's owner may have swapped it
        chunks = []
        while chunk := os.read(fd, 1 << 16):
            chunks.append(chunk)
            if (limit := limit - len(chunk)) < 0:
                raise Failure("read", path=f"/{name}", message="grew while it was read")
        return b"".join(chunks)
    finally:
        os.close(fd)


def _refuse_odd_file(fd: int, name: str, limit: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Failure("read", path=f"/{name}", message="is not a regular file")
    if status.st_size > limit:
        raise Failure("read", path=f"/{name}", message=f"has {status.st_size} bytes, more than {limit}")


def enter_cwd(rootfd: int, cwd: str) -> int:
    """Make and enter the working directory; it must lie inside the root (CVE-2024-21626: /proc/self/fd/N as WORKDIR). Its fd."""
    try:
        try:
            fd = path.open_in_root(rootfd, cwd, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = path.mkdir_all_in_root(rootfd, cwd, 0o755)
        os.fchdir(fd)
    except OSError as error:
        raise Failure.wrap("working directory", "open", error, cwd) from None
    verify_cwd(cwd)
    return fd


def verify_cwd(cwd: str) -> None:
    """getcwd(2) answers "(unreachable)/…" for a directory outside the root; libc's wrapper would hide it."""
    buffer = libc.Memory(bytes(4096))
    try:
        libc.syscall(_NR_GETCWD, buffer.address, 4096)
    except OSError as error:
        raise Failure.wrap("working directory", "getcwd", error, cwd) from None
    if not buffer.raw.startswith(b"/"):
        raise Failure("working directory", "getcwd", path=cwd, message="lies outside the container's root")


@dataclass(frozen=True, slots=True)
class Console:
    master: int
    slave: int


def open_console(rootfd: int, size: Box | None, user: User) -> Console:
    """A pty of the container's own devpts instance. The slave comes from the master by ioctl, never by a path that
    the container could have replaced (CVE-2025-52565)."""
    try:
        master = path.open_in_root(rootfd, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if size is not None and size.height and size.width:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))
        os.fchown(slave, user.uid, -1)
        os.fchmod(slave, 0o620)
    except OSError as error:
        raise Failure.wrap("console", "open", error, "/dev/pts/ptmx") from None
    return Console(master, slave)


def bind_console(rootfd: int, console: Console) -> None:
    """Make /dev/console the pty's slave, as runc does."""
    try:
        tree = mount.clone_mount(console.slave)
        target = path.create_file_in_root(rootfd, "dev/console", 0o666)
        mount.move_mount(tree, target)
        os.close(tree)
        os.close(target)
    except OSError as error:
        raise Failure.wrap("console", "mount", error, "/dev/console") from None


def own_stdio(fds: tuple[int, ...], user: User) -> None:
    """Give FIFOs to the container's user, who may reopen them through /dev/stdout. Other kinds stay as they are: a user must not
    become the owner of the host's /dev/null or of somebody's pty."""
    for fd in fds:
        status = os.fstat(fd)
        if stat.S_ISFIFO(status.st_mode) and status.st_uid != user.uid:
            os.fchown(fd, user.uid, -1)


def give_stdio(fds: tuple[int, ...], root: tuple[int, int]) -> None:
    """Give FIFOs to root of a user namespace before joining it: what is not mapped there can not be given to anybody from inside."""
    for fd in fds:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, *root)


def set_affinity(processors: str) -> None:
    """Bind this process to a list of processors; an empty one leaves it as it is (config.md#process, execCPUAffinity)."""
    if not processors:
        return
    try:
        os.sched_setaffinity(0, cpus.parse(processors))
    except (OSError, ValueError) as error:
        raise Failure("exec", "processor affinity", path=processors, message=str(error)) from None


def place_stdio(fds: tuple[int, int, int]) -> None:
    """Make the three fds 0, 1 and 2, inheritable. Sources lie above 2."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number, inheritable=True)


def set_rlimits(process_: Process) -> None:
    """The spec's limits; a hard limit above ours is clamped where the kernel refuses it (no CAP_SYS_RESOURCE)."""
    limits = []
    for limit in process_.rlimits:
        number = getattr(resource, limit.type, None) if limit.type.startswith("RLIMIT_") else None
        if number is None:
            raise Failure("rlimits", message=f"unknown limit {limit.type!r}", path="process.rlimits")
        limits.append((number, limit.soft, limit.hard))
    try:
        process.restore_limits(limits)
    except OSError as error:
        raise Failure.wrap("rlimits", "prlimit", error, "process.rlimits") from None


def raise_hard_limits(process_: Process) -> None:
    """Before joining a user namespace, inside which no hard limit can be raised: those above ours. ``set_rlimits`` does the rest later,
    because a small limit of open files would be in our own way."""
    for limit in process_.rlimits:
        number = getattr(resource, limit.type, None) if limit.type.startswith("RLIMIT_") else None
        if number is not None and (current := libc.prlimit(0, number))[1] < limit.hard:
            process.restore_limits([(number, current[0], limit.hard)])


class Program:
    """What a process is to execute, for the words of an error. HOME is set unless the specification does."""

    def __init__(self, process_: Process, home: str) -> None:
        self._name = process_.args[0]
        self.args, self.env = process_.args, process_.env
        if not any(entry.startswith("HOME=") for entry in self.env):
            self.env = (*self.env, f"HOME={home}")

    def failure(self, number: int) -> Failure:
        """What an errno of execve means for the user's command."""
        searched = "/" not in self._name and number in (errno.ENOENT, errno.ENOTDIR)
        message = "executable file not found in $PATH" if searched else ""
        return Failure("start", "exec", errno=number, path=self._name, message=message)
