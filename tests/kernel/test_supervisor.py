"""The supervisor's operations on real containers, over the daemon's own connection to it."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci.spec import NamespaceType
from tests.kernel.supervised import rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def test_create_start_exit() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.create(pod, "sh", "-c", "echo out; echo err >&2; hostname; exit 7")
        assert not node.log(name).read_text()
        started = await node.supervisor.start_container(name)
        assert started.pid > 0
        exit = await node.exit(name)
        assert (exit.exit_code, exit.signal, exit.oom_killed, exit.reason) == (7, 0, False, "")
        assert node.record(name).exit_code == 7
        assert node.lines(name, "stdout") == ["out", "pod"]
        assert node.lines(name, "stderr") == ["err"]
        await node.remove(name)
        await node.supervisor.delete_container(name)  # and again


async def test_signals_and_kill() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done")
        await until(lambda: node.lines(name) == ["ready"])
        await node.supervisor.kill_container(name, signal.SIGTERM)
        assert (await node.exit(name)).exit_code == 3
        name = await node.run(pod, "sleep", "1000")
        await node.supervisor.kill_container(name, signal.SIGKILL)
        exit = await node.exit(name)
        assert (exit.exit_code, exit.signal) == (137, 9)
        await node.supervisor.kill_container(name, signal.SIGKILL)  # nothing happens to one that has exited


async def test_delete_kills() -> None:
    async with rig() as node:
        pod = await node.pod()
        running = await node.run(pod, "sleep", "1000")
        created = await node.create(pod, "sleep", "1000")
        await node.remove(running)
        await node.remove(created)
        assert node.exits[running].exit_code == 137


async def test_a_program_that_is_missing() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.create(pod, "/no/such/program")
        with pytest.raises(Failure, match="no/such/program"):
            await node.supervisor.start_container(name)
        exit = await node.exit(name)
        assert (exit.exit_code, exit.reason) == (128, "StartError")
        with pytest.raises(Failure, match="created"):
            await node.supervisor.start_container(name)


async def test_a_create_that_fails_leaves_nothing() -> None:
    async with rig() as node:
        pod = await node.pod()
        with pytest.raises(Failure):
            await node.create(pod, "true", log=str(node.base / "absent" / "log"))
        with pytest.raises(Failure):
            await node.create(pod, "true", change=lambda s: replace(s, process=replace(s.process, cwd="/proc/self/fd/3")))
        for name in node.containers:
            assert not list(Path("/sys/fs/cgroup").glob(f"*/{node.cgroup[1:]}/{name}"))
            assert name not in node.supervisor.snapshot().containers


async def test_exec() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000")
        assert await node.output(name, "sh", "-c", "echo hello; exit 5") == (5, "hello\n")
        assert await node.output(name, "sh", "-c", "kill -9 $$") == (137, "")
        with pytest.raises(Failure, match="missing"):
            await node.output(name, "missing")
        code, text = await node.output(name, "ps")
        assert code == 0 and " sleep 1000" in text
        with pytest.raises(Failure, match="unknown"):
            await node.output("f" * 64, "true")


async def test_exec_is_killed_with_its_tree_only() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000")
        session, read = await node.exec(name, "sh", "-c", "sleep 777 & (sleep 778 & sleep 779) & echo up; wait")
        assert await asyncio.to_thread(os.read, read, 100) == b"up\n"
        await node.supervisor.kill_exec(session.id, signal.SIGKILL, tree=True)
        assert await asyncio.wait_for(session.exited, 5) == 137
        os.close(read)
        for _ in range(50):  # what has got its SIGKILL takes a moment to be gone
            _, text = await node.output(name, "ps")
            if "sleep 77" not in text:
                break
            await asyncio.sleep(0.02)
        assert "sleep 1000" in text and "sleep 77" not in text


async def test_exec_with_a_terminal() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000")
        session, console = await node.exec(name, "sh", "-c", "tty; stty size; sleep 0.1; stty size", tty=True)
        await node.supervisor.resize(session.id, 41, 132, session=True)
        await asyncio.wait_for(session.exited, 5)
        text = os.read(console, 1000).decode()
        assert text.startswith("/dev/pts/") and text.endswith("41 132\r\n")
        os.close(console)


async def test_many_at_once() -> None:
    async with rig() as node:
        pod = await node.pod()
        names = await asyncio.gather(*(node.run(pod, "sh", "-c", f"echo {i}; sleep 0.2; exit {i}") for i in range(20)))
        for i, name in enumerate(names):
            assert (await node.exit(name)).exit_code == i
            assert node.lines(name) == [str(i)]
        await asyncio.gather(*(node.remove(name) for name in names))


async def test_a_shared_pid_namespace() -> None:
    async with rig() as node:
        pod = await node.pod(NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS, NamespaceType.PID)
        first = await node.run(pod, "sleep", "1111", pid="pod:pid")
        second = await node.run(pod, "sh", "-c", "sleep 2222 & ps; exit 4", pid="pod:pid")
        assert (await node.exit(second)).exit_code == 4
        assert any("sleep 1111" in line for line in node.lines(second))
        _, text = await node.output(first, "ps")
        assert "sleep 2222" not in text  # what a container started ends with it
        assert "/pause" in text
        await node.remove(first)
        await node.remove(second)
        await node.supervisor.delete_pod(pod)
        node.pods.discard(pod)
        assert not (node.state / "netns" / pod).exists()


async def test_out_of_memory_is_told() -> None:
    async with rig() as node:
        pod = await node.pod()

        def limited(spec):  # type: ignore[no-untyped-def]
            from shim.oci.spec import Memory, Resources

            return replace(spec, linux=replace(spec.linux, resources=Resources(memory=Memory(limit=20 << 20))))

        name = await node.run(pod, "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=64; head -c 64m /dev/zero | tail", change=limited)
        exit = await node.exit(name)
        assert exit.oom_killed, exit
        assert name in node.oom


async def test_a_terminal_container() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "tty; echo done", tty=True)
        assert (await node.exit(name)).exit_code == 0
        assert node.lines(name) == ["/dev/pts/0", "done"]


async def test_orphans_of_host_pid_containers_are_reaped() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "(sleep 0.1 &) ; sleep 0.4", pid="host")
        await node.exit(name)
        children = Path(f"/proc/{node.supervisor.pid}/task/{node.supervisor.pid}/children")
        ours = {"cri-shim: stdio", "cri-shim: spare"}
        await until(lambda: {Path(f"/proc/{pid}/comm").read_text().strip() for pid in children.read_text().split()} <= ours)


async def test_stdin() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "cat")
        assert (await node.exit(name)).exit_code == 0  # /dev/null
        name = await node.run(pod, "cat", stdin=True)
        await asyncio.sleep(0.2)
        assert name not in node.exits
        fifo = os.open(node.state / "containers" / name / "stdin", os.O_WRONLY | os.O_NONBLOCK)
        os.write(fifo, b"typed\n")
        os.close(fifo)
        await until(lambda: node.lines(name) == ["typed"])


async def test_deletes_at_the_same_time() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sleep", "1000")
        other = await node.create(pod, "sleep", "1000")
        await asyncio.gather(*(node.supervisor.delete_container(n) for n in (name, other) * 4))
        await asyncio.gather(*(node.supervisor.delete_pod(pod) for _ in range(4)))
        assert not node.supervisor.snapshot().containers and not node.supervisor.snapshot().pods


async def test_delete_during_create() -> None:
    async with rig() as node:
        pod = await node.pod()
        for _ in range(5):
            creating = asyncio.create_task(node.create(pod, "sleep", "1000"))
            await asyncio.sleep(0.003)
            for name in list(node.containers):
                await node.supervisor.delete_container(name)
            await asyncio.gather(creating, return_exceptions=True)
            for name in list(node.containers):
                await node.remove(name)


async def test_nothing_is_leaked() -> None:
    async with rig() as node:
        pod = await node.pod()

        async def cycle() -> None:
            name = await node.run(pod, "sleep", "1000")
            await asyncio.gather(*(node.output(name, "true") for _ in range(6)))
            with pytest.raises(Failure):
                await node.output(name, "missing")
            await node.remove(name)
            other = await node.pod()
            await node.supervisor.delete_pod(other)
            node.pods.discard(other)

        def fds() -> list[int]:
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (node.supervisor.pid, node.stdio_pid, os.getpid())]

        await cycle()
        await asyncio.sleep(1.2)  # the spares are complete again
        before = fds()
        for _ in range(5):
            await cycle()
        await asyncio.sleep(1.2)
        assert fds() == before
