"""Upgrade in place (scenario 11): same pid, same children, nothing in flight lost, and a version that cannot take over changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from shim import client
from shim.oci.spec import NamespaceType
from tests.kernel.supervised import Rig, rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]
KINDS = (NamespaceType.IPC, NamespaceType.UTS, NamespaceType.NETWORK)


async def upgrade(node: Rig, build: str, monkeypatch: pytest.MonkeyPatch) -> client.Link:
    """What a daemon of another version does at its start."""
    monkeypatch.setattr(client, "build", lambda: build)
    node.replaced.clear()
    link = await asyncio.to_thread(client.ensure, node.state, Path(sys.executable), runtime_cgroup=node.place("runtime"))
    link.socket.close()
    os.close(link.pidfd)
    return link


async def test_the_supervisor_becomes_another_version_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as node:
        empty = await node.pod()
        await node.exit(await node.run(empty, "sh", "-c", "echo kept > /dev/shm/x"))
        shared = await node.pod(*KINDS, NamespaceType.PID)
        counting = "i=0; while [ ! -e /dev/shm/go ]; do i=$((i+1)); echo line $i; sleep 0.01; done; exit 7"
        one = await node.run(shared, "sh", "-c", counting, pid="pod:pid")
        terminal = await node.run(empty, "sh", "-c", "stty size; read x; echo got $x; sleep 100", tty=True)
        before, pids = node.supervisor.pid, {c: node.supervisor.snapshot().containers[c].pid for c in (one, terminal)}
        starttime = Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[19]
        link = await upgrade(node, "other", monkeypatch)
        await asyncio.wait_for(node.replaced.wait(), 30)
        assert link.pid == node.supervisor.pid == before and link.hello["build"] == "other"
        assert Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[19] == starttime, "the same process"
        assert {c: node.supervisor.snapshot().containers[c].pid for c in pids} == pids
        # Namespaces that no living container has: only the fds that were handed over lead to them.
        reader = await node.run(empty, "cat", "/dev/shm/x")
        await node.exit(reader)
        assert node.lines(reader) == ["kept"]
        second = await node.run(shared, "sh", "-c", "ps | grep -c pause; touch /dev/shm/go", pid="pod:pid")
        assert (await node.exit(second)).exit_code == 0
        assert (await node.exit(one)).exit_code == 7, "still our own child: its code needs nobody else"
        assert await node.output(terminal, "echo", "exec") == (0, "exec\n")
        lines = [int(line.split()[1]) for line in node.lines(one) if line.startswith("line ")]
        assert lines == list(range(1, len(lines) + 1))


async def test_an_exit_during_the_upgrade_is_not_taken_for_a_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as node:
        pod = await node.pod()
        names = [await node.run(pod, "sh", "-c", f"sleep 0.{i}; exit {20 + i}") for i in range(1, 9)]
        await upgrade(node, "other", monkeypatch)
        await asyncio.wait_for(node.replaced.wait(), 30)
        for i, name in enumerate(names, 1):
            await until(lambda name=name: (node.state / "containers" / name / "exit.json").exists(), 20)
            assert node.record(name).exit_code == 20 + i


async def test_a_version_that_cannot_read_the_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000")
        record = node.state / "containers" / name / "runtime.json"
        whole = record.read_text()
        record.write_text(json.dumps({**json.loads(whole), "version": 99}))
        link = await upgrade(node, "other", monkeypatch)
        assert link.hello["build"] != "other"
        assert await node.output(name, "echo", "still") == (0, "still\n")
        assert not node.replaced.is_set()
        record.write_text(whole)


async def test_a_created_container_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as node:
        pod = await node.pod()
        created = await node.create(pod, "sh", "-c", "exit 5")
        link = await upgrade(node, "other", monkeypatch)
        assert link.hello["build"] != "other", "its launcher waits for us"
        await node.supervisor.start_container(created)
        assert (await node.exit(created)).exit_code == 5
