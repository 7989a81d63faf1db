"""The last fork of a process that joins a PID namespace, in a few machine instructions and with next to no memory.

What is seen inside the container must not lead back to us: a process there with CAP_SYS_PTRACE may stop it, read all of its memory and
write to it. So the forked process gets a copy of one small region (this code, the arguments, the environment, the filter) and of
nothing else: all other mappings are marked MADV_DONTFORK first. It shares nothing but one page, from which its parent reads one
integer. (CLONE_VM would be cheaper still, but whoever writes to the child's memory then writes to its parent's, which is outside
the PID namespace; a full fork hands out a copy of the heap and costs a millisecond.)

The child runs ``lastfork_<machine>.S``, assembled below (a test assembles the sources and compares): setsid, TIOCSCTTY if there is a
terminal, the filter if it belongs last, then execve of each candidate in turn. CLONE_VFORK makes the parent wait for that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc
from shim.seccomp import Filter

_CODE = {
    "x86_64": bytes.fromhex(
        "4989f9498b3931f6498b51084531d24531c0b8380000000f054885c07401c34d8b4110b8700000000f05ba0000010048"
        "85c00f88860000004983793800741ab81000000031ffbe0e54000031d20f05ba000002004885c07865498b51284885d2"
        "741ab83d010000bf01000000498b71300f05ba000003004885c078424d8d51404531e4498b3a4885ff743a4983c20849"
        "8b7118498b5120b83b0000000f05f7d883f80d741483f802740a83f81474054189c4eb114585e475ca4189c4ebc5f7d8"
        "09d04189c4458920bf7f000000b8e70000000f05f4"
    ),
    "aarch64": bytes.fromhex(
        "e90300aa200140f9010080d2220540f9030080d2040080d2881b80d2010000d4400000b4c0035fd62a0940f9a81380d2"
        "010000d42b00a052c004f8b7211d40f9010100b4000080d2c1818ad2020080d2a80380d2010000d44b00a052a003f8b7"
        "221540f9e20000b4200080d2211940f9a82280d2010000d46b00a052a002f8b72c0101910d008052808540f8600200b4"
        "210d40f9221140f9a81b80d2010000d4e003004b1f340071000100541f080071a00000541f50007160000054ed03002a"
        "060000142dfeff35ed03002aefffff17e003004b0d000b2a4d0100b9e00f80d2c80b80d2010000d4000020d4"
    ),
}
_NR_MMAP, _NR_MPROTECT, _NR_MADVISE = (9, 10, 28) if libc.MACHINE == "x86_64" else (222, 226, 233)
_READ_WRITE, _READ_EXECUTE = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC
_MADV_DONTFORK = 10
_LOWEST, _HIGHEST = 1 << 16, (1 << (47 if libc.MACHINE == "x86_64" else 48)) - mmap.PAGESIZE  # where user mappings lie
_FLAGS = libc.CLONE_VFORK | libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID
_STEPS = {0: "exec", 1: "setsid", 2: "TIOCSCTTY", 3: "seccomp"}  # by the bits above 16 of the status
_WORD = 8
_Function = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)
_SAMPLE = _Function(0)  # the type's machinery is used once before any fork


@dataclass(frozen=True, slots=True)
class Command:
    """What execve gets: candidates for the program, arguments and environment."""

    paths: Sequence[bytes]
    argv: Sequence[bytes]
    env: Sequence[bytes]


class LastFork:
    """Prebuilt: ``run`` makes one clone(2), the child what follows. A process that has one can fork in no other way any more.

    The C library must not have registered a restartable sequence (rseq(2)): its area would be missing in the child, which the kernel
    answers with SIGSEGV. ``shim.client`` starts the supervisor with a tunable that says so.
    """

    def __init__(self, command: Command, *, terminal: bool, filter_: Filter | None, pid_address: int) -> None:
        code = _CODE[libc.MACHINE]
        bpf, flags = (filter_.bpf, filter_.flags) if filter_ is not None else (b"", 0)
        strings = [*command.argv, *command.env, *command.paths]
        words = 8 + len(command.paths) + 1 + len(command.argv) + 1 + len(command.env) + 1 + 2
        size = mmap.PAGESIZE + words * _WORD + len(bpf) + sum(map(len, strings)) + len(strings)
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._base = _map(self._size, mmap.MAP_PRIVATE)
        self._status = _map(mmap.PAGESIZE, mmap.MAP_SHARED)
        self.block = self._base + mmap.PAGESIZE
        ctypes.memmove(self._base, code, len(code))
        libc.syscall(_NR_MPROTECT, self._base, mmap.PAGESIZE, _READ_EXECUTE)
        data = self._data(command, bpf, words * _WORD, (_FLAGS, pid_address, self._status), flags, terminal)
        ctypes.memmove(self.block, data, len(data))
        self._launch = _Function(self._base)
        self._hold_back()

    def _data(self, command: Command, bpf: bytes, start: int, head: tuple[int, int, int], flags: int, terminal: bool) -> bytes:
        """The block that the code reads, the vectors, the filter and the strings, with their final addresses."""
        at = self.block + start
        filter_at = at
        at += len(bpf)
        addresses = []
        for text in (*command.argv, *command.env, *command.paths):
            addresses.append(at)
            at += len(text) + 1
        arguments, environment = len(command.argv), len(command.env)
        argv, env = addresses[:arguments], addresses[arguments : arguments + environment]
        paths = addresses[arguments + environment :]
        vectors = self.block + (8 + len(paths) + 1) * _WORD
        program = vectors + (arguments + 1 + environment + 1) * _WORD
        pointers = (vectors, vectors + (arguments + 1) * _WORD, program if bpf else 0)
        words = [*head, *pointers, flags, int(terminal), *paths, 0, *argv, 0, *env, 0]
        packed = struct.pack(f"{len(words)}Q", *words) + struct.pack("@HP", len(bpf) // 8, filter_at)
        return b"".join((packed, bpf, *(text + b"\0" for text in (*command.argv, *command.env, *command.paths))))

    def _hold_back(self) -> None:
        """Keep everything else from the child. Now, because a filter need not know madvise."""
        kept = sorted(((self._base, self._base + self._size), (self._status, self._status + mmap.PAGESIZE)))
        edges = [_LOWEST, *(edge for region in kept for edge in region), _HIGHEST]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            _keep_from_fork(start, end)

    def run(self) -> None:
        """Returns once the program runs; this process is then done. Raises LastForkFailed with the step that failed."""
        result = self._launch(self.block)
        if result < 0:
            raise Failure("start", "clone", errno=-result)
        step, number = divmod(ctypes.c_int.from_address(self._status).value, 1 << 16)
        if number:
            raise LastForkFailed(_STEPS[step], number)


def _map(size: int, sharing: int) -> int:
    return libc.syscall(_NR_MMAP, 0, size, _READ_WRITE, sharing | mmap.MAP_ANONYMOUS, -1, 0)


def _keep_from_fork(start: int, end: int) -> None:
    """MADV_DONTFORK for every mapping between two addresses."""
    if start >= end:
        return
    try:
        libc.syscall(_NR_MADVISE, start, end - start, _MADV_DONTFORK)
    except OSError as error:
        if error.errno != errno.ENOMEM:  # there are holes; the mappings around them have been marked all the same (madvise(2))
            raise


class LastForkFailed(Exception):
    """``step`` is "exec" when no candidate could be run."""

    def __init__(self, step: str, errno: int) -> None:
        super().__init__(step, errno)
        self.step, self.errno = step, errno
