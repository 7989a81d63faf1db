"""The machine code is what its source says, and does what it should."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shim.linux import libc
from shim.runtime import lastfork
from shim.runtime.slots import PidSlots

SOURCES = Path(lastfork.__file__).parent
TOOLS = {"x86_64": ("x86_64-linux-gnu-as", "x86_64-linux-gnu-objcopy"), "aarch64": ("aarch64-linux-gnu-as", "aarch64-linux-gnu-objcopy")}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_code_is_the_assembled_source(machine: str, tmp_path: Path) -> None:
    assembler, objcopy = TOOLS[machine]
    if shutil.which(assembler) is None:
        pytest.skip(f"{assembler} is not installed (Debian: binutils-{machine.replace('_', '-')}-linux-gnu)")
    source = subprocess.run(["cpp", "-P", str(SOURCES / f"lastfork_{machine}.S")], check=True, capture_output=True).stdout
    subprocess.run([assembler, "-o", str(tmp_path / "o"), "-"], input=source, check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", str(tmp_path / "o"), str(tmp_path / "bin")], check=True)
    assert (tmp_path / "bin").read_bytes() == lastfork._CODE[machine]


def launch(paths: list[bytes], argv: list[bytes]) -> tuple[int, int, str]:
    """(exit code, session leader?, failed step) of a program run by a child that forks it last, as the supervisor's own child."""
    slots = PidSlots()
    slot = slots.take()
    assert slot is not None
    first = libc.ExecImage(paths[0], argv, [b"A=b"])
    images = [first, *(first.at(p) for p in paths[1:])]
    read, write = os.pipe()
    stage = os.fork()
    if stage == 0:
        try:
            lastfork.LastFork(images, terminal=False, filter_=None, pid_address=slots.address(slot)).run()
            os.write(write, b"ok")
        except lastfork.LastForkFailed as failed:
            os.write(write, f"{failed.step} {failed.errno}".encode())
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode()
    os.close(read)
    os.waitpid(stage, 0)
    pid = slots.pid(slot)
    session = os.getsid(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(session == pid), said


def test_runs_the_first_candidate_that_exists() -> None:
    code, leads, said = launch([b"/nonexistent/sh", b"/bin/sh", b"/bin/false"], [b"sh", b"-c", b'test "$A" = b && exit 42'])
    assert (code, leads, said) == (42, 1, "ok")


@pytest.mark.parametrize(
    ("paths", "number"),
    [
        ([b"/nonexistent/a", b"/etc/passwd/b"], errno.ENOENT),
        ([b"/etc/passwd", b"/nonexistent/a"], errno.EACCES),
        ([b"/etc/passwd/a"], errno.ENOTDIR),
    ],
)
def test_says_why_nothing_could_be_run(paths: list[bytes], number: int) -> None:
    assert launch(paths, [b"x"]) == (127, 1, f"exec {number}")
