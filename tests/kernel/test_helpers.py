"""The child that waits for orders: as it was after each, replaced when it is used up, not missed when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci.spec import IDMapping, Mount
from tests.kernel.supervised import Rig, rig, until


def waiting(node: Rig) -> list[int]:
    children = Path(f"/proc/{node.supervisor.pid}/task/{node.supervisor.pid}/children")
    return [int(pid) for pid in children.read_text().split() if Path(f"/proc/{pid}/comm").read_text().strip() == "cri-shim: spare"]


async def test_a_helper_is_what_it_was_after_making_a_pod() -> None:
    async with rig() as node:
        await until(lambda: waiting(node))
        (helper,) = waiting(node)
        await node.pod()
        await until(lambda: waiting(node) == [helper])
        fds = sorted(os.listdir(f"/proc/{helper}/fd"))
        await node.pod()
        await until(lambda: waiting(node) == [helper])
        assert sorted(os.listdir(f"/proc/{helper}/fd")) == fds
        for kind in ("mnt", "net", "ipc", "uts", "pid", "user", "cgroup"):
            assert os.readlink(f"/proc/{helper}/ns/{kind}") == os.readlink(f"/proc/{node.supervisor.pid}/ns/{kind}")


async def test_an_order_that_was_never_read_is_given_to_another() -> None:
    """A helper that is stopped gets the order, and is killed before it can read it."""
    async with rig() as node:
        await until(lambda: waiting(node))
        helper = waiting(node)[0]
        os.kill(helper, signal.SIGSTOP)
        making = asyncio.create_task(node.pod())
        await asyncio.sleep(0.3)
        assert not making.done()
        os.kill(helper, signal.SIGKILL)
        pod = await asyncio.wait_for(making, 10)
        name = await node.run(pod, "echo", "there")
        assert (await node.exit(name)).exit_code == 0


async def test_a_dead_helper_is_not_missed() -> None:
    async with rig() as node:
        await until(lambda: waiting(node))
        helper = waiting(node)[0]
        os.kill(helper, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{helper}/maps").exists() or not Path(f"/proc/{helper}/maps").read_text())
        pod = await node.pod()
        name = await node.run(pod, "echo", "there")
        assert (await node.exit(name)).exit_code == 0
        await until(lambda: waiting(node))


async def test_a_helper_is_what_it_was_after_making_a_container() -> None:
    async with rig() as node:
        pod = await node.pod()
        await until(lambda: waiting(node))
        await node.run(pod, "sleep", "1000")
        await until(lambda: waiting(node))
        (helper,) = waiting(node)
        fds = sorted(os.listdir(f"/proc/{helper}/fd"))
        await node.run(pod, "sleep", "1000")
        await until(lambda: waiting(node) == [helper])
        assert sorted(os.listdir(f"/proc/{helper}/fd")) == fds
        for kind in ("mnt", "net", "ipc", "uts", "pid", "pid_for_children", "user", "cgroup"):
            assert os.readlink(f"/proc/{helper}/ns/{kind}") == os.readlink(f"/proc/{node.supervisor.pid}/ns/{kind}")
        groups = Path(f"/proc/{node.supervisor.pid}/cgroup").read_text()
        assert Path(f"/proc/{helper}/cgroup").read_text() == groups


async def test_what_fails_costs_nothing_that_the_helper_made_before() -> None:
    """A creation that fails names the cgroup that it has made: never that of an earlier one."""
    async with rig() as node:
        pod = await node.pod()
        await until(lambda: waiting(node))
        (helper,) = waiting(node)
        fine = await node.run(pod, "sleep", "1000")
        await until(lambda: waiting(node) == [helper])
        with pytest.raises(Failure, match="args"):
            await node.create(pod, "x", change=lambda spec: replace(spec, process=replace(spec.process, args=())))
        assert (await node.output(fine, "echo", "alive"))[1].strip() == "alive"


async def test_what_has_to_be_forked_still_can_be(tmp_path: Path) -> None:
    """A helper that has made a container keeps its memory from what it forks next, but for forks that are copies: here, of a user namespace
    for a volume with ids of its own."""
    own = (IDMapping(0, 100000, 65536),)
    tmp_path.chmod(0o755)
    (tmp_path / "file").touch()
    volume = Mount("/volume", "bind", str(tmp_path), ("rbind", "rw"), own, own)
    async with rig() as node:
        pod = await node.pod()
        await until(lambda: waiting(node))
        (helper,) = waiting(node)
        await node.run(pod, "sleep", "1000")
        await until(lambda: waiting(node) == [helper])
        name = await node.run(pod, "ls", "-ln", "/volume", change=lambda spec: replace(spec, mounts=(*spec.mounts, volume)))
        await node.exit(name)
        assert any(" 100000 " in line for line in node.lines(name)), node.lines(name)
