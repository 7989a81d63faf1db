"""The supervisor's children: jobs with a channel, processes with a pidfd, and strays that nobody knows."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from shim import wire
from shim.errors import Failure
from shim.linux import libc
from shim.runtime import launch
from shim.runtime.channel import MAX_MESSAGE
from shim.runtime.slots import PidSlots
from shim.supervisor.loop import CHILDREN, EXIT, Future, Loop

if TYPE_CHECKING:
    from shim.runtime.helper import Ordered
    from shim.supervisor.agents import Launch
    from shim.supervisor.helpers import Helpers


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended; ``signal`` is 0 for an exit with ``code``."""

    code: int
    signal: int = 0

    @classmethod
    def from_waitid(cls, result: libc.Exit) -> Ended:
        return cls(result.status) if result.code == os.CLD_EXITED else cls(128 + result.status, result.status)

    @classmethod
    def from_status(cls, status: int) -> Ended:
        """From a wait status."""
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return cls(128 + number, number) if number else cls(os.WEXITSTATUS(status))

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.signal else f"exit code {self.code}"


class Process:
    """A process watched by pidfd. ``ended`` is None in it where somebody else is the parent: see ``exits``."""

    __slots__ = ("_children", "ended", "pid", "pidfd")

    def __init__(self, children: Children, pid: int, pidfd: int) -> None:
        self._children, self.pid, self.pidfd = children, pid, pidfd
        self.ended: Future[Ended | None] = Future(children.loop)
        children.known[pid] = self
        children.loop.add(pidfd, self.check, EXIT)

    def check(self) -> None:
        """Reap it if it has ended."""
        try:
            result = libc.waitid_pidfd(self.pidfd)
        except ChildProcessError:
            self._finish(None)
            return
        if result is not None:
            self._finish(Ended.from_waitid(result))

    def _finish(self, ended: Ended | None) -> None:
        self._children.loop.remove(self.pidfd)
        if self._children.known.get(self.pid) is self:
            del self._children.known[self.pid]
        self.ended.set(ended)

    def signal(self, number: int) -> bool:
        """False when it has ended already."""
        if self.pidfd < 0:
            return False
        try:
            libc.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if self.pidfd >= 0:
            self._children.loop.remove(self.pidfd)
            if self._children.known.get(self.pid) is self:
                del self._children.known[self.pid]
            os.close(self.pidfd)
            self.pidfd = -1


class Line:
    """One end of a socket pair to what a child has become: its messages in order, then None at end of file."""

    __slots__ = ("_connection", "_inbox", "_loop", "_over", "_reset", "_waiter", "title")

    def __init__(self, loop: Loop, sock: socket.socket, title: str, *, reports: bool = False) -> None:
        self._loop, self.title = loop, title
        self._connection = wire.Connection(sock, reports=reports)
        self._inbox: deque[wire.Message] = deque()
        self._over = self._reset = False
        self._waiter: Future[None] | None = None
        self._loop.add(self._connection.fileno(), self._receive)

    def _receive(self) -> None:
        try:
            while (message := self._connection.receive()) is not None:
                self._inbox.append(message)
        except wire.Closed as closed:
            self._over = True
            self._reset = isinstance(closed.__cause__, ConnectionResetError)
            self._loop.remove(self._connection.fileno())
        if self._waiter is not None and (self._inbox or self._over):
            self._waiter.set(None)

    @property
    def over(self) -> bool:
        """The other end is closed."""
        return self._over

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """To a child that has died, nothing is sent: its end of file tells."""
        try:
            self._connection.send(body, fds)
        except wire.Closed:
            return

    async def _wait(self) -> None:
        while not self._inbox and not self._over:
            self._waiter = Future(self._loop)
            await self._waiter

    async def message(self) -> wire.Message | None:
        """The next message, whose fds become the caller's; None once the other end is closed."""
        await self._wait()
        return self._inbox.popleft() if self._inbox else None

    def unpack(self, message: wire.Message) -> tuple[dict[str, Any], dict[str, int]]:
        """The ``ok`` of a message and its fds by name. Raises the child's Failure."""
        body, fds = message
        if "ok" not in body:
            message.close()
            raise Failed(body)
        names = body["ok"].get("fds", ())
        if len(names) != len(fds):
            message.close()
            raise Failure(self.title, message=f"child sent {len(fds)} fds for {len(names)} names")
        return body["ok"], dict(zip(names, fds, strict=True))

    def close(self) -> None:
        self._loop.remove(self._connection.fileno())
        self._connection.close()
        for message in self._inbox:
            message.close()
        self._inbox.clear()


class Job(Line):
    """A child that runs one job of ``shim.runtime``. ``close`` closes the channel; the child is reaped when it ends."""

    __slots__ = ("_report", "helps", "process")

    def __init__(self, children: Children, child: launch.Child, title: str) -> None:
        super().__init__(children.loop, child.channel, title)
        self._report = -1  # see ``narrow``
        self.helps = False  # takes another order after this one
        self.process = Process(children, child.pid, child.pidfd)
        self.process.ended.then(self.process.close)

    async def died_unasked(self) -> bool:
        """Waits for the first message. True for a helper that died with its order unread (the socket is reset then): it did nothing,
        and another child may be asked."""
        await self._wait()
        return self.helps and self._reset and not self._inbox

    def narrow(self, report: int) -> None:
        """The child forks last, and then says nothing but an error, in a file (``shim.runtime.channel``)."""
        self._report = report

    @property
    def narrowed(self) -> bool:
        return self._report >= 0

    async def last_words(self, patience: float) -> Failure | None:
        """Waits for the child's end, which is that of the execve of what it forked last; the error, if there was one."""
        if not await self._loop.within(self.process.ended, patience):
            return not_started(self.title)
        said = os.pread(self._report, MAX_MESSAGE, 0)
        ended = self.process.ended.result()
        try:
            if said:
                return Failure.from_json(json.loads(said)["error"])
        except (ValueError, KeyError, TypeError, AttributeError):  # not our child's words
            return Failure(self.title, message="something in the container has meddled with the process before its program ran")
        return None if ended == Ended(0) else Failure(self.title, message=f"child died: {ended}")

    def close(self) -> None:
        super().close()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1

    async def answer(self) -> tuple[dict[str, Any], dict[str, int]]:
        """The ``ok`` of the next message and its fds by name. Raises the child's Failure, or one that says how it died."""
        message = await self.message()
        if message is None:
            ended = await self.process.ended
            raise Failure(self.title, message=f"child died: {ended}")
        return self.unpack(message)


