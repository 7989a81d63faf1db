"""The child that waits for orders: as it was after each, replaced when it is used up, not missed when it dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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
