"""Capabilities by name, as bit masks, and the calls that take them away."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from shim.linux import libc

NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK",
    "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE",
    "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}
CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN = (NUMBERS[n] for n in ("CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_SYS_ADMIN"))

_last: int | None = None


def last_cap() -> int:
    """The highest capability this kernel knows, asked once; needs no /proc."""
    global _last
    if _last is None:
        number = len(NAMES) - 1
        while number > 0 and not _known(number):
            number -= 1
        while _known(number + 1):
            number += 1
        _last = number
    return _last


def _known(number: int) -> bool:
    try:
        libc.prctl(libc.PR_CAPBSET_READ, number)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def mask(names: Iterable[str]) -> int:
    """Bit mask of "CAP_X" names. ValueError for a name that does not exist; one newer than this kernel is left out, as runc does."""
    result = 0
    for name in names:
        number = NUMBERS.get(name)
        if number is None:
            raise ValueError(f"unknown capability {name!r}")
        result |= 1 << number
    return result & ((1 << (last_cap() + 1)) - 1)


def names(bits: int) -> tuple[str, ...]:
    """The inverse of ``mask`` for the capabilities that have a name here."""
    return tuple(name for number, name in enumerate(NAMES) if bits >> number & 1)


def drop_bounding(keep: int) -> None:
    """Take everything outside ``keep`` from the bounding set; needs CAP_SETPCAP in this user namespace."""
    for number in range(last_cap() + 1):
        if not keep >> number & 1:
            libc.prctl(libc.PR_CAPBSET_DROP, number)


def keepcaps(keep: bool) -> None:
    """Whether permitted capabilities survive the change from uid 0; the kernel clears the flag at execve."""
    libc.prctl(libc.PR_SET_KEEPCAPS, int(keep))


def set_caps(effective: int, permitted: int, inheritable: int) -> None:
    libc.capset(effective, permitted, inheritable)


def set_ambient(bits: int) -> None:
    """Exactly these; each must be permitted and inheritable (EPERM otherwise)."""
    libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    number = 0
    while bits >> number:
        if bits >> number & 1:
            libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_RAISE, number)
        number += 1
