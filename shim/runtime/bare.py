"""Forking a process that has a program of system calls, the code that runs it, and nothing else of ours.

What is seen inside a container must not lead back to us: a process there with CAP_SYS_PTRACE may stop it, read all of its memory and
write to it. So the forked process gets a copy of a small region (``Region``) and of nothing else: all other mappings of this process are
marked MADV_DONTFORK first. (CLONE_VM would be cheaper still, but whoever writes to the child's memory then writes to its parent's,
which is outside the PID namespace; a full fork hands out a copy of the heap and costs a millisecond or two.)

The C library must not have registered a restartable sequence (rseq(2)): its area would be missing in the child, which the kernel
answers with SIGSEGV. ``shim.client`` starts the supervisor with a tunable that says so.
"""

from __future__ import annotations

import ctypes
import errno
import mmap

from shim.errors import Failure
from shim.linux import libc
from shim.runtime.program import CODE, DATA, LAUNCH, REPORT, Writer

_NR_MMAP, _NR_MPROTECT, _NR_MUNMAP, _NR_MADVISE = (9, 10, 11, 28) if libc.MACHINE == "x86_64" else (222, 226, 215, 233)
_READ_WRITE, _READ_EXECUTE = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC
_MADV_DONTFORK, _MADV_DOFORK = 10, 11
_LOWEST, _HIGHEST = 1 << 16, (1 << (47 if libc.MACHINE == "x86_64" else 48)) - mmap.PAGESIZE  # where user mappings lie
_KERNELS = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")  # not to be marked: some cannot be unmarked, and they hold nothing of ours
_Function = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)


class _Code:
    """The code, in one page of this process and of all that it forks."""

    def __init__(self) -> None:
        code = CODE[libc.MACHINE]
        self.base = _map(mmap.PAGESIZE, mmap.MAP_PRIVATE)
        ctypes.memmove(self.base, code, len(code))
        libc.syscall(_NR_MPROTECT, self.base, mmap.PAGESIZE, _READ_EXECUTE)
        self.launch = _Function(self.base + LAUNCH)
        self.keep = sorted({(self.base, self.base + mmap.PAGESIZE), *_of_the_kernel()})


_code: _Code | None = None


def load() -> None:
    """Once, where /proc can be seen; children that are forked later have the code too."""
    global _code
    if _code is None:
        _code = _Code()


def _map(size: int, sharing: int) -> int:
    return libc.syscall(_NR_MMAP, 0, size, _READ_WRITE, sharing | mmap.MAP_ANONYMOUS, -1, 0)


def _of_the_kernel() -> list[tuple[int, int]]:
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            place, *_, name = line.split()
            if name in _KERNELS:
                start, _, end = place.partition("-")
                found.append((int(start, 16), min(int(end, 16), _HIGHEST)))
    return [(start, end) for start, end in found if start < _HIGHEST]


class Region:
    """Memory for one program. Shared with the forked process if the program is still to be completed, or if its report is to be read;
    otherwise that has a copy."""

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.base = _map(self.size, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)

    def write(self, content: bytes, offset: int = 0) -> None:
        if offset + len(content) > self.size:
            raise Failure("launch", message=f"{len(content)} bytes of program, room for {self.size - offset}")
        ctypes.memmove(self.base + offset, content, len(content))

    def complete(self, writer: Writer, before: tuple[int, int]) -> None:
        """Add what ``writer`` has got since ``mark``: data first, so that no operation points nowhere."""
        operations, data = before
        image = writer.image()
        self.write(image[DATA + data :], DATA + data)
        self.write(image[64 * (1 + operations) : DATA], 64 * (1 + operations))

    def report(self) -> tuple[int, int]:
        """Step and errno of a region that is used for nothing but a report."""
        step, number = REPORT.unpack(ctypes.string_at(self.base, REPORT.size))
        return step, number

    def integer(self, address: int) -> int:
        """The int that the kernel has written at an address of the region."""
        return ctypes.c_int.from_address(address).value

    def close(self) -> None:
        if self.size:
            libc.syscall(_NR_MUNMAP, self.base, self.size)
            self.size = 0


def hold_back(*regions: Region) -> None:
    """Keep everything but ``regions`` and the code from what ``fork`` makes; ``libc.clone3`` undoes that first. To be done before a filter
    is on, which need not know madvise."""
    assert _code is not None, "load() comes first"
    kept = sorted([*_code.keep, *((region.base, region.base + region.size) for region in regions)])
    libc.before_fork(let_go)
    _advise(kept, _MADV_DONTFORK)


def let_go() -> None:
    """This process can fork copies of itself again."""
    assert _code is not None
    libc.before_fork(None)
    _advise(_code.keep, _MADV_DOFORK)


def _advise(kept: list[tuple[int, int]], advice: int) -> None:
    edges = [_LOWEST, *(edge for span in kept for edge in span), _HIGHEST]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if start >= end:
            continue
        try:
            libc.syscall(_NR_MADVISE, start, end - start, advice)
        except OSError as error:
            if error.errno != errno.ENOMEM:  # there are holes; the mappings around them have been marked all the same (madvise(2))
                raise


def fork(region: Region) -> int:
    """Make the clone that the program in ``region`` asks for, after ``hold_back``; its pid. Raises OSError."""
    assert _code is not None
    result = _code.launch(region.base)
    if result < 0:
        raise OSError(-result, f"clone: errno {-result}")
    return int(result)
