"""Inherited attributes, title and identity, each checked from outside or through /proc in a forked child."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.linux import libc, process


def in_child(body: Callable[[], str]) -> str:
    """What ``body`` returns in a forked child."""
    read, write = os.pipe()
    pid, _ = libc.clone3(0)
    if pid == 0:
        try:
            os.write(write, body().encode())
        except BaseException as error:
            os.write(write, f"failed: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    assert not text.startswith("failed"), text
    return text


def status(*names: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return " ".join(line.split()[1] for line in lines if line.split(":")[0] in names)


def test_reset_inherited() -> None:
    saved = process.save_inherited()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def body() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(1, soft - 1), hard))
        os.umask(0)
        os.chdir("/proc")
        os.nice(3)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        process.reset_inherited(saved)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        umask = os.umask(0)
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return f"{limit} {umask:o} {os.getcwd()} {nice if os.geteuid() == 0 else 0} {sorted(os.sched_getaffinity(0))}"

    assert in_child(body) == f"{(soft, hard)} 22 / 0 {sorted(os.sched_getaffinity(0))}"


def test_session_keyring_is_new() -> None:
    def body() -> str:
        try:
            before = libc.keyctl(libc.KEYCTL_GET_KEYRING_ID, libc.KEY_SPEC_SESSION_KEYRING, 1)
        except OSError as error:
            return f"no keyrings here: {error.errno}"
        process.new_session_keyring()
        return str(libc.keyctl(libc.KEYCTL_GET_KEYRING_ID, libc.KEY_SPEC_SESSION_KEYRING, 0) != before)

    said = in_child(body)
    if said.startswith("no keyrings"):
        pytest.skip(said)
    assert said == "True"


def _open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_close_all_except_leaves_exactly_the_kept() -> None:
    read, write = os.pipe()
    pid, _ = libc.clone3(0)
    if pid == 0:
        high = os.dup2(write, 200)
        os.dup2(write, 300)
        process.close_all_except({write, high, 1})
        os.write(write, " ".join(str(fd) for fd in range(400) if _open(fd)).encode())
        os._exit(0)
    os.close(write)
    assert os.read(read, 100).decode() == f"1 {write} 200"
    os.close(read)
    os.waitpid(pid, 0)


def test_title() -> None:
    def body() -> str:
        process.locate_title()
        process.set_title("cri-shim: pod")
        shown = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()
        return f"{shown}|{Path('/proc/self/comm').read_text().strip()}|{os.environ.get('PATH', '') != ''}"

    assert in_child(body) == "cri-shim: pod|cri-shim: pod|True"


def test_title_that_is_too_long_stays_in_the_argv_area() -> None:
    def body() -> str:
        environment = Path("/proc/self/environ").read_bytes()
        process.locate_title()
        process.set_title("x" * 100_000)
        return str(Path("/proc/self/environ").read_bytes() == environment)

    assert in_child(body) == "True"


def test_dumpable() -> None:
    def body() -> str:
        process.set_dumpable(False)
        return str(libc.prctl(libc.PR_GET_DUMPABLE))

    assert in_child(body) == "0"


def test_starttime_of_a_process_with_a_hostile_name() -> None:
    read, write = os.pipe()
    pid, _ = libc.clone3(0)
    if pid == 0:
        libc.prctl(libc.PR_SET_NAME, b"a) R 1 2 3 (")
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    try:
        mine, its = process.starttime(os.getpid()), process.starttime(pid)
        assert 0 < mine <= its
        proc = os.open("/proc", os.O_PATH)
        assert process.starttime(pid, proc) == its
        os.close(proc)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def test_oom_score_adj() -> None:
    def body() -> str:
        proc = os.open("/proc", os.O_PATH)
        process.set_oom_score_adj(proc, 321)
        return Path("/proc/self/oom_score_adj").read_text().strip()

    assert in_child(body) == "321"


def test_boot_id() -> None:
    assert len(process.boot_id()) == 36
