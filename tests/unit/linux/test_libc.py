"""System call wrappers: what needs no privilege. Forked children leave through os._exit."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shim.linux import libc

REPOSITORY = Path(__file__).resolve().parents[3]


def wait_for(pidfd: int) -> None:
    assert select.select([pidfd], [], [], 5)[0]


def test_clone3_gives_pid_pidfd_and_exit() -> None:
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        os._exit(7 if pidfd == -1 else 8)
    try:
        assert libc.pidfd_info_exit(pidfd) is None
        wait_for(pidfd)
        assert libc.waitid_pidfd(pidfd) == libc.Exit(os.CLD_EXITED, 7)
        info = libc.pidfd_info_exit(pidfd)
        assert info in (None, 7 << 8)  # None before Linux 6.15
        with pytest.raises(ChildProcessError):
            libc.waitid_pidfd(pidfd)
    finally:
        os.close(pidfd)


def test_clone3_stores_the_pid_where_a_sibling_can_read_it() -> None:
    import mmap

    with mmap.mmap(-1, 4096) as page:
        anchor = ctypes.c_int.from_buffer(page)
        pid, _ = libc.clone3(0, parent_tid_address=ctypes.addressof(anchor))
        if pid == 0:
            os._exit(0)
        assert anchor.value == pid
        os.waitpid(pid, 0)
        del anchor


def test_a_child_of_clone3_can_work_and_be_killed() -> None:
    read, write = os.pipe()
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        os.write(write, " ".join(sorted(str(i) for i in range(500))).encode()[:5])
        signal.pause()
    assert os.read(read, 5) == b"0 1 1"
    assert libc.waitid_pidfd(pidfd) is None
    libc.pidfd_send_signal(pidfd, signal.SIGKILL)
    wait_for(pidfd)
    assert libc.waitid_pidfd(pidfd) == libc.Exit(os.CLD_KILLED, signal.SIGKILL)
    for fd in (read, write, pidfd):
        os.close(fd)


def test_exec_image() -> None:
    read, write = os.pipe()
    image = libc.ExecImage(b"/bin/sh", [b"sh", b"-c", b'echo "$A $1"', b"x", b"arg"], [b"A=b"])
    pid, _ = libc.clone3(0)
    if pid == 0:
        os.dup2(write, 1)
        image.exec()
    os.close(write)
    assert os.read(read, 64) == b"b arg\n"
    os.close(read)
    assert os.waitpid(pid, 0)[1] == 0


def test_exec_image_that_fails() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        libc.ExecImage(b"/does/not/exist", [b"x"], []).exec()
    assert caught.value.filename == "/does/not/exist"


@pytest.mark.parametrize("argv, env", [([b"a\0b"], []), ([b"a"], [b"X=1\0Y=2"])])
def test_nul_would_cut_an_argument(argv: list[bytes], env: list[bytes]) -> None:
    with pytest.raises(OSError) as caught:
        libc.ExecImage(b"/bin/sh", argv, env)
    assert caught.value.errno == errno.EINVAL


def test_nul_would_name_another_file() -> None:
    with pytest.raises(OSError) as caught:
        libc.openat2(libc.AT_FDCWD, "/etc\0/passwd", os.O_PATH)
    assert caught.value.errno == errno.EINVAL


def test_errors_carry_number_text_and_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        libc.openat2(libc.AT_FDCWD, "/nope", os.O_RDONLY)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/nope")


def test_interrupted_calls_are_repeated() -> None:
    """A blocking read by raw number sees EINTR from the timer, whose Python handler runs in between."""
    number = 0 if libc.MACHINE == "x86_64" else 63
    read, write = os.pipe()
    beats = []

    def beat(*_: object) -> None:
        beats.append(1)
        if len(beats) == 3:
            os.write(write, b"x")

    before = signal.signal(signal.SIGALRM, beat)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert libc.syscall(number, read, ctypes.create_string_buffer(1), 1) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(read)
        os.close(write)
    assert len(beats) >= 3


def test_sealed_memfd() -> None:
    fd = libc.sealed_memfd("payload", b"x" * 100_000)
    try:
        assert os.read(fd, 200_000) == b"x" * 100_000
        with pytest.raises(PermissionError):
            os.write(fd, b"y")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_signal_mask_round_trip() -> None:
    before = libc.set_signal_mask(1 << (signal.SIGUSR1 - 1))
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR1}
    finally:
        assert libc.set_signal_mask(before) == 1 << (signal.SIGUSR1 - 1)


def test_prlimit_reads_and_sets() -> None:
    import resource

    soft, hard = libc.prlimit(0, resource.RLIMIT_CORE)
    expected = tuple(libc.RLIM_INFINITY if v == resource.RLIM_INFINITY else v for v in resource.getrlimit(resource.RLIMIT_CORE))
    assert (soft, hard) == expected
    assert libc.prlimit(0, resource.RLIMIT_CORE, (0, hard)) == (soft, hard)
    assert libc.prlimit(0, resource.RLIMIT_CORE, (soft, hard))[0] == 0


def test_descriptors_are_close_on_exec() -> None:
    fds = [libc.openat2(libc.AT_FDCWD, "/", os.O_PATH), libc.pidfd_open(os.getpid()), libc.eventfd()]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)


def test_every_number_exists_for_both_architectures() -> None:
    """Spot checks against the kernel's tables; equal numbers only from 424 on, where the tables were unified."""
    assert libc._NUMBERS["openat2"] == (437, 437)
    assert libc._NUMBERS["setns"] == (308, 268)
    assert all((x86 == arm) == (x86 >= 424) for x86, arm in libc._NUMBERS.values())


def test_import_is_cheap() -> None:
    """Children fork from this: nothing heavy may come along, and an import must not cost a start its milliseconds."""
    code = (
        "import sys, os, time; start = time.perf_counter()\n"
        "from shim.linux import libc, mount, process, path, caps\n"
        "print(time.perf_counter() - start, *sorted(sys.modules))"
    )
    best = 1.0
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
        best = min(best, float(out[0]))
    assert not {"asyncio", "dataclasses", "inspect", "enum", "logging", "subprocess"} & set(out[1:]) - {"enum"}
    assert best < 0.05  # 4 ms on an idle machine
