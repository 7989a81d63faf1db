"""Programs of system calls: the machine code is what its source says, and processes that are forked bare do what they should."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shim.runtime import program

SOURCES = Path(program.__file__).parent


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_code_is_the_assembled_source(machine: str, tmp_path: Path) -> None:
    assembler = f"{machine}-linux-gnu-as"
    if shutil.which(assembler) is None:
        pytest.skip(f"{assembler} is not installed (Debian: binutils-{machine.replace('_', '-')}-linux-gnu)")
    source = subprocess.run(["cpp", "-P", str(SOURCES / f"program_{machine}.S")], check=True, capture_output=True).stdout
    subprocess.run([assembler, "-o", str(tmp_path / "o"), "-"], input=source, check=True)
    objcopy = [f"{machine}-linux-gnu-objcopy", "-O", "binary", "-j", ".text", str(tmp_path / "o"), str(tmp_path / "bin")]
    subprocess.run(objcopy, check=True)
    assert (tmp_path / "bin").read_bytes() == program.CODE[machine]
    symbols = subprocess.run([f"{machine}-linux-gnu-nm", str(tmp_path / "o")], check=True, capture_output=True, text=True).stdout
    assert f"{program.LAUNCH:016x} T launch" in symbols


BARE = """
import json, os, sys
from shim.linux import libc, process
from shim.oci import command
from shim.runtime import bare, program
from shim.runtime.program import At, Kind
from shim.runtime.slots import PidSlots

bare.load()
process.set_subreaper()
slots = PidSlots()
slot = slots.take()
read, write = os.pipe()
secret = b"nobody's " + b"business"


def stage(plan):
    pid = os.fork()
    if pid == 0:
        region, status = bare.Region(1 << 18, shared=False), bare.Region(8, shared=True)
        w = program.Writer(region.base, -1, report_at=status.base)
        flags = libc.CLONE_VFORK | libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID
        w.clone = (program.NR["clone"], flags, 0, slots.address(slot))
        plan(w)
        region.write(w.image())
        bare.hold_back(region, status)
        try:
            bare.fork(region)
            step, number = status.report()
            os.write(write, f"{At(step).name} {number}".encode())
            again, _ = libc.clone3(0)
            if again == 0:
                os._exit(0 if secret else 1)
            os.write(write, b" %d" % os.waitpid(again, 0)[1])
        finally:
            os._exit(0)
    os.close(write)
    said = b""
    while data := os.read(read, 100):
        said += data
    os.waitpid(pid, 0)
    return said.decode(), slots.pid(slot)
"""
HELPER = BARE + """
paths, argv = json.loads(sys.argv[1])


def plan(w):
    program.lead_session(w, terminal=False)
    at = w.data(b"")
    block = bytearray(command.block(argv, ["A=b", "PATH=" + ":".join(os.path.dirname(p) for p in paths)], at))
    w.call(At.EXEC, "", w.data(block), kind=Kind.CANDIDATES)


said, pid = stage(plan)
leads = os.getsid(pid) == pid
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), leads, said]))
"""


def run(helper: str, *arguments: str) -> str:
    """What a script says that forks bare processes, in an interpreter that is started as the supervisor's is."""
    env = {**os.environ, "PYTHONPATH": str(SOURCES.parents[1]), "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}
    return subprocess.run([sys.executable, "-c", helper, *arguments], env=env, check=True, capture_output=True, timeout=20).stdout.decode()


def launch(paths: list[str], argv: list[str]) -> tuple[int, bool, str]:
    """(exit code, session leader?, report) of a program run by a child that forks it last, as the supervisor's own child. Afterwards that
    child forks a copy of itself, which ends with 0."""
    code, leads, said = json.loads(run(HELPER, json.dumps([paths, argv])))
    return code, leads, said


def test_runs_the_first_candidate_that_exists() -> None:
    code, leads, said = launch(["/nonexistent/sh", "/bin/sh", "/sbin/sh"], ["sh", "-c", 'test "$A" = b && exit 42'])
    assert (code, leads, said) == (42, True, "PREPARE 0 0")


@pytest.mark.parametrize(
    ("paths", "name", "number"),
    [
        (["/nonexistent/a", "/etc/passwd/a"], "a", errno.ENOENT),
        (["/etc/passwd", "/nonexistent/passwd"], "passwd", errno.EACCES),
        (["/etc/passwd/a"], "a", errno.ENOTDIR),
    ],
)
def test_says_why_nothing_could_be_run(paths: list[str], name: str, number: int) -> None:
    assert launch(paths, [name]) == (127, True, f"EXEC {number} 0")


NOTHING_ELSE = BARE + """
def plan(w):
    w.call(At.EXEC, "ppoll", 0, 0, 0, 0, 0)


stopped = slots
pid = os.fork()
if pid == 0:
    region = bare.Region(1 << 16, shared=False)
    w = program.Writer(region.base, -1)
    w.clone = (program.NR["clone"], libc.CLONE_PARENT | libc.CLONE_PARENT_SETTID, 0, slots.address(slot))
    plan(w)
    region.write(w.image())
    bare.hold_back(region)
    bare.fork(region)
    copy, _ = libc.clone3(0)
    if copy == 0:
        os._exit(7 if secret == b"nobody's business" else 1)
    os.write(write, b"%d" % os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))
    os._exit(0)
os.waitpid(pid, 0)
child = slots.pid(slot)
maps = open(f"/proc/{child}/maps").read().splitlines()
os.kill(child, 9)
os.waitpid(child, 0)
names = [line.split()[5] if len(line.split()) > 5 else "" for line in maps]
size = sum(int(b, 16) - int(a, 16) for a, b in (line.split()[0].split("-") for line in maps if "[" not in line))
print(json.dumps([names, size, os.read(read, 100).decode()]))
"""


def test_a_bare_process_has_nothing_of_its_parent() -> None:
    """Not the heap, no library, no stack: what a container could read out of it is its own program."""
    names, size, copied = json.loads(run(NOTHING_ELSE))
    assert {name for name in names if name} <= {"[vvar]", "[vdso]", "[vvar_vclock]", "[vsyscall]"}
    assert size <= (1 << 16) + 4096
    assert copied == "7", "what is forked by clone3 is a copy again"
