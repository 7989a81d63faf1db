"""GC runs alone; ADD and DEL do not wait for each other, nor for a GC that waits."""

from __future__ import annotations

import asyncio

from cri.network.cni.exclusion import Gate


async def test_alone_and_together() -> None:
    gate, trace = Gate(), []
    release = {name: asyncio.Event() for name in ("a", "b", "gc")}

    async def shared(name: str) -> None:
        async with gate.shared():
            trace.append(f"+{name}")
            await release[name].wait()
        trace.append(f"-{name}")

    async def alone() -> None:
        async with gate.alone():
            trace.append("+gc")
            await release["gc"].wait()
        trace.append("-gc")

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(shared("a")), asyncio.create_task(alone())]
    await settle()
    tasks.append(asyncio.create_task(shared("b")))
    await settle()
    assert trace == ["+a", "+b"], "a pod does not wait behind a GC that waits"
    release["a"].set()
    await settle()
    assert trace == ["+a", "+b", "-a"]
    release["b"].set()
    await settle()
    assert trace[-2:] == ["-b", "+gc"]
    late = asyncio.create_task(shared("a"))
    await settle()
    assert trace[-1] == "+gc"
    release["gc"].set()
    await asyncio.gather(*tasks, late)
    assert trace[-3:] == ["-gc", "+a", "-a"]


async def test_a_cancelled_holder_lets_others_in() -> None:
    gate = Gate()

    async def hold() -> None:
        async with gate.shared():
            await asyncio.sleep(100)

    task = asyncio.create_task(hold())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(1):
        async with gate.alone():
            pass
