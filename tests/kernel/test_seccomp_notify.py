"""Seccomp user notifications: the listener of a filter handed to an agent, or answered and counted by ourselves."""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci import bundle
from shim.oci.bundle import Refusals
from shim.oci.spec import NamespaceType, Seccomp, SeccompRule, Spec
from shim.oci.validate import RUNTIME_DEFAULT
from shim.seccomp import notify
from tests.kernel.supervised import Rig, rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

CHROOT = "busybox chroot /tmp true 2>&1"  # makes one chroot(2), which needs a capability that these containers lack
ALL = (NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS, NamespaceType.PID)
# What busybox needs and a launch, but no sendmsg: the listener gets out without it.
ALLOWED = SeccompRule(
    tuple(
        """execve prctl setresuid setresgid capset clone setsid ioctl exit_group brk mmap munmap mprotect arch_prctl set_tid_address
        set_robust_list rseq prlimit64 readlink getrandom fstat newfstatat read write open openat close getuid geteuid getgid
        getegid getpid getppid rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack fcntl poll wait4 vfork fork exit dup2 futex uname
        stat lseek getcwd nanosleep clock_nanosleep setuid setgid madvise""".split()
    ),
    "SCMP_ACT_ALLOW",
)


def with_profile(profile: Seccomp, *, no_new_privileges: bool = False) -> Callable[[Spec], Spec]:
    def change(spec: Spec) -> Spec:
        return replace(
            spec,
            linux=replace(spec.linux, seccomp=profile),
            process=replace(spec.process, no_new_privileges=no_new_privileges),
        )

    return change


def counted(node: Rig, name: str) -> Refusals:
    fd = os.open(node.state / "containers" / name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return bundle.read_refusals(fd) or Refusals()
    finally:
        os.close(fd)


@pytest.mark.parametrize("no_new_privileges", [False, True])
@pytest.mark.parametrize("pid", ["", "pod:pid"])
async def test_refused_calls_are_counted(pid: str, no_new_privileges: bool) -> None:
    async with rig() as node:
        pod = await node.pod(*(ALL if pid else ()))
        change = with_profile(Seccomp(RUNTIME_DEFAULT, notifier="log"), no_new_privileges=no_new_privileges)
        name = await node.run(pod, "sh", "-c", f"{CHROOT}; {CHROOT}; sleep 1000", pid=pid, change=change)
        await until(lambda: counted(node, name).calls == {"chroot": 2})
        assert len(node.lines(name)) == 2
        assert all("Operation not permitted" in line for line in node.lines(name))
        code, said = await node.output(name, "sh", "-c", CHROOT)
        assert code == 1 and "Operation not permitted" in said
        await until(lambda: counted(node, name).calls == {"chroot": 3})
        assert not counted(node, name).stopped
        await node.remove(name)


async def test_a_profile_without_sendmsg_and_counting_goes_on_without_a_supervisor() -> None:
    profile = Seccomp("SCMP_ACT_ERRNO", default_errno_ret=errno.EACCES, syscalls=(ALLOWED,), notifier="log")
    async with rig() as node:
        pod = await node.pod()
        script = f"while :; do test -e /tmp/go && {CHROOT} && break; sleep 0.1; done; sleep 1000"
        name = await node.run(pod, "sh", "-c", script, change=with_profile(profile))
        await node.kill_supervisor()
        (node.root / "tmp/go").touch()
        await until(lambda: counted(node, name).calls.get("chroot", 0) >= 1)
        await until(lambda: any("Permission denied" in line for line in node.lines(name)))


async def test_a_container_is_stopped_for_a_forbidden_call() -> None:
    async with rig() as node:
        pod = await node.pod()
        change = with_profile(Seccomp(RUNTIME_DEFAULT, notifier="stop"))
        name = await node.run(pod, "sh", "-c", f"trap 'exit 3' TERM; {CHROOT}; while :; do sleep 0.1; done", change=change)
        exit = await node.exit(name, 15)
        assert (exit.exit_code, exit.reason, exit.message) == (3, "seccomp killed", "Used forbidden syscalls: chroot (1x)")


async def test_killing_rules_still_kill() -> None:
    profile = Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("chroot",), "SCMP_ACT_KILL_PROCESS"),), notifier="log")
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "busybox", "chroot", "/tmp", "true", change=with_profile(profile))
        assert (await node.exit(name)).signal == 9
        await until(lambda: counted(node, name).calls == {"chroot": 1})


def agent(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def taken(sock: socket.socket) -> tuple[dict[str, object], int]:
    connection, _ = sock.accept()
    with connection:
        data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(4))
        while not data.endswith(b"}}"):
            data += connection.recv(1 << 16)
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    return json.loads(data), fds[0]


async def test_an_agent_behind_listener_path_answers() -> None:
    async with rig() as node:
        path = node.base / "agent.sock"
        profile = Seccomp(
            "SCMP_ACT_ALLOW", listener_path=str(path), listener_metadata="who", syscalls=(SeccompRule(("chroot",), "SCMP_ACT_NOTIFY"),)
        )
        with agent(path) as sock:
            pod = await node.pod()
            name = await node.create(pod, "sh", "-c", f"{CHROOT}; sleep 1000", change=with_profile(profile))
            started, (state, listener) = await asyncio.gather(node.supervisor.start_container(name), asyncio.to_thread(taken, sock))
            assert (state["fds"], state["metadata"], state["pid"]) == (["seccompFd"], "who", started.pid)
            assert state["state"]["id"] == name and state["state"]["status"] == "creating"  # type: ignore[index]
            question = await asyncio.to_thread(notify.receive, listener)
            assert question is not None and question.number == 161
            notify.refuse(listener, question, errno.EXDEV)
            await until(lambda: any("cross-device" in line.lower() for line in node.lines(name)))
            # an exec session has a filter, and a listener, of its own
            running, (state, other) = await asyncio.gather(node.exec(name, "sh", "-c", CHROOT), asyncio.to_thread(taken, sock))
            assert state["state"]["status"] == "running" and state["pid"] == running[0].pid  # type: ignore[index]
            question = await asyncio.to_thread(notify.receive, other)
            assert question is not None
            notify.refuse(other, question, errno.ENOTTY)
            assert await asyncio.wait_for(asyncio.shield(running[0].exited), 10) == 1
            for fd in (running[1], listener, other):
                os.close(fd)


async def test_without_an_agent_the_container_does_not_run() -> None:
    async with rig() as node:
        profile = Seccomp("SCMP_ACT_ALLOW", listener_path=str(node.base / "none"), syscalls=(SeccompRule(("chroot",), "SCMP_ACT_NOTIFY"),))
        pod = await node.pod()
        name = await node.create(pod, "sleep", "1000", change=with_profile(profile))
        with pytest.raises(Failure, match="hand over the listener"):
            await node.supervisor.start_container(name)
        exit = await node.exit(name)
        assert (exit.exit_code, exit.reason) == (128, "StartError")
        await node.remove(name)


async def test_a_created_container_can_be_removed() -> None:
    async with rig() as node:
        pod = await node.pod(*ALL)
        for pid in ("", "pod:pid"):
            name = await node.create(pod, "sleep", "1000", pid=pid, change=with_profile(Seccomp(RUNTIME_DEFAULT, notifier="log")))
            await node.remove(name)
