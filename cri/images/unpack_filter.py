"""The seccomp filter of the process that reads archives: the system calls of applying one, nothing else, and no executable memory.

A fixed list and not a profile through libseccomp: the helper would load a library for it, and the list has to be kept to the letter
anyway. Whatever is not in it kills the process, which the daemon reports as such.
"""

from __future__ import annotations

import struct

from shim.linux import libc

# (x86-64, arm64); None: the machine has only the *at form.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # the archive and the files
    **{"read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "preadv": (295, 69), "preadv2": (327, 286), "lseek": (8, 62)},
    **{"write": (1, 64), "writev": (20, 66), "pwrite64": (18, 68), "ftruncate": (77, 46), "openat": (257, 56), "open": (2, None)},
    **{"close": (3, 57), "fcntl": (72, 25), "getdents64": (217, 61)},
    # what they are called and whose they are
    **{"fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None)},
    **{"mkdirat": (258, 34), "linkat": (265, 37), "symlinkat": (266, 36), "mknodat": (259, 33), "unlinkat": (263, 35)},
    **{"mkdir": (83, None), "link": (86, None), "symlink": (88, None), "mknod": (133, None), "unlink": (87, None), "rmdir": (84, None)},
    **{"fchown": (93, 55), "fchownat": (260, 54), "chown": (92, None), "lchown": (94, None)},
    **{"fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chmod": (90, None), "utimensat": (280, 88)},
    **{"fsetxattr": (190, 7), "lsetxattr": (189, 6), "setxattr": (188, 5)},
    # reports to the helper
    **{"sendmsg": (46, 211), "sendto": (44, 206)},
    # the interpreter
    **{"munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "futex": (202, 98)},
    **{"rt_sigreturn": (15, 139), "exit": (60, 93), "exit_group": (231, 94), "getrandom": (318, 278), "clock_gettime": (228, 113)},
    **{"sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sysinfo": (99, 179)},  # locks and allocation of C libraries
    **{"getpid": (39, 172), "gettid": (186, 178), "geteuid": (107, 175), "getegid": (108, 177)},
}
_MAPPING: dict[str, tuple[int, int]] = {"mmap": (9, 222), "mprotect": (10, 226)}  # allowed without PROT_EXEC
_ARCHITECTURE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _BITS, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
_ALLOW, _KILL = 0x7FFF0000, 0x80000000  # SECCOMP_RET_KILL_PROCESS
_NUMBER, _MACHINE, _PROTECTION = 0, 4, 32  # offsets in struct seccomp_data: nr, arch, low word of the third argument
_PROT_EXEC = 4


def program(machine: str = libc.MACHINE) -> bytes:
    """The filter as an array of struct sock_filter."""
    column, architecture = _ARCHITECTURE[machine]
    mapping = [numbers[column] for numbers in _MAPPING.values()]
    plain = [number for numbers in _CALLS.values() if (number := numbers[column]) is not None]
    kill = 3 + len(mapping) + len(plain)  # position of the instruction that kills; then load, test, kill, allow
    check, allow = kill + 1, kill + 4
    code = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 0, kill - 2, architecture), (_LOAD, 0, 0, _NUMBER)]
    for number in mapping:
        code.append((_EQUAL, check - len(code) - 1, 0, number))
    for number in plain:
        code.append((_EQUAL, allow - len(code) - 1, 0, number))
    code += [(_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _PROTECTION), (_BITS, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in code)


class Filter:
    """Made before confinement; ``install`` is one system call. Needs no_new_privs."""

    def __init__(self) -> None:
        code = program()
        self._code = libc.Memory(code)
        self._program = libc.Memory(struct.pack("@HP", len(code) // 8, self._code.address))

    def install(self) -> None:
        libc.seccomp(libc.SECCOMP_SET_MODE_FILTER, 0, self._program.address)
