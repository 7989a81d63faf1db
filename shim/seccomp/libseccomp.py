"""The binding to libseccomp, loaded when a profile has to be compiled and not before."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from shim.errors import Failure

NAME = "libseccomp.so.2"
UNKNOWN = -1  # __NR_SCMP_ERROR; other negative numbers mean "not on this architecture"
CTL_OPTIMIZE = 8  # attribute; value 2 sorts system calls into a binary tree
BAD_ARCH = 2  # attribute: the action for a foreign architecture


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(NAME, use_errno=True)
    except OSError as error:
        raise Failure(
            "seccomp", "load", path=NAME, message=str(error), hint="install libseccomp2, or run with an Unconfined profile"
        ) from error
    context, u32, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "seccomp_version": (ctypes.POINTER(_Version), ()),
        "seccomp_init": (context, (u32,)),
        "seccomp_release": (None, (context,)),
        "seccomp_arch_add": (ctypes.c_int, (context, u32)),
        "seccomp_attr_set": (ctypes.c_int, (context, ctypes.c_int, u32)),
        "seccomp_syscall_resolve_name_arch": (ctypes.c_int, (u32, text)),
        "seccomp_syscall_resolve_name": (ctypes.c_int, (text,)),
        "seccomp_syscall_resolve_num_arch": (ctypes.c_void_p, (u32, ctypes.c_int)),
        "seccomp_rule_add_array": (ctypes.c_int, (context, u32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison))),
        "seccomp_export_bpf": (ctypes.c_int, (context, ctypes.c_int)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def version() -> tuple[int, int, int]:
    """Of the installed library. Raises Failure if there is none."""
    found = _library().seccomp_version().contents
    return found.major, found.minor, found.micro


def resolve(name: str) -> int:
    """The number for this machine, negative for one that only other architectures have, or UNKNOWN."""
    return int(_library().seccomp_syscall_resolve_name(name.encode()))


def resolve_for(architecture: int, name: str) -> int:
    """The same for one of libseccomp's architecture tokens."""
    return int(_library().seccomp_syscall_resolve_name_arch(architecture, name.encode()))


def name(architecture: int, number: int) -> str:
    """The name of a system call, empty for a number that has none. The few bytes that the library allocates for it are not freed: ask
    once for each."""
    found = _library().seccomp_syscall_resolve_num_arch(architecture, number)
    return ctypes.string_at(found).decode() if found else ""


class Builder:
    """One filter under construction. A context manager: the library's memory is freed at its end."""

    def __init__(self, default_action: int) -> None:
        self._context = _library().seccomp_init(default_action)
        if not self._context:
            raise Failure("seccomp", "compile", message="libseccomp does not know the default action on this kernel")

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *exc: object) -> None:
        _library().seccomp_release(self._context)

    def architecture(self, token: int) -> None:
        result = _library().seccomp_arch_add(self._context, token)
        if result not in (0, -errno.EEXIST):
            raise _failure("add architecture", result, hex(token))

    def attribute(self, attribute: int, value: int) -> bool:
        """False where this version of the library lacks it."""
        return bool(_library().seccomp_attr_set(self._context, attribute, value) == 0)

    def rule(self, name: str, number: int, action: int, comparisons: Sequence[Comparison]) -> None:
        array = (Comparison * len(comparisons))(*comparisons)
        result = _library().seccomp_rule_add_array(self._context, action, number, len(comparisons), array)
        # EDOM: no architecture of the filter has it. A rule without any effect is not an error.
        if result not in (0, -errno.EDOM):
            failure = _failure("add rule", result, name)
            if result == -errno.EEXIST:
                failure.hint = "another rule of the profile says otherwise for the same call, perhaps only on a 32-bit architecture"
            raise failure

    def export(self) -> bytes:
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            result = _library().seccomp_export_bpf(self._context, fd)
            if result != 0:
                raise _failure("export", result, "")
            os.lseek(fd, 0, os.SEEK_SET)
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)


def _failure(operation: str, result: int, path: str) -> Failure:
    return Failure("seccomp", operation, errno=-result, path=path)
