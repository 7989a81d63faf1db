"""One epoll, timers, and coroutines without asyncio (which would cost 5.5 MB of private memory and its imports in every fork).

Nothing that runs here may block. Within a batch of events, handlers run in the order of their priority: OOM counters are read before
the exit that they explain.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

OOM, EXIT, MESSAGE, CHILDREN = 0, 1, 2, 3  # priorities
READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Future(Generic[T]):
    """A value to come. Awaiting it from a task of the loop suspends that task."""

    __slots__ = ("_callbacks", "_error", "_loop", "_value", "done")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._callbacks: list[Callable[[], object]] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False

    def set(self, value: T) -> None:
        """First one wins; later ones are dropped."""
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self.done = True
        for callback in self._callbacks:
            self._loop.call_soon(callback)
        self._callbacks.clear()

    def then(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` from the loop when done."""
        if self.done:
            self._loop.call_soon(callback)
        else:
            self._callbacks.append(callback)

    def result(self) -> T:
        """Value or exception of a future that is done."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    @property
    def watched(self) -> bool:
        return bool(self._callbacks)

    @property
    def error(self) -> BaseException | None:
        return self._error

    def __await__(self) -> Generator[Future[T], None, T]:
        if not self.done:
            yield self
        return self.result()


class Task(Future[T]):
    """A running coroutine; itself a future of its result."""

    __slots__ = ("coroutine",)

    def __init__(self, loop: Loop, coroutine: Coroutine[Any, Any, T]) -> None:
        super().__init__(loop)
        self.coroutine = coroutine
        self._step()

    def where(self) -> str:
        """For a person: what it is and the line it waits at."""
        frame = getattr(self.coroutine, "cr_frame", None)
        return f"{getattr(self.coroutine, '__qualname__', '?')}:{frame.f_lineno if frame else '?'}"

    def _step(self) -> None:
        try:
            waiting = self.coroutine.send(None)
        except StopIteration as stop:
            self._loop.tasks.discard(self)
            self.set(stop.value)
        except Exception as error:
            self._loop.tasks.discard(self)
            self.fail(error)
        else:
            self._loop.tasks.add(self)
            waiting.then(self._step)


class Timer:
    """``cancel`` it, or it fires once."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """``add`` fds, ``start`` coroutines, ``run``."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[int, Callable[[], object]]] = {}
        self._soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self.tasks: set[Task[Any]] = set()
        self.stopped = False

    def add(self, fd: int, callback: Callable[[], object], priority: int = MESSAGE, mask: int = READ) -> None:
        self._epoll.register(fd, mask)
        self._handlers[fd] = (priority, callback)

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Before closing ``fd``: a duplicate of it in a child would keep a forgotten registration alive."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """Run a coroutine up to its first wait now, the rest as what it awaits arrives."""
        return Task(self, coroutine)

    async def joined(self, running: dict[Any, Task[T]], key: Any, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run what ``make`` gives, or wait for the one that already runs for ``key``: all get its result or error."""
        task = running.get(key)
        if task is None or task.done:
            task = self.start(make())
            if not task.done:
                running[key] = task
                task.then(lambda: running.pop(key, None))
        return await task

    def future(self) -> Future[Any]:
        return Future(self)

    async def sleep(self, seconds: float) -> None:
        future: Future[None] = Future(self)
        self.call_later(seconds, lambda: future.set(None))
        await future

    async def within(self, future: Future[Any], seconds: float) -> bool:
        """Wait for ``future`` at most that long. True if it is done; its result or error is left for the caller to take."""
        if future.done:
            return True
        either: Future[None] = Future(self)
        future.then(lambda: either.set(None))
        timer = self.call_later(seconds, lambda: either.set(None))
        await either
        timer.cancel()
        return future.done

    def run(self) -> None:
        while not self.stopped:
            self.turn(self._timeout())

    def _timeout(self) -> float | None:
        if self._soon:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def turn(self, timeout: float | None) -> None:
        """One wait and everything that it brings."""
        events = self._epoll.poll(timeout)
        handlers = self._handlers
        if len(events) > 1:
            events.sort(key=lambda event: handlers[event[0]][0] if event[0] in handlers else CHILDREN)
        for fd, _ in events:
            entry = handlers.get(fd)  # an earlier handler of the batch may have removed it
            if entry is not None:
                entry[1]()
                self._drain()
        self._fire()
        self._drain()

    def _drain(self) -> None:
        soon = self._soon
        while soon:
            soon.popleft()()

    def _fire(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback()
