"""stdio with real containers: every line once, whatever is killed, rotated or full."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.stdio.main import READ
from tests.kernel.supervised import rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(90)]

RECORD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) [FP] ")


async def test_many_lines_from_several_containers() -> None:
    async with rig() as node:
        pod = await node.pod()
        names = [await node.run(pod, "sh", "-c", "seq 1 100000; seq 1 1000 >&2") for _ in range(3)]
        for name in names:
            assert (await node.exit(name, 30)).exit_code == 0
            assert node.lines(name, "stdout") == [str(i) for i in range(1, 100001)]
            assert node.lines(name, "stderr") == [str(i) for i in range(1, 1001)]
            records = node.log(name).read_text().splitlines()
            assert all(RECORD.match(record) for record in records[:100])
            assert not any(" P " in record for record in records)


async def test_long_lines_and_no_newline_at_the_end() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "head -c 1048576 /dev/zero | tr '\\0' x; echo; echo -n end")
        await node.exit(name)
        assert node.lines(name) == ["x" * 1048576, "end"]
        assert node.log(name).read_text().count(" P ") == 63


async def test_the_last_line_of_a_fast_exit() -> None:
    async with rig() as node:
        pod = await node.pod()
        for i in range(10):
            name = await node.run(pod, "sh", "-c", f"echo out {i}; echo err {i} >&2")
            await node.exit(name)
            assert sorted(node.lines(name)) == [f"err {i}", f"out {i}"]
            await node.remove(name)


async def test_rotation_under_load() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "seq", "1", "300000")
        log, parts = node.log(name), []
        for i in range(5):
            await asyncio.sleep(0.03)
            parts.append(log.with_suffix(f".{i}"))
            log.rename(parts[-1])
            try:
                await node.supervisor.reopen_log(name)
            except Failure:  # it has exited
                break
        await node.exit(name, 30)
        text = "".join(part.read_text() for part in [*parts, log] if part.exists())
        assert [line.split(" ")[3] for line in text.splitlines()] == [str(i) for i in range(1, 300001)]


async def test_reopen_needs_a_running_container() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "true")
        await node.exit(name)
        with pytest.raises(Failure, match="exited"):
            await node.supervisor.reopen_log(name)


async def test_stdio_killed_under_load() -> None:
    """Each death costs one read at most: lines stay in order, none comes twice, and the gaps are no larger than reads."""
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "seq", "1000000", "3000000")  # numbers of equal length: a cut one is recognised
        for _ in range(3):
            await asyncio.sleep(0.05)
            await node.kill_stdio()
        await node.exit(name, 30)
        lines = [int(line) for line in node.lines(name) if len(line) == 7]
        assert all(a < b for a, b in itertools.pairwise(lines))
        lost = sum(b - a - 1 for a, b in itertools.pairwise([999999, *lines, 3000001]))
        assert lost * 8 <= 3 * (READ + 2 * 8), lost


async def test_stdio_killed_while_idle_loses_nothing() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo $i; sleep 0.01; done")
        for _ in range(4):
            await asyncio.sleep(0.15)
            await until(lambda: node.lines(name))
            os.kill(node.stdio_pid, signal.SIGSTOP)  # whatever is written now stays in the FIFO
            await asyncio.sleep(0.05)
            await node.kill_stdio()
        await node.exit(name)
        assert node.lines(name) == [str(i) for i in range(1, 101)]


async def test_supervisor_killed_under_load_loses_nothing() -> None:
    """stdio goes on alone, then hands over in order: the new one starts only when the old one has written all it read."""
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "seq", "1", "1000000")
        await asyncio.sleep(0.05)
        await node.kill_supervisor()
        await node.exit(name, 30)
        assert node.lines(name) == [str(i) for i in range(1, 1000001)]


async def test_a_full_disk_does_not_stop_the_container() -> None:
    async with rig() as node:
        small = node.base / "small"
        small.mkdir()
        assert os.system(f"mount -t tmpfs -o size=256k tmpfs {small}") == 0
        errors: list[tuple[int | None, int]] = []
        node.supervisor.on_log_error = lambda _, number, dropped: errors.append((number, dropped))
        try:
            pod = await node.pod()
            log = small / "log"
            name = await node.run(pod, "sh", "-c", "seq 1 300000; echo > /dev/shm/past; sleep 1000", log=str(log))
            await until(lambda: errors, 10)
            assert errors[0][0] == 28
            past = Path(f"/proc/{node.supervisor.snapshot().containers[name].pid}/root/dev/shm/past")
            await until(past.exists, 15)
            assert log.read_bytes().endswith(b"\n")
            log.rename(small / "log.1")
            (small / "log.1").write_bytes(b"")
            await node.supervisor.reopen_log(name)
            assert (await node.output(name, "sh", "-c", "echo again > /proc/1/fd/1"))[0] == 0
            await until(lambda: " F again\n" in log.read_text(), 10)
            await until(lambda: errors[-1][0] is None, 10)
            assert errors[-1][1] > 0
        finally:
            for name in list(node.containers):
                await node.remove(name)
            os.system(f"umount -l {small}")


async def test_output_without_a_log_is_discarded() -> None:
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "seq", "1", "300000", log="")
        assert (await node.exit(name)).exit_code == 0


async def test_nothing_runs_while_nothing_is_written() -> None:
    async with rig() as node:
        pod = await node.pod()
        for _ in range(3):
            await node.run(pod, "sh", "-c", "echo up; sleep 1000")
        await asyncio.sleep(0.3)

        def cpu(pid: int) -> int:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        def switches(pid: int) -> int:
            text = Path(f"/proc/{pid}/status").read_text()
            return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)

        pids = (node.supervisor.pid, node.stdio_pid)
        before = [(cpu(pid), switches(pid)) for pid in pids]
        await asyncio.sleep(1)
        assert [(cpu(pid), switches(pid)) for pid in pids] == before
