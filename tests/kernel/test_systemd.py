"""The systemd cgroup driver: what a scope is, its limits before and after a daemon-reload, out of memory, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shim.cgroups import layout as layouts
from shim.errors import Failure
from shim.oci.spec import CPU, Linux, Memory, NamespaceType, Pids, Resources, Spec
from tests.kernel import supervised, test_supervisor, test_supervisor_adopt
from tests.kernel.supervised import Rig, rig, until

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(not Path("/run/systemd/system").is_dir(), reason="systemd is not PID 1")]
MIB = 1 << 20
V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(supervised.DRIVER, "systemd")


def limited(resources: Resources) -> Callable[[Spec], Spec]:
    def change(spec: Spec) -> Spec:
        linux: Linux = replace(spec.linux, resources=resources)
        return replace(spec, linux=linux)

    return change


def systemctl(*argv: str) -> str:
    return subprocess.run(["systemctl", *argv], check=True, capture_output=True, text=True).stdout


def shown(name: str) -> dict[str, str]:
    """The properties of a container's scope."""
    return dict(line.partition("=")[::2] for line in systemctl("show", f"cri-shim-{name}.scope").splitlines())


def units(node: Rig) -> list[str]:
    lines = systemctl("list-units", "--all", "--plain", "--no-legend", "cri-shim-*.scope").splitlines()
    return [line.split()[0] for line in lines if "cri-shim-runtime" not in line]


def directory(node: Rig, name: str, controller: str = "memory") -> Path:
    top = layouts.detect().controllers[controller]
    return Path(top) / node.slice / f"cri-shim-{name}.scope"


def value(node: Rig, name: str, v1: tuple[str, str], v2: tuple[str, str]) -> str:
    """A control file: (controller, file) by version."""
    controller, file = v2 if V2 else v1
    return (directory(node, name, controller) / file).read_text().strip()


def limits(node: Rig, name: str) -> list[str]:
    files = [
        (("memory", "memory.limit_in_bytes"), ("memory", "memory.max")),
        (("cpu", "cpu.shares"), ("cpu", "cpu.weight")),
        (("cpu", "cpu.cfs_quota_us"), ("cpu", "cpu.max")),
        (("cpuset", "cpuset.cpus"), ("cpuset", "cpuset.cpus")),
        (("pids", "pids.max"), ("pids", "pids.max")),
    ]
    if V2:
        files += [(("", ""), ("memory", "memory.high")), (("", ""), ("memory", "memory.swap.max"))]
    return [value(node, name, *pair) for pair in files]


async def test_limits_are_the_units_and_survive_a_reload() -> None:
    memory = Memory(limit=64 * MIB, swap=64 * MIB)
    cpu = CPU(shares=512, quota=33_500, period=50_000, cpus="0")
    wanted = Resources(memory=memory, cpu=cpu, pids=Pids(77), unified={"memory.high": str(60 * MIB)} if V2 else {})
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000", change=limited(wanted))
        unit = shown(name)
        assert (unit["Slice"], unit["Delegate"], unit["CollectMode"], unit["DefaultDependencies"]) == (
            *(node.slice, "yes", "inactive-or-failed", "no"),
        )
        assert unit["CPUQuotaPerSecUSec"] == "670ms"
        assert unit["TasksMax"] == "77"
        assert unit["DevicePolicy"] == "auto"  # this specification has no device rules
        expected = limits(node, name)
        assert expected[:5] == (
            [str(64 * MIB), "59", "33500 50000", "0", "77"] if V2 else [str(64 * MIB), "512", "33500", "0", "77"]
        )
        assert expected[5:] == ([str(60 * MIB), "0"] if V2 else [])
        systemctl("daemon-reload")
        assert limits(node, name) == expected
        new = Resources(memory=Memory(limit=96 * MIB, swap=96 * MIB), cpu=CPU(shares=1024, quota=-1, period=100_000), pids=Pids(0))
        await node.supervisor.update_container(name, new)
        updated = limits(node, name)
        assert updated[:2] == [str(96 * MIB), "100" if V2 else "1024"]
        assert updated[2] in ("max 100000", "-1")
        assert updated[4] == "max"
        systemctl("daemon-reload")
        assert limits(node, name) == updated
        code, text = await node.output(name, "cat", "/proc/self/cgroup")
        assert code == 0
        assert f"cri-shim-{name}.scope" in text


