"""The last fork of a process that joins a PID namespace, as a few machine instructions instead of a second copy of the interpreter.

clone(CLONE_VM | CLONE_VFORK | CLONE_PARENT) shares this process's memory with the child and suspends this process until the child
has exec'd or exited, so nothing is copied: forking the interpreter a second time costs about a millisecond. The child runs
``lastfork_<machine>.S`` (assembled below; a test assembles the sources and compares), which uses registers only, because the two
share one stack: setsid, TIOCSCTTY if there is a terminal, the filter if it belongs last, then execve of each candidate in turn.
What is seen inside the container therefore never runs Python, and after a filter no call is made but these.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Sequence

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
_NR_MMAP, _NR_MPROTECT = (9, 10) if libc.MACHINE == "x86_64" else (222, 226)
_FLAGS = libc.CLONE_VM | libc.CLONE_VFORK | libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID
_STEPS = {0: "exec", 1: "setsid", 2: "TIOCSCTTY", 3: "seccomp"}  # by the bits above 16 of the status
_Function = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)


def _load() -> object:
    """The code in a page of its own, written before it becomes executable. Called in the supervisor, inherited by every child."""
    code = _CODE[libc.MACHINE]
    page = libc.syscall(_NR_MMAP, 0, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(page, code, len(code))
    libc.syscall(_NR_MPROTECT, page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
    return _Function(page)


_launch = _load()


class LastFork:
    """Prebuilt: ``run`` makes one clone(2) and the child what follows."""

    def __init__(self, images: Sequence[libc.ExecImage], *, terminal: bool, filter_: Filter | None, pid_address: int) -> None:
        self._status = ctypes.c_int(0)
        argv, env = images[0].vectors
        program, flags = (filter_.program, filter_.flags) if filter_ is not None else (0, 0)
        self._block = struct.pack(
            f"8Q{len(images) + 1}Q", _FLAGS, pid_address, ctypes.addressof(self._status), argv, env, program, flags, terminal,
            *(image.path_address for image in images), 0,
        )  # fmt: skip
        self._keep = (images, filter_)

    def run(self) -> None:
        """Returns once the program runs; this process is then done. Raises OSError from clone, or Failure with the step that failed."""
        result = _launch(self._block)  # type: ignore[operator]
        if result < 0:
            raise Failure("start", "clone", errno=-result)
        step, number = divmod(self._status.value, 1 << 16)
        if number:
            raise LastForkFailed(_STEPS[step], number)


class LastForkFailed(Exception):
    """``step`` is "exec" when no candidate could be run."""

    def __init__(self, step: str, errno: int) -> None:
        super().__init__(step, errno)
        self.step, self.errno = step, errno
