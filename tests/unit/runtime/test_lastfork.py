"""The machine code is what its source says, and does what it should."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shim.runtime import lastfork

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


HELPER = """
import json, os, sys
from shim.linux import process
from shim.runtime import lastfork
from shim.runtime.slots import PidSlots

paths, argv = json.loads(sys.argv[1])
process.set_subreaper()
slots = PidSlots()
slot = slots.take()
read, write = os.pipe()
stage = os.fork()
if stage == 0:
    command = lastfork.Command([p.encode() for p in paths], [a.encode() for a in argv], [b"A=b"])
    try:
        lastfork.LastFork(command, terminal=False, filter_=None, pid_address=slots.address(slot)).run()
        os.write(write, b"ok")
    except lastfork.LastForkFailed as failed:
        os.write(write, f"{failed.step} {failed.errno}".encode())
    finally:
        os._exit(0)
os.close(write)
said = os.read(read, 100).decode()
os.waitpid(stage, 0)
pid = slots.pid(slot)
leads = os.getsid(pid) == pid
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), leads, said]))
"""


def launch(paths: list[str], argv: list[str]) -> tuple[int, bool, str]:
    """(exit code, session leader?, failed step) of a program run by a child that forks it last, as the supervisor's own child."""
    env = {**os.environ, "PYTHONPATH": str(SOURCES.parents[1]), "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}
    command = [sys.executable, "-c", HELPER, json.dumps([paths, argv])]
    done = subprocess.run(command, env=env, check=True, capture_output=True, timeout=20)
    code, leads, said = json.loads(done.stdout)
    return code, leads, said


def test_runs_the_first_candidate_that_exists() -> None:
    code, leads, said = launch(["/nonexistent/sh", "/bin/sh", "/bin/false"], ["sh", "-c", 'test "$A" = b && exit 42'])
    assert (code, leads, said) == (42, True, "ok")


@pytest.mark.parametrize(
    ("paths", "number"),
    [
        (["/nonexistent/a", "/etc/passwd/b"], errno.ENOENT),
        (["/etc/passwd", "/nonexistent/a"], errno.EACCES),
        (["/etc/passwd/a"], errno.ENOTDIR),
    ],
)
def test_says_why_nothing_could_be_run(paths: list[str], number: int) -> None:
    assert launch(paths, ["x"]) == (127, True, f"exec {number}")
