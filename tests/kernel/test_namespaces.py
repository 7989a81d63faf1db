"""Namespaces as config-linux.md#namespaces and CRI's modes want them: new, the pod's, a target's, the host's, by path."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci import bundle
from shim.oci.bundle import Recipe
from shim.oci.spec import Namespace, NamespaceType, Spec
from tests.kernel.supervised import Rig, rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60), pytest.mark.mount]

KINDS = {"net": "network", "ipc": "ipc", "uts": "uts", "pid": "pid", "mnt": "mount"}
SHARED = (NamespaceType.IPC, NamespaceType.UTS, NamespaceType.NETWORK, NamespaceType.PID)


def of(pid: int | str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in (*KINDS, "cgroup", "user")}


def without(*kinds: NamespaceType) -> Callable[[Spec], Spec]:
    """The host's namespaces of these types."""
    return lambda spec: replace(spec, linux=replace(spec.linux, namespaces=tuple(n for n in spec.linux.namespaces if n.type not in kinds)))


async def pid_of(node: Rig, pod: str, *args: str, **options: object) -> int:
    name = await node.create(pod, *(args or ("sleep", "60")), **options)  # type: ignore[arg-type]
    return (await node.supervisor.start_container(name)).pid


async def test_containers_share_what_is_the_pods() -> None:
    async with rig() as node:
        pod = await node.pod()
        one, two, other = of(await pid_of(node, pod)), of(await pid_of(node, pod)), of(await pid_of(node, await node.pod()))
        host = of("self")
        for name in ("net", "ipc", "uts"):
            assert one[name] == two[name] != other[name], name
            assert host[name] not in (one[name], other[name]), name
        assert len({one["pid"], two["pid"], host["pid"]}) == 3
        assert len({one["mnt"], two["mnt"], host["mnt"]}) == 3
        assert one["user"] == host["user"]


async def test_the_hosts_namespaces() -> None:
    async with rig() as node:
        pod = await node.pod(NamespaceType.IPC, NamespaceType.UTS)
        kinds = (NamespaceType.NETWORK, NamespaceType.UTS, NamespaceType.IPC)
        found, host = of(await pid_of(node, pod, pid="host", change=without(*kinds))), of("self")
        assert all(found[name] == host[name] for name in ("net", "uts", "ipc", "pid"))
        assert found["mnt"] != host["mnt"]


async def test_a_shared_pid_namespace_has_a_pid_1_that_is_nobodys() -> None:
    """PID 1 is exec'd, holds nothing, cannot be killed from inside, and reaps orphans."""
    async with rig() as node:
        pod = await node.pod(*SHARED)
        script = "(sleep 0.2 & ) ; kill -9 1; kill -TERM 1; sleep 0.6; ps -o pid,stat,args; exec sleep 60"
        name = await node.run(pod, "sh", "-c", script, pid="pod:pid")
        await until(lambda: len(node.lines(name, "stdout")) >= 4)
        lines = [line.split() for line in node.lines(name, "stdout")]
        assert lines[1][:2] == ["1", "S"] and "/pause" in lines[1]
        assert not [line for line in lines if "Z" in line[1]], lines
        second = await node.run(pod, "sh", "-c", "ps -o pid,args; ls -l /proc/1/fd; cat /proc/1/status", pid="pod:pid")
        await node.exit(second)
        text = "\n".join(node.lines(second))
        assert "sleep 60" in text, "the other container's process is visible"
        assert "total 0\n" in text and "->" not in text, "PID 1 has descriptors"
        for fact in ("CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Uid:\t65534"):
            assert fact in text, fact


