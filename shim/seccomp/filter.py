"""A compiled filter, ready to be installed with one system call."""

from __future__ import annotations

import struct

from shim.errors import Failure
from shim.linux import libc
from shim.oci.spec import Seccomp

TSYNC, LOG, SPEC_ALLOW, NEW_LISTENER, TSYNC_ESRCH, WAIT_KILLABLE = 1, 2, 4, 8, 16, 32

_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": TSYNC,
    "SECCOMP_FILTER_FLAG_LOG": LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": WAIT_KILLABLE,
}
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS


class Filter:
    """``install`` makes exactly one system call and allocates nothing that could need another."""

    __slots__ = ("_address", "_flags", "_keep", "bpf", "notifies")

    def __init__(self, bpf: bytes, flags: int = 0) -> None:
        count, rest = divmod(len(bpf), 8)
        if rest or not 0 < count <= MAX_INSTRUCTIONS:
            raise Failure("seccomp", "install", message=f"{len(bpf)} bytes are not a filter of 1 to {MAX_INSTRUCTIONS} instructions")
        code = libc.Memory(bpf)
        program = libc.Memory(struct.pack("@HP", count, code.address))
        self._keep = (code, program)
        self._address = program.address
        self.bpf = bpf
        self._flags = flags
        self.notifies = bool(flags & NEW_LISTENER)

    @property
    def flags(self) -> int:
        return self._flags

    def install(self) -> int | None:
        """For this thread and what it becomes. Returns the listener's fd (close-on-exec) if the filter notifies.

        Needs CAP_SYS_ADMIN in the user namespace or no_new_privs. Raises OSError.
        """
        result = libc.seccomp(libc.SECCOMP_SET_MODE_FILTER, self._flags, self._address)
        return result if self.notifies else None


def flags(seccomp: Seccomp) -> int:
    """The flags of seccomp(2) for a profile. Raises Failure for a name that does not exist.

    Without any the peers set SPEC_ALLOW: a filter alone must not slow the program down by switching speculation off (before Linux 5.16).
    """
    value = 0
    for name in seccomp.flags:
        if name not in _FLAGS:
            raise Failure("seccomp", path="linux.seccomp.flags", message=f"no such flag: {name!r}")
        value |= _FLAGS[name]
    if not seccomp.flags:
        value = SPEC_ALLOW
    if seccomp.notifier or any(rule.action == "SCMP_ACT_NOTIFY" for rule in seccomp.syscalls):
        # TSYNC reports a thread id where NEW_LISTENER reports an fd. There is one thread here, so nothing is lost without it.
        return value & ~TSYNC | NEW_LISTENER
    if value & WAIT_KILLABLE:
        raise Failure("seccomp", path="linux.seccomp.flags", message="WAIT_KILLABLE_RECV is for profiles with SCMP_ACT_NOTIFY")
    return value
