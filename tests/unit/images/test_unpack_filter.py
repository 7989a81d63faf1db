"""The filter of the unpacking child, installed for real in a forked process."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cri.images.unpack_filter import Filter, program
from shim.linux import libc


def outcome(work: Callable[[], object]) -> int:
    """The wait status of a child that installs the filter and does ``work``."""
    filter = Filter()
    pid = os.fork()
    if pid == 0:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        filter.install()
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize(
    "work",
    [
        lambda: socket.socket(),
        lambda: os.fork(),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.kill(os.getpid(), 0),
        lambda: os.chroot("/"),
        lambda: os.rename("/a", "/b"),
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        lambda: libc.syscall(libc.NR["openat2"], 0, 0, 0, 0),
    ],
)
def test_what_unpacking_does_not_need_kills(work: Callable[[], object]) -> None:
    status = outcome(work)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS


def test_files_can_be_made(tmp_path: Path) -> None:
    def work() -> None:
        fd = os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, b"x" * 100_000)
        os.close(fd)
        mmap.mmap(-1, 4096)

    assert outcome(work) == 0 and (tmp_path / "f").stat().st_size == 100_000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_stays_inside(machine: str) -> None:
    code = program(machine)
    count = len(code) // 8
    for position in range(count):
        operation, true, false = code[position * 8], code[position * 8 + 2], code[position * 8 + 3]
        if operation in (0x15, 0x45):
            assert position + 1 + max(true, false) < count
    assert code[-8] == 0x06, "it ends in a return"
