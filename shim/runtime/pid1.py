"""PID 1 of a pod whose containers share a PID namespace: a static ELF of under 200 bytes, emitted here per architecture.

It is exec'd, so nothing of ours stays in its memory. SIGCHLD is ignored before the exec, and ignored dispositions survive it
(execve(2)): the kernel then reaps every orphan itself (wait(2), NOTES), and the program only has to pause for ever. PID 1 has no
handlers, so no signal from inside its namespace ends it (pid_namespaces(7)).
"""

from __future__ import annotations

import struct

from shim.linux import elf

# pause() for ever. x86_64: mov eax, 34; syscall; jmp -9
_X86_64 = bytes.fromhex("b822000000" "0f05" "ebf7")
# aarch64 has no pause: ppoll(NULL, 0, NULL, NULL, 0) with no timeout waits for ever.
# mov x0..x4, #0; mov w8, #73; svc #0; b -28
_AARCH64 = struct.pack(
    "<8I", 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800004, 0x52800928, 0xD4000001, 0x17FFFFF9
)
_CODE = {"x86_64": _X86_64, "aarch64": _AARCH64}


def image(machine: str = elf.MACHINE) -> bytes:
    """The executable for ``machine`` (``uname -m``). Raises KeyError where the project does not run."""
    return elf.executable(_CODE[machine], machine)
