"""Filters in force: real processes that run under them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
from collections.abc import Callable

import pytest

from shim import seccomp
from shim.linux import caps, libc
from shim.oci.spec import Seccomp, SeccompArg, SeccompRule

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="system call numbers of x86_64"),
]
MARKER = Seccomp(seccomp.RUNTIME_DEFAULT)


def filtered(profile: Seccomp, body: Callable[[], object], capabilities: tuple[str, ...] = ()) -> int:
    """Exit status of a child that runs ``body`` behind the filter: the body's result, or minus the signal that ended it."""
    prepared = seccomp.prepare(profile, capabilities)
    pid = os.fork()
    if pid == 0:
        try:
            prepared.install()
            os._exit(int(body() or 0))  # type: ignore[call-overload]
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(250)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def refusal(nr: int, *args: int) -> int:
    """0, or the errno of a system call."""
    try:
        libc.syscall(nr, *args)
    except OSError as error:
        return error.errno or 0
    return 0


def test_refused_calls() -> None:
    assert filtered(MARKER, lambda: refusal(41, 38, 5)) == errno.EPERM
    assert filtered(MARKER, lambda: refusal(41, 40, 1)) == errno.EPERM
    assert filtered(MARKER, lambda: refusal(41, 38 | 1 << 32, 5)) == errno.EPERM
    assert filtered(MARKER, lambda: refusal(41, 2, 1)) == 0
    assert filtered(MARKER, lambda: refusal(272, libc.CLONE_NEWUSER)) == errno.EPERM
    assert filtered(MARKER, lambda: refusal(435, 0, 0)) == errno.ENOSYS
    assert filtered(MARKER, lambda: refusal(425, 1, 0)) == errno.EPERM
    assert filtered(MARKER, lambda: refusal(700)) == errno.ENOSYS
    assert filtered(MARKER, lambda: refusal(165, 0, 0, 0, 0, 0), ("CAP_SYS_ADMIN",)) == errno.EFAULT
    # fchmodat2, which this library may not know, and this kernel neither
    assert filtered(MARKER, lambda: refusal(452, -100, 0, 0, 0)) in (errno.EFAULT, errno.ENOSYS)


def i386(nr: int, *args: int) -> int:
    """A 32-bit system call out of this 64-bit process: int 0x80 through a few bytes of code."""
    code = b"\x53" + b"".join([b"\xb8" + struct.pack("<I", nr), b"\xbb" + struct.pack("<I", args[0]), b"\xb9" + struct.pack("<I", args[1])])
    code += b"\xba\0\0\0\0\xcd\x80\x5b\xc3"
    area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    area.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()


def test_32_bit_calls_do_not_go_round_the_filter() -> None:
    if filtered(Seccomp("SCMP_ACT_ALLOW", architectures=("SCMP_ARCH_X86",)), lambda: 0 if i386(20, 0, 0) > 0 else 1) != 0:
        pytest.skip("this kernel runs no 32-bit code")
    assert filtered(MARKER, lambda: 0 if i386(20, 0, 0) == os.getpid() else 1) == 0
    assert filtered(MARKER, lambda: -i386(359, 38, 5)) == errno.EPERM, "socket(AF_ALG)"
    assert filtered(MARKER, lambda: -i386(310, libc.CLONE_NEWUSER, 0)) == errno.EPERM, "unshare"
    native = Seccomp("SCMP_ACT_ALLOW")
    assert filtered(native, lambda: i386(20, 0, 0)) == -signal.SIGSYS, "an architecture that the profile does not have"


def test_the_runtime_gets_from_the_filter_to_execve() -> None:
    """prctl, set*id, capset, fork and execve, in the order of a container without no_new_privs."""
    image = libc.ExecImage(b"/bin/busybox", [b"sh", b"-c", b"test $(id -u):$(id -g) = 1000:1001"], [b"PATH=/bin:/usr/bin"])

    def become() -> int:
        libc.prctl(libc.PR_SET_KEEPCAPS, 1)
        os.setgroups([1001])
        os.setresgid(1001, 1001, 1001)
        os.setresuid(1000, 1000, 1000)
        libc.capset(0, 0, 0)
        pid = os.fork()
        if pid == 0:
            image.exec()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert filtered(MARKER, become) == 0


def test_a_minimal_allow_list_is_enough_for_execve() -> None:
    allowed = ("execve", "exit", "exit_group", "prctl", "setresuid", "setresgid", "setgroups", "capset", "clone", "wait4", "brk", "mmap")
    libc_start = (
        "munmap",
        "mprotect",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "getrandom",
        "getuid",
    )
    more = ("getrandom", "getuid")
    profile = Seccomp("SCMP_ACT_KILL_PROCESS", syscalls=(SeccompRule(allowed + libc_start + more, "SCMP_ACT_ALLOW"),))
    image = libc.ExecImage(b"/bin/busybox", [b"true"], [])
    assert filtered(profile, image.exec) == 0


def test_actions() -> None:
    def only(action: str, value: int | None = None) -> Seccomp:
        return Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("getppid",), action, value),))

    assert filtered(only("SCMP_ACT_ERRNO", 71), lambda: refusal(110)) == 71
    assert filtered(only("SCMP_ACT_KILL_PROCESS"), lambda: refusal(110)) == -signal.SIGSYS
    assert filtered(only("SCMP_ACT_TRAP"), lambda: refusal(110)) == -signal.SIGSYS
    assert filtered(only("SCMP_ACT_TRACE"), lambda: refusal(110)) == errno.ENOSYS, "no tracer"
    assert filtered(only("SCMP_ACT_LOG"), lambda: refusal(110)) == 0
    by_value = SeccompRule(("getpriority",), "SCMP_ACT_ERRNO", 5, (SeccompArg(0, 1, "SCMP_CMP_EQ"),))
    assert filtered(Seccomp("SCMP_ACT_ALLOW", syscalls=(by_value,)), lambda: refusal(140, 1, 0)) == 5
    assert filtered(Seccomp("SCMP_ACT_ALLOW", syscalls=(by_value,)), lambda: refusal(140, 0, 0)) == 0


def test_an_unprivileged_process_needs_no_new_privs() -> None:
    prepared = seccomp.prepare(MARKER, ())

    def body() -> int:
        libc.capset(0, 0, 0)
        try:
            prepared.install()
            return 1
        except PermissionError:
            pass
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        prepared.install()
        return refusal(165, 0, 0, 0, 0, 0)

    assert filtered(Seccomp("SCMP_ACT_ALLOW"), body) == errno.EPERM
    assert caps.last_cap() > 30


def test_speculation_is_left_alone() -> None:
    def body() -> int:
        with open("/proc/self/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        assert status["Seccomp"] == "2"
        return 0 if "force mitigated" not in status.get("Speculation_Store_Bypass", "") else 1

    assert filtered(MARKER, body) == 0


def test_notify_hands_out_a_listener() -> None:
    notify = Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("mkdirat", "mkdir"), "SCMP_ACT_NOTIFY"),))
    prepared = seccomp.prepare(notify, ())
    assert prepared.notifies
    pid = os.fork()
    if pid == 0:
        try:
            listener = prepared.install()
            os._exit(0 if listener is not None and "seccomp notify" in os.readlink(f"/proc/self/fd/{listener}") else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
