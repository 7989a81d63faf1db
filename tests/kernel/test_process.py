"""The process as config.md#process says it: user, groups, directory, limits, environment, and nothing inherited from us."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import pytest

from shim.errors import Failure
from shim.oci import codec
from shim.oci.spec import (
    Capabilities,
    GroupsPolicy,
    Linux,
    Namespace,
    NamespaceType,
    Process,
    Rlimit,
    Root,
    Seccomp,
    SeccompRule,
    Spec,
    User,
)
from tests.kernel.supervised import MOUNTS, Rig, rig

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60), pytest.mark.mount]

PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n"
GROUP = "root:x:0:\napp:x:1235:\nextra:x:77:app\n"


def process(**fields: object) -> Callable[[Spec], Spec]:
    return lambda spec: replace(spec, process=replace(spec.process, **fields))  # type: ignore[arg-type]


async def said(node: Rig, pod: str, *args: str, change: Callable[[Spec], Spec] = lambda s: s, pid: str = "") -> list[str]:
    """Standard output of a container that is run to its end, which must be exit code 0."""
    name = await node.run(pod, *args, change=change, pid=pid)
    record = await node.exit(name)
    assert record.exit_code == 0, (record, node.lines(name))
    return node.lines(name, "stdout")


async def test_user_groups_and_home() -> None:
    async with rig() as node:
        (node.root / "etc/passwd").write_text(PASSWD)
        (node.root / "etc/group").write_text(GROUP)
        pod = await node.pod()
        show = ("sh", "-c", "id -u; id -g; id -G; echo $HOME; umask")
        env = process(env=("PATH=/bin",))

        def user(value: User) -> Callable[[Spec], Spec]:
            return lambda spec: process(user=value)(env(spec))

        merged = User(username="app", groups_policy=GroupsPolicy.MERGE, additional_gids=(5,))
        assert await said(node, pod, *show, change=user(merged)) == ["1234", "1235", "1235 5 77", "/home/app", "0022"]
        strict = User(username="1234:77", umask=0o77, groups_policy=GroupsPolicy.STRICT)
        assert await said(node, pod, *show, change=user(strict)) == ["1234", "77", "77", "/home/app", "0077"]
        numbers = User(uid=4321, gid=99)
        assert await said(node, pod, *show, change=user(numbers)) == ["4321", "99", "99", "/", "0022"]
        with pytest.raises(Failure, match="nobody"):
            await node.create(pod, "true", change=user(User(username="nobody")))


async def test_account_files_that_are_none() -> None:
    """CVE-2025-4437: a FIFO, a device or a giant in place of /etc/passwd is refused, and nobody waits for it."""
    async with rig() as node:
        pod = await node.pod()
        passwd = node.root / "etc/passwd"
        os.mkfifo(passwd)
        with pytest.raises(Failure, match="not a regular file"):
            await node.create(pod, "true")
        passwd.unlink()
        passwd.symlink_to("/dev/zero")
        with pytest.raises(Failure, match="not a regular file"):
            await node.create(pod, "true")
        passwd.unlink()
        with passwd.open("wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(Failure, match="more than"):
            await node.create(pod, "true")


async def test_working_directory() -> None:
    async with rig() as node:
        (node.root / "link").symlink_to("/tmp")
        pod = await node.pod()
        assert await said(node, pod, "sh", "-c", "pwd", change=process(cwd="/tmp/made/here")) == ["/tmp/made/here"]
        assert await said(node, pod, "sh", "-c", "ls -di . /tmp | while read i n; do echo $i; done", change=process(cwd="/link")) != []
        for evil in ("/proc/self/fd/3", "/proc/self/cwd", "/proc/1/root/etc"):
            with pytest.raises(Failure, match="ELOOP|ENOENT|EACCES"):
                await node.create(pod, "true", change=process(cwd=evil))


async def test_programs() -> None:
    async with rig() as node:
        (node.root / "bin/script").write_text("#!/bin/sh\necho script $1\n")
        (node.root / "bin/script").chmod(0o755)
        (node.root / "bin/plain").write_text("data\n")
        pod = await node.pod()
        assert await said(node, pod, "script", "x", change=process(env=("PATH=/nowhere:/bin",))) == ["script x"]
        assert await said(node, pod, "/bin/script", "y") == ["script y"]
        cases = {"nosuch": "not found in \\$PATH", "plain": "EACCES", "/bin/plain": "EACCES", "/bin/none": "ENOENT", "/bin": "EACCES"}
        for program, reason in cases.items():
            name = await node.create(pod, program)
            with pytest.raises(Failure, match=reason):
                await node.supervisor.start_container(name)


async def test_limits_and_score() -> None:
    async with rig() as node:
        pod = await node.pod()
        change = process(rlimits=(Rlimit("RLIMIT_NOFILE", 100, 200), Rlimit("RLIMIT_CORE", 0, 0)), oom_score_adj=321)
        show = ("sh", "-c", "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj")
        assert await said(node, pod, *show, change=change) == ["100", "200", "0", "321"]
        with pytest.raises(Failure, match="RLIMIT_NONSENSE"):
            await node.create(pod, "true", change=process(rlimits=(Rlimit("RLIMIT_NONSENSE", 1, 1),)))
        # A hard limit that this machine's root may not raise is clamped, not an error.
        high = process(rlimits=(Rlimit("RLIMIT_NOFILE", 1 << 20, 1 << 20),))
        assert int((await said(node, pod, "sh", "-c", "ulimit -Hn", change=high))[0]) >= 1024


SECCOMP_MINIMAL = Seccomp(
    "SCMP_ACT_ERRNO",
    syscalls=(
        # What a static busybox needs from execve to exit. Nothing that we would need between the filter and execve, but for those of
        # the architecture: prctl, set*id, capset, fork and execve.
        SeccompRule(
            tuple(
                "execve exit exit_group brk arch_prctl set_tid_address set_robust_list rseq prlimit64 getrandom mprotect readlink "
                "readlinkat getuid getgid setuid setgid write ioctl fstat newfstatat "
                "prctl setresuid setresgid setsid capset clone fork vfork "
                "nanosleep clock_nanosleep".split()
            ),
            "SCMP_ACT_ALLOW",
        ),
    ),
)


@pytest.mark.parametrize("pid", ["", "pod:pid"])
@pytest.mark.parametrize("no_new_privileges", [False, True])
async def test_minimal_filter(pid: str, no_new_privileges: bool) -> None:
    """ARCHITECTURE §4: with a filter that allows next to nothing the program still starts, in both orders and both ways to fork."""
    async with rig() as node:
        kinds = (NamespaceType.IPC, NamespaceType.UTS, NamespaceType.NETWORK)
        pod = await node.pod(*kinds, *((NamespaceType.PID,) if pid else ()))

        def change(spec: Spec) -> Spec:
            caps = ("CAP_CHOWN", "CAP_KILL")
            capabilities = Capabilities(bounding=caps, effective=caps, permitted=caps)
            changed = replace(spec.process, no_new_privileges=no_new_privileges, user=User(uid=1000, gid=1000), capabilities=capabilities)
            return replace(spec, process=changed, linux=replace(spec.linux, seccomp=SECCOMP_MINIMAL))

        assert await said(node, pod, "echo", "filtered", change=change, pid=pid) == ["filtered"]
        name = await node.run(pod, "sleep", "60", change=change, pid=pid)
        process = change(node.spec(name, ("echo", "again"))).process
        read, write = os.pipe()
        session = await node.supervisor.exec(name, token_hex(16), process, stdin=None, stdout=write, stderr=write)
        os.close(write)
        assert await session.exited == 0
        assert os.read(read, 100) == b"again\n"
        os.close(read)


async def test_environment_is_the_containers_own() -> None:
    async with rig() as node:
        pod = await node.pod()
        lines = await said(node, pod, "/bin/busybox", "env", change=process(env=("PATH=/bin", "A=1", "EMPTY=")))
        assert sorted(lines) == ["A=1", "EMPTY=", "HOME=/", "PATH=/bin"]


STATUS = "Umask Groups SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Cpus_allowed_list Seccomp".split()
CAPS = ("CAP_CHOWN", "CAP_NET_RAW", "CAP_SETUID", "CAP_SETGID", "CAP_KILL")


def attributes(lines: list[str]) -> dict[str, str]:
    """What a process says of its inherited attributes, by name."""
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name in STATUS:
            found[name] = " ".join(value.split())
        elif line.startswith("Max "):
            found[line[:25].strip()] = re.sub(r"\s+", " ", line[25:]).strip()
        elif line.startswith("= "):
            key, _, value = line[2:].partition(" ")
            found[key] = value
    return found


SHOW = (
    "cat /proc/self/status /proc/self/limits; echo = score $(cat /proc/self/oom_score_adj); echo = fds $(ls /proc/self/fd | tr '\\n' ' ');"
    "echo = cwd $(ls -d /proc/self/cwd/.); echo = session $(ps -o pid,sid 2>/dev/null | head -2 | tail -1)"
)


def under_runc(root: Path, base: Path) -> list[str]:
    """The same process as runc starts it."""
    bundle = base / "runc"
    bundle.mkdir()
    fresh = tuple(Namespace(kind) for kind in (NamespaceType.MOUNT, NamespaceType.PID, NamespaceType.IPC, NamespaceType.UTS))
    linux = Linux(fresh, cgroups_path=f"/crishim-runc-{token_hex(3)}")
    spec = Spec("1.0.2", Root(str(root)), _process(), mounts=MOUNTS, linux=linux)
    (bundle / "config.json").write_bytes(codec.encode(spec))
    command = ["runc", "--root", str(base / "state"), "run", "--bundle", str(bundle), f"t{token_hex(4)}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def _process() -> Process:
    capabilities = Capabilities(CAPS, CAPS, (), CAPS, ())
    user = User(additional_gids=(0,))  # ours adds the primary group by itself, runc leaves that to its caller
    return Process(("sh", "-c", SHOW), env=("PATH=/bin", "HOME=/"), user=user, capabilities=capabilities, oom_score_adj=100)


@pytest.mark.skipif(shutil.which("runc") is None, reason="Debian's runc is not installed")
@pytest.mark.parametrize("how", ["create", "exec", "shared pid"])
async def test_inherits_what_runc_lets_inherit(how: str, tmp_path: Path) -> None:
    """Python's ignored signals, our limits, mask, session, oom score and descriptors: a process must look as if runc had started it."""
    async with rig() as node:
        wanted = attributes(under_runc(node.root, tmp_path))
        assert len(wanted) > 20, json.dumps(wanted)
        kinds = (NamespaceType.IPC, NamespaceType.UTS, NamespaceType.NETWORK)
        pod = await node.pod(*kinds, *((NamespaceType.PID,) if how == "shared pid" else ()))
        if how == "exec":
            name = await node.run(pod, "sleep", "60", change=lambda s: replace(s, process=replace(_process(), args=s.process.args)))
            read, write = os.pipe()
            session = await node.supervisor.exec(name, token_hex(16), _process(), stdin=None, stdout=write, stderr=write)
            os.close(write)
            assert await session.exited == 0
            lines = os.read(read, 1 << 16).decode().splitlines()
            os.close(read)
        else:
            pid = "pod:pid" if how == "shared pid" else ""
            lines = await said(node, pod, "sh", change=lambda s: replace(s, process=_process()), pid=pid)
        found = attributes(lines)
        found.pop("session"), wanted.pop("session")
        # Go raises its own soft limit of open files, and programs built by some versions hand that on.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert found.pop("Max open files") == f"{soft} {hard} files"
        assert wanted.pop("Max open files") in (f"{soft} {hard} files", f"{hard} {hard} files")
        assert found == wanted
