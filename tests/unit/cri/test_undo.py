from __future__ import annotations

import asyncio

import pytest

from cri.undo import Undo


async def test_success_forgets() -> None:
    ran: list[str] = []
    async with Undo("x") as undo:
        undo.push("a", lambda: ran.append("a"))
    assert ran == []
    assert await undo.run() == []


async def test_all_steps_run_newest_first_and_failures_are_notes() -> None:
    ran: list[str] = []

    async def slow() -> None:
        ran.append("slow")
        await asyncio.sleep(0.01)

    def broken() -> None:
        ran.append("broken")
        raise OSError(16, "busy")

    async def hangs() -> None:
        await asyncio.Event().wait()

    with pytest.raises(ValueError) as caught:
        async with Undo("run pod") as undo:
            undo.push("first", lambda: ran.append("first"))
            undo.push("broken", broken)
            undo.push("hangs", hangs, timeout=0.02)
            undo.push("slow", slow)
            raise ValueError("why")
    assert ran == ["slow", "broken", "first"]
    assert caught.value.__notes__ == ["undo run pod: hangs: not done after 0.02 s", "undo run pod: broken: [Errno 16] busy"]


async def test_cancellation_waits_for_the_steps() -> None:
    done = asyncio.Event()

    async def release() -> None:
        await asyncio.sleep(0.05)
        done.set()

    async def verb() -> None:
        async with Undo("x") as undo:
            undo.push("release", release)
            await asyncio.Event().wait()

    task = asyncio.create_task(verb())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_timed_out_inside_a_step_is_told_from_ours() -> None:
    undo = Undo("x")

    def step() -> None:
        raise TimeoutError("registry")

    undo.push("a", step)
    assert [str(f) for f in await undo.run()] == ["undo x: a: registry"]
