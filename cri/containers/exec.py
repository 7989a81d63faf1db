"""ExecSync. The exec probe is the most frequent expensive call on a node, so its usual case is short: two pipes that nobody watches,
one request to the supervisor, one wake-up when the process has ended, two reads.

Output beyond what a pipe holds is read while the process runs (the watching starts after a moment); what a background child may still
write is waited for with a bound (containerd waits for ever unless told otherwise). Output above the cap is read and thrown away, so that
the process goes on (CVE-2022-1708).
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import secrets
import signal
from collections.abc import Sequence
from typing import Final

from cri.containers.model import Container, Containers
from cri.errors import DeadlineExceeded, InvalidArgument
from cri.spec import resources
from cri.supervisor import ExecSession, Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci import bundle
from shim.oci.spec import Process, User

CAP: Final = 16 << 20  # bytes of each stream
MESSAGE: Final = (16 << 20) - 1024  # bytes of both: the kubelet refuses a larger message, and then it had no output at all
WATCH_AFTER: Final = 0.01  # seconds
DRAIN: Final = 1.0  # seconds for background children that hold the pipes
STARTING: Final = 1.0  # seconds past its time that an exec is waited for which has not begun
ENDING: Final = 0.25  # seconds that a container's exit may be behind an exec that failed because of it
REAP: Final = 5.0  # seconds for a killed process to be gone
PIPE: Final = 1 << 20  # /proc/sys/fs/pipe-max-size, to which a process may enlarge its stdout
_READ: Final = 1 << 16
_PER_WAKEUP: Final = 16  # reads: other calls want the loop, too


async def exec_sync(request: v1.ExecSyncRequest, *, containers: Containers, supervisor: Supervisor) -> v1.ExecSyncResponse:
    """Run a command in a running container. After ``timeout`` seconds (0: never) its processes, and only those, are killed."""
    container = containers.get(request.container_id)
    container.require_running("exec")
    process = exec_process(container, request.cmd, containers)
    exec_id = secrets.token_hex(16)
    run = _Run(exec_id, supervisor, asyncio.get_running_loop())
    container.execs.add(exec_id)
    try:
        try:
            async with asyncio.timeout(request.timeout if request.timeout > 0 else None) as limit:
                code = await run.run(container.id, process, limit)
        except TimeoutError:
            if not limit.expired():
                raise
            await run.kill()
            raise _late(request.timeout) from None
        except asyncio.CancelledError:  # the client has gone: nobody will read the output
            await run.kill()
            raise
        except Failure as failure:
            if failure.errno == errno.ETIMEDOUT and failure.operation == "":  # the supervisor's clock was a little ahead of our timer
                raise _late(request.timeout) from None
            await _refuse_if_ended(container)
            raise
        stdout, stderr = run.output()
        return v1.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=code)
    finally:
        container.execs.discard(exec_id)
        run.close()


def _late(seconds: int) -> DeadlineExceeded:
    """The words and the code that the kubelet takes for a probe that timed out."""
    return DeadlineExceeded(f"failed to exec in container: timeout {go_duration(seconds)} exceeded: context deadline exceeded")


async def _refuse_if_ended(container: Container) -> None:
    """An exec that meets the container's end fails with the kernel's words for a process that is not there: say what happened instead."""
    for _ in range(25):
        container.require_running("exec")
        await asyncio.sleep(ENDING / 25)


def exec_process(container: Container, command: Sequence[str], containers: Containers) -> Process:
    """The container's process with another command: same user, environment, directory, capabilities and limits."""
    if not command or not command[0]:
        raise InvalidArgument("must not be empty", field="cmd")
    if any("\0" in word for word in command):
        raise InvalidArgument("contains NUL", field="cmd")
    if container.process is None:  # the first exec after a start of the daemon
        fd = os.open(containers.layout.bundle(container.id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            container.process = bundle.load_spec(fd).process
        finally:
            os.close(fd)
    user = container.process.user
    if container.facts.user is not None:
        # As resolved at creation: the container may have rewritten its /etc/passwd since.
        found = container.facts.user
        user = User(uid=found.uid, gid=found.gid, umask=user.umask, additional_gids=tuple(found.groups))
    affinity = container.process.exec_cpu_affinity
    if affinity is not None:  # the cpuset may have been changed since
        affinity = resources.exec_affinity(container.config.linux.resources, "first")
    return dataclasses.replace(
        container.process, args=tuple(command), terminal=False, console_size=None, user=user, exec_cpu_affinity=affinity
    )


def fit(stdout: bytes, stderr: bytes) -> tuple[bytes, bytes]:
    """Both streams cut to one message: each may have half of it, and what the other leaves."""
    if len(stdout) + len(stderr) > MESSAGE:
        stdout = stdout[: max(MESSAGE - len(stderr), MESSAGE // 2)]
        stderr = stderr[: MESSAGE - len(stdout)]
    return stdout, stderr


class _Run:
    """One exec session, its pipes, and what came out of them."""

    def __init__(self, exec_id: str, supervisor: Supervisor, loop: asyncio.AbstractEventLoop) -> None:
        self._id, self._supervisor, self._loop = exec_id, supervisor, loop
        self._starting: asyncio.Future[ExecSession] | None = None
        self._streams = [_Stream(loop), _Stream(loop)]
        self._watching = loop.call_later(WATCH_AFTER, self._watch)

    async def run(self, container_id: str, process: Process, limit: asyncio.Timeout) -> int:
        stdout, stderr = self._streams
        # Shielded: an exec that is over before its process exists could not be killed.
        self._starting = asyncio.ensure_future(
            self._supervisor.exec(
                container_id, self._id, process, stdin=None, stdout=stdout.write_fd, stderr=stderr.write_fd, until=limit.when()
            )
        )
        session = await asyncio.shield(self._starting)
        for stream in self._streams:
            stream.close_write()
        code = await asyncio.shield(session.exited)
        # From here on the answer is certain; the time limit must not turn it into a failure.
        deadline, now = limit.when(), self._loop.time()
        limit.reschedule(None)
        for stream in self._streams:
            stream.read_all()
        if not all(stream.closed for stream in self._streams):
            await self._drain(DRAIN if deadline is None else max(0.0, min(DRAIN, deadline - now)))
        return code

    async def _drain(self, seconds: float) -> None:
        self._watch()
        end = self._loop.time() + seconds
        for stream in self._streams:
            await stream.wait_closed(end - self._loop.time())

    def _watch(self) -> None:
        for stream in self._streams:
            stream.watch()

    async def kill(self) -> None:
        """Kill the session's processes and wait, with a bound, until the first of them is reaped."""
        starting = self._starting
        if starting is None:
            return
        done, _ = await asyncio.wait((starting,), timeout=STARTING)
        if not done:  # another process of the container may have stopped it: it is killed when there is something to kill
            starting.add_done_callback(self._kill_late)
            return
        if starting.cancelled() or starting.exception() is not None:
            return
        await self._supervisor.kill_exec(self._id, signal.SIGKILL, tree=True)
        await asyncio.wait((starting.result().exited,), timeout=REAP)

    def _kill_late(self, starting: asyncio.Future[ExecSession]) -> None:
        if starting.cancelled() or starting.exception() is not None:
            return
        task = self._loop.create_task(self._supervisor.kill_exec(self._id, signal.SIGKILL, tree=True), name=f"kill exec {self._id}")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def output(self) -> tuple[bytes, bytes]:
        """stdout and stderr, together small enough for one message."""
        return fit(*(stream.data() for stream in self._streams))

    def close(self) -> None:
        self._watching.cancel()
        for stream in self._streams:
            stream.close()


class _Stream:
    """A pipe whose reading end is ours. Reads on demand, and on its own once watched."""

    __slots__ = ("_chunks", "_loop", "_read_fd", "_size", "_waiter", "_watched", "closed", "write_fd")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_fd, False)
        self._chunks: list[bytes] = []
        self._size = 0
        self._watched = False
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False  # end of file was read

    def close_write(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def watch(self) -> None:
        if not self._watched and not self.closed and self._read_fd >= 0:
            self._watched = True
            self._loop.add_reader(self._read_fd, self._readable)

    def read_all(self) -> None:
        """Everything that is in the pipe now. Bounded by what a pipe can hold: a background child may write for ever."""
        limit = self._size + PIPE
        while not self.closed and self._size < limit and self._read():
            continue

    def _readable(self) -> None:
        for _ in range(_PER_WAKEUP):
            if not self._read():
                return

    def _read(self) -> bool:
        try:
            chunk = os.read(self._read_fd, _READ)
        except BlockingIOError:
            return False
        if not chunk:
            self._ended()
            return False
        room = CAP - self._size
        self._size += len(chunk)
        if room > 0:
            self._chunks.append(chunk if len(chunk) <= room else chunk[:room])
        return True

    def _ended(self) -> None:
        self.closed = True
        if self._watched:
            self._loop.remove_reader(self._read_fd)
            self._watched = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait_closed(self, seconds: float) -> None:
        """Until the last writer is gone, at most ``seconds``."""
        if self.closed or seconds <= 0:
            return
        self._waiter = self._loop.create_future()
        await asyncio.wait((self._waiter,), timeout=seconds)

    def data(self) -> bytes:
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def close(self) -> None:
        self.close_write()
        if self._watched:
            self._loop.remove_reader(self._read_fd)
            self._watched = False
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1


def go_duration(seconds: int) -> str:
    """Whole seconds as Go prints a time.Duration: 90 → ``1m30s``."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