async def test_a_shared_pid_namespace_ends_with_the_pod() -> None:
    async with rig() as node:
        pod = await node.pod(*SHARED)
        pid = await pid_of(node, pod, pid="pod:pid")
        init = int(next(line.split()[-1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid")))
        assert init == node.supervisor.pid, "the container's process is the supervisor's own child"
        await node.supervisor.delete_pod(pod)
        await until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1])


async def test_target_joins_the_other_containers_pids() -> None:
    async with rig() as node:
        pod = await node.pod()
        target = await node.run(pod, "sh", "-c", "exec sleep 61")
        name = "f" * 64
        spec = node.spec(name, ("ps", "-o", "pid,args"), pid="target:pid")
        directory = node.state / "containers" / name
        bundle.write(directory, spec, Recipe("bind", source=str(node.root)), stdin=False, tty=False)
        node.containers.add(name)
        await node.supervisor.create_container(
            name, pod, bundle=directory, log_path=str(node.log(name)), tty=False, stdin=False, stdin_once=False, target=target
        )
        await node.supervisor.start_container(name)
        assert (await node.exit(name)).exit_code == 0
        assert any(line.split() == ["1", "sleep", "61"] for line in node.lines(name)), node.lines(name)


async def test_namespaces_by_path_and_errors() -> None:
    async with rig() as node:
        pod = await node.pod()
        pin = node.state / "netns" / pod

        def by_path(path: str) -> Callable[[Spec], Spec]:
            def change(spec: Spec) -> Spec:
                rest = tuple(n for n in spec.linux.namespaces if n.type is not NamespaceType.NETWORK)
                return replace(spec, linux=replace(spec.linux, namespaces=(*rest, Namespace(NamespaceType.NETWORK, path))))

            return change

        found = of(await pid_of(node, pod, change=by_path(str(pin))))
        assert found["net"] == f"net:[{os.stat(pin).st_ino}]"
        with pytest.raises(Failure, match="join network.*ENOENT"):
            await node.create(pod, "true", change=by_path("/nonexistent"))
        with pytest.raises(Failure, match="join network.*EINVAL"):
            await node.create(pod, "true", change=by_path("/etc/passwd"))
        with pytest.raises(Failure, match="the pod has none"):
            await node.create(await node.pod(NamespaceType.IPC, NamespaceType.UTS), "true")
        with pytest.raises(Failure, match="ENAMETOOLONG|too long"):  # CVE-2021-43784
            await node.create(pod, "true", change=by_path("/" + "x" * 70_000))


async def test_loopback_is_up_and_names_are_set() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "60")
        code, text = await node.output(name, "sh", "-c", "hostname; head -60 /proc/net/fib_trie; cat /proc/net/if_inet6")
        assert code == 0 and text.startswith("pod\n")
        assert "127.0.0.1" in text and "00000000000000000000000000000001 01" in text


async def test_sysctls_of_the_pods_namespaces() -> None:
    async with rig() as node:
        pod = await node.pod()

        def change(spec: Spec) -> Spec:
            return replace(spec, linux=replace(spec.linux, sysctl={"net.ipv4.ip_default_ttl": "77", "kernel/shm_rmid_forced": "1"}))

        before = Path("/proc/sys/net/ipv4/ip_default_ttl").read_text()
        name = await node.run(pod, "cat", "/proc/sys/net/ipv4/ip_default_ttl", "/proc/sys/kernel/shm_rmid_forced", change=change)
        await node.exit(name)
        assert node.lines(name) == ["77", "1"]
        assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() == before

        def unknown(spec: Spec) -> Spec:
            return replace(spec, linux=replace(spec.linux, sysctl={"net.ipv4.no_such_thing": "1"}))

        with pytest.raises(Failure, match="no_such_thing"):
            await node.create(pod, "true", change=unknown)


async def test_shm_is_the_pods() -> None:
    async with rig() as node:
        pod = await node.pod(shm=1 << 20)
        fill = "echo shared > /dev/shm/x; dd if=/dev/zero of=/dev/shm/big bs=1024 count=2000 2>&1 | head -1"
        writer = await node.run(pod, "sh", "-c", fill)
        await node.exit(writer)
        assert "No space left" in "\n".join(node.lines(writer))
        reader = await node.run(pod, "cat", "/dev/shm/x")
        await node.exit(reader)
        assert node.lines(reader) == ["shared"]
        stranger = await node.run(await node.pod(), "ls", "/dev/shm")
        await node.exit(stranger)
        assert node.lines(stranger) == []


async def test_many_at_once() -> None:
    """Launches in flight do not mix up pids or answers."""
    async with rig() as node:
        pod = await node.pod(*SHARED)
        pids = ["", "pod:pid"] * 8
        names = await asyncio.gather(*(node.run(pod, "sh", "-c", f"exit {20 + i}", pid=pid) for i, pid in enumerate(pids)))
        codes = [(await node.exit(name)).exit_code for name in names]
        assert codes == [20 + i for i in range(16)]