async def test_a_limit_below_usage_is_refused_and_kills_nobody() -> None:
    async with rig() as node:
        pod = await node.pod()
        fill = ("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=24 2>/dev/null; echo full; sleep 1000")
        shm = await node.pod(shm=64 * MIB)
        name = await node.run(shm, *fill, change=limited(Resources(memory=Memory(limit=80 * MIB, swap=80 * MIB))))
        await until(lambda: node.lines(name) == ["full"], 30)
        before, unit = limits(node, name), shown(name)
        with pytest.raises(Failure) as refused:
            await node.supervisor.update_container(name, Resources(memory=Memory(limit=8 * MIB, swap=8 * MIB), pids=Pids(55)))
        assert "EBUSY" in str(refused.value)
        assert limits(node, name) == before
        assert {k: v for k, v in shown(name).items() if "Max" in k or "Limit" in k} == {
            k: v for k, v in unit.items() if "Max" in k or "Limit" in k
        }
        assert name not in node.exits
        assert pod


async def test_out_of_memory() -> None:
    """Scenario 48 with this driver: at once, of a child only, and several of one pod (whose slice counts for all of them)."""
    small = limited(Resources(memory=Memory(limit=16 * MIB, swap=16 * MIB)))
    async with rig() as node:
        pod = await node.pod()
        for _ in range(2):
            name = await node.run(pod, "sh", "-c", "exec tail /dev/zero", change=small)
            exit = await node.exit(name, 60)
            assert (exit.exit_code, exit.oom_killed) == (137, True)
            await node.remove(name)
        child = await node.run(pod, "sh", "-c", "tail /dev/zero; exit 3", change=small)
        bystander = await node.run(pod, "sh", "-c", "sleep 1; exit 4", change=small)
        exit = await node.exit(child, 60)
        assert (exit.exit_code, exit.oom_killed) == (3, True)
        exit = await node.exit(bystander, 60)
        assert (exit.exit_code, exit.oom_killed) == (4, False)
        assert child in node.oom
        assert bystander not in node.oom


async def test_nothing_is_left() -> None:
    async with rig() as node:
        pod = await node.pod(NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS, NamespaceType.PID)
        assert units(node) == [f"cri-shim-{pod[:8]}.scope"]  # the pod's first process
        running = await node.run(pod, "sleep", "1000", pid="pod:pid")
        ended = await node.run(pod, "true", pid="")
        made = await node.create(pod, "true")
        with pytest.raises(Failure):
            await node.create(pod, "true", change=lambda s: replace(s, process=replace(s.process, cwd="/nowhere/\0")))
        await node.exit(ended)
        assert f"cri-shim-{running}.scope" in units(node)
        for name in (running, ended, made):
            await node.supervisor.delete_container(name)
            await node.supervisor.delete_container(name)
        await node.supervisor.delete_pod(pod)
        node.pods.discard(pod)
        assert units(node) == []
        assert [p.name for p in Path("/run/systemd/transient").glob("cri-shim-*")] == ["cri-shim-runtime.scope"]
        for top in layouts.detect().hierarchies:
            assert not [p for p in (Path(top) / node.slice).glob("cri-shim-*") if "runtime" not in p.name]


async def test_a_creation_that_lost_its_supervisor_is_undone() -> None:
    async with rig() as node:
        pod = await node.pod()
        task = asyncio.create_task(node.create(pod, "sleep", "1000"))
        slice_ = Path(layouts.detect().controllers["memory"]) / node.slice
        await until(lambda: [p for p in slice_.glob("cri-shim-*.scope") if "runtime" not in p.name], 20)
        os.kill(node.supervisor.pid, 9)
        with pytest.raises(Failure):
            await task
        await asyncio.wait_for(node.replaced.wait(), 60)
        for name in list(node.containers):
            await node.supervisor.delete_container(name)
        await until(lambda: not units(node), 20)


@pytest.mark.parametrize(
    "test",
    [test_supervisor.test_a_shared_pid_namespace, test_supervisor_adopt.test_a_killed_supervisor_is_replaced],
    ids=lambda test: test.__name__,
)
async def test_as_with_the_other_driver(test: Callable[[], Awaitable[None]]) -> None:
    await test()
