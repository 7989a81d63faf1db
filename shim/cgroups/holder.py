"""A process that does nothing but keep a new scope alive until the container's own is in it.

systemd starts no scope without a process. Given ours it would charge the container for what stage1 still allocates, and throttle
stage1 by the container's limits; so it gets a program of some twenty bytes that waits on a pipe. It ends with whoever holds the other end,
whatever kills that.
"""

from __future__ import annotations

import os
import signal
import struct

from shim.linux import elf, libc

# again: read(0, sp, 1); exit(0). There is never anything to read: it returns when the last writer is gone.
# xor eax,eax; xor edi,edi; mov rsi,rsp; mov edx,1; syscall; mov eax,60; xor edi,edi; syscall
_X86_64 = bytes.fromhex("31c0" "31ff" "4889e6" "ba01000000" "0f05" "b83c000000" "31ff" "0f05")
# mov x0,#0; mov x1,sp; mov x2,#1; mov w8,#63; svc #0; mov x0,#0; mov w8,#93; svc #0
_AARCH64 = struct.pack("<8I", 0xD2800000, 0x910003E1, 0xD2800022, 0x528007E8, 0xD4000001, 0xD2800000, 0x52800BA8, 0xD4000001)
_CODE = {"x86_64": _X86_64, "aarch64": _AARCH64}


def image(machine: str = elf.MACHINE) -> bytes:
    """The executable for ``machine`` (``uname -m``). Raises KeyError where the project does not run."""
    return elf.executable(_CODE[machine], machine)


class Holder:
    """``pid`` is its process, or our own where this machine does not execute memory files (vm.memfd_noexec)."""

    __slots__ = ("_end", "pid")

    def __init__(self) -> None:
        """Raises OSError."""
        program = libc.sealed_memfd("cri-shim-holder", image())
        waits, self._end = os.pipe2(os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, waits, 0)]
            self.pid = os.posix_spawn(f"/proc/self/fd/{program}", ["cri-shim: holder"], {}, file_actions=actions)
        except PermissionError:
            self.pid = os.getpid()
        finally:
            os.close(waits)
            os.close(program)

    @property
    def ourselves(self) -> bool:
        return self.pid == os.getpid()

    def release(self) -> None:
        """End it, which by now empties no scope. May be repeated."""
        if self._end < 0:
            return
        os.close(self._end)
        self._end = -1
        if not self.ourselves:
            os.kill(self.pid, signal.SIGKILL)  # our own child: nobody else can have got its pid
            os.waitpid(self.pid, 0)
