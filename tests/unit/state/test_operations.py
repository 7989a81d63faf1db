from __future__ import annotations

import asyncio
import itertools

import pytest

from cri.errors import AlreadyExists, DeadlineExceeded
from cri.state.operations import Operation, Operations
from protos.runtime.v1 import api_pb2 as v1

CONFIG = v1.RunPodSandboxRequest(runtime_handler="a")
OTHER = v1.RunPodSandboxRequest(runtime_handler="b")


class Ids:
    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self) -> str:
        return f"id{next(self._numbers)}"


async def test_fifty_identical_calls_are_one() -> None:
    operations, ids = Operations("run sandbox"), Ids()
    runs = 0

    async def work(operation: Operation) -> str:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0.01)
        return operation.id

    got = await asyncio.gather(*(operations.run("n", ids, CONFIG, work) for _ in range(50)))
    assert set(got) == {"id0"}
    assert runs == 1
    assert len(operations) == 0


async def test_a_retry_after_a_cancel_gets_the_same_id() -> None:
    operations, ids = Operations("run sandbox"), Ids()
    go = asyncio.Event()

    async def work(operation: Operation) -> str:
        await go.wait()
        return operation.id

    first = asyncio.create_task(operations.run("n", ids, CONFIG, work))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(operations.run("n", ids, CONFIG, work))
    await asyncio.sleep(0)
    go.set()
    assert await second == "id0"


async def test_a_failure_is_everybodys_and_frees_the_name() -> None:
    operations, ids = Operations("run sandbox"), Ids()

    async def work(operation: Operation) -> str:
        await asyncio.sleep(0)
        raise ValueError("no")

    results = await asyncio.gather(*(operations.run("n", ids, CONFIG, work) for _ in range(3)), return_exceptions=True)
    assert [str(r) for r in results] == ["no"] * 3
    assert len(operations) == 0


async def test_another_configuration_under_the_same_name_is_told_the_stage() -> None:
    operations, ids = Operations("run sandbox"), Ids()
    go = asyncio.Event()

    async def work(operation: Operation) -> str:
        operation.enter("network")
        await go.wait()
        return operation.id

    first = asyncio.create_task(operations.run("n", ids, CONFIG, work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExists, match="'network'"):
        await operations.run("n", ids, OTHER, work)
    go.set()
    await first


async def test_a_caller_without_patience_is_told_the_stage_before_its_deadline() -> None:
    operations, ids = Operations("run sandbox"), Ids()
    go = asyncio.Event()

    async def work(operation: Operation) -> str:
        operation.enter("network")
        await go.wait()
        return operation.id

    began = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="'network'"):
        await operations.run("n", ids, CONFIG, work, timeout=0.3)
    assert asyncio.get_running_loop().time() - began < 0.3
    go.set()
    await operations.drain()
    assert len(operations) == 0


async def test_drain_waits_for_those_asked_for() -> None:
    operations, ids = Operations("create container"), Ids()
    go = {"a": asyncio.Event(), "b": asyncio.Event()}

    async def work(operation: Operation) -> str:
        await go[operation.name].wait()
        return operation.id

    tasks = [asyncio.create_task(operations.run(name, ids, CONFIG, work)) for name in go]
    await asyncio.sleep(0)
    drained = asyncio.create_task(operations.drain({"id1"}))
    await asyncio.sleep(0.01)
    assert not drained.done()
    go["b"].set()
    await drained
    assert not tasks[0].done()
    go["a"].set()
    await tasks[0]


async def test_stages_are_timed() -> None:
    operations, ids = Operations("run sandbox"), Ids()
    took: dict[str, int] = {}

    async def work(operation: Operation) -> str:
        operation.enter("one")
        await asyncio.sleep(0.005)
        operation.enter("two")
        took.update(operation.took)
        return operation.id

    await operations.run("n", ids, CONFIG, work)
    assert took["one"] >= 4000
