"""The supervisor's loop: order within a batch, waiting with a limit, errors that reach who awaits them."""

from __future__ import annotations

import os

import pytest

from shim.supervisor.loop import EXIT, MESSAGE, OOM, Future, Loop


def finish(loop: Loop, future: Future[object], turns: int = 200) -> None:
    for _ in range(turns):
        if future.done:
            return
        loop.turn(0.05)
    raise AssertionError("not done")


def test_oom_comes_before_exit_before_messages() -> None:
    loop, order, fds = Loop(), [], []
    for name, priority in (("message", MESSAGE), ("exit", EXIT), ("oom", OOM)):
        read, write = os.pipe()
        fds += [read, write]
        os.write(write, b"x")

        def handle(name: str = name, read: int = read) -> None:
            order.append(name)
            loop.remove(read)

        loop.add(read, handle, priority)
    loop.turn(1)
    assert order == ["oom", "exit", "message"]
    for fd in fds:
        os.close(fd)


def test_a_handler_removed_by_an_earlier_one_is_not_called() -> None:
    loop, called, pipes = Loop(), [], [os.pipe(), os.pipe()]
    first, second = pipes[0][0], pipes[1][0]
    for _, write in pipes:
        os.write(write, b"x")
    loop.add(first, lambda: (called.append(1), loop.remove(first), loop.remove(second)), OOM)
    loop.add(second, lambda: called.append(2), MESSAGE)
    loop.turn(1)
    assert called == [1]


def test_tasks_wait_for_futures_and_pass_errors_on() -> None:
    loop = Loop()
    future: Future[int] = Future(loop)

    async def inner() -> int:
        return await future + 1

    async def outer() -> int:
        return await loop.start(inner()) * 2

    task = loop.start(outer())
    assert not task.done and loop.tasks
    loop.call_later(0.01, lambda: future.set(20))
    finish(loop, task)
    assert task.result() == 42 and not loop.tasks

    async def fails() -> None:
        raise KeyError("x")

    async def watches() -> str:
        try:
            await loop.start(fails())
        except KeyError:
            return "seen"
        return "missed"

    task = loop.start(watches())
    finish(loop, task)
    assert task.result() == "seen"


def test_within() -> None:
    loop = Loop()
    never: Future[None] = Future(loop)
    soon: Future[None] = Future(loop)
    loop.call_later(0.01, lambda: soon.set(None))

    async def both() -> tuple[bool, bool]:
        return await loop.within(soon, 5), await loop.within(never, 0.02)

    task = loop.start(both())
    finish(loop, task)
    assert task.result() == (True, False)


def test_a_cancelled_timer_does_not_wake_the_loop() -> None:
    loop, fired = Loop(), []
    loop.call_later(0.001, lambda: fired.append(1)).cancel()
    loop.call_later(0.005, lambda: setattr(loop, "stopped", True))
    loop.run()
    assert not fired


def test_first_result_wins() -> None:
    future: Future[int] = Future(Loop())
    future.set(1)
    future.fail(ValueError())
    future.set(2)
    assert future.result() == 1
    failed: Future[int] = Future(Loop())
    failed.fail(ValueError("no"))
    with pytest.raises(ValueError):
        failed.result()