class Failed(Failure):
    """A child's Failure, with the whole message: it may name what the child left to be removed."""

    def __init__(self, body: dict[str, Any]) -> None:
        failure = Failure.from_json(body.get("error", {"message": "child sent no answer"}))
        super().__init__(
            failure.phase, failure.operation, errno=failure.errno, path=failure.path, message=failure.message, hint=failure.hint
        )
        self.body = body


class Children:
    """Everything this process is the parent of."""

    def __init__(self, loop: Loop, slots: PidSlots, birthplace: int | None = None) -> None:
        self.loop, self.slots = loop, slots
        self.known: dict[int, Process] = {}
        self._launching: set[int] = set()  # slots in use
        self.launches: set[Launch] = set()  # agents on their way
        self.adopting = False  # after an upgrade our children are not known yet, and none may be taken for a stray
        self._birthplace = birthplace
        self.helpers: Helpers | None = None  # set once there is a context to fork them with

    def run(self, job: launch.Job, title: str, cgroup: int | None = None) -> Job:
        """A child with ``job``: a helper that waits for orders, or a fork. Raises Failure."""
        if self.helpers is not None and hasattr(job, "order"):
            return self.helpers.take(cast("Ordered", job), title)
        return self.fork(job, title, cgroup)

    def fork(self, job: launch.Job, title: str, cgroup: int | None = None) -> Job:
        """Raises Failure."""
        try:
            child = launch.spawn(job, title=f"cri-shim: {title}", cgroup=cgroup)
        except OSError as error:
            raise Failure.wrap(title, "clone3", error) from error
        return Job(self, child, title)

    async def call(self, job: launch.Job, title: str) -> tuple[dict[str, Any], dict[str, int]]:
        """Run ``job`` to its answer."""
        running = self.run(job, title)
        if await running.died_unasked():
            running.close()
            running = self.fork(job, title)
        try:
            answer = await running.answer()
        except BaseException:
            running.close()
            raise
        self.done(running, again=running.helps and job.again(answer[0]))  # type: ignore[attr-defined]
        return answer

    def done(self, running: Job, *, again: bool) -> None:
        """After its answer: a helper that can do another job is kept."""
        if self.helpers is not None and running.helps and again:
            self.helpers.give_back(running)
        else:
            running.close()

    def take_slot(self) -> int:
        slot = self.slots.take()
        if slot is None:
            raise Failure("launch", message="too many launches in flight")
        self._launching.add(slot)
        return slot

    def adopt_slot(self, slot: int) -> Process | None:
        """The process whose pid the kernel wrote into ``slot``, ours by CLONE_PARENT; None if nothing was forked. Frees the slot."""
        pid = self.slots.pid(slot)
        try:
            return Process(self, pid, libc.pidfd_open(pid)) if pid else None
        finally:
            self.release_slot(slot)

    def adopt_launch(self, launch: Launch) -> Process | None:
        """The process that an agent forked last, ours by CLONE_PARENT; None if it forked none."""
        pid = launch.pid
        return Process(self, pid, libc.pidfd_open(pid)) if pid else None

    def release_slot(self, slot: int) -> None:
        self._launching.discard(slot)
        self.slots.release(slot)

    def watch(self, pid: int) -> Process:
        """A child that was spawned by other means."""
        return Process(self, pid, libc.pidfd_open(pid))

    def reap_strays(self) -> None:
        """Reap orphans that came to us as subreaper. A zombie that is known, or about to be, is left to its owner."""
        if self.adopting:
            return
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            process = self.known.get(found.si_pid)
            if process is not None:
                process.check()
            elif any(self.slots.pid(slot) == found.si_pid for slot in self._launching) or any(
                launch.pid == found.si_pid for launch in self.launches
            ):
                return  # the launch ends with adopt_slot, and its exit brings us back here
            else:
                os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)


async def end_of_life(loop: Loop, life: int, patience: float) -> bool:
    """Waits until every other end is closed; False if that takes longer than ``patience`` seconds."""
    over = loop.future()
    loop.add(life, lambda: over.set(None), mask=0)  # a hang-up is told unasked
    try:
        return await loop.within(over, patience)
    finally:
        loop.remove(life)


def not_started(phase: str) -> Failure:
    return Failure(
        phase,
        message="the program has not started in time",
        hint="another process of the container may have stopped it, or its file system does not answer",
    )


def watch_signals(loop: Loop, fd: int, handler: Callable[[int], None]) -> None:
    """Deliver signals of a signalfd after everything else of a batch: exits that have a pidfd are handled by then."""

    def read() -> None:
        try:
            data = os.read(fd, 128 * 16)
        except BlockingIOError:
            return
        for offset in range(0, len(data), 128):
            handler(int.from_bytes(data[offset : offset + 4], "little"))

    loop.add(fd, read, CHILDREN)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
