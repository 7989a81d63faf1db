"""The daemon's end of the unpack helper: starts it, feeds archives to it through pipes, waits for what it made of them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cri
from shim.client import read_only_image
from shim.errors import Failure

_PIPE = 1 << 20
_PATIENCE = 5.0  # seconds
_DRAIN = 1.0  # seconds for what is left in a pipe
_IDLE = 20.0  # seconds that a helper without work is kept: it costs 50 ms of CPU to start and 9 MiB to keep
_ROOT = str(Path(cri.__file__).resolve().parent.parent)
_CODE = "import sys; sys.path.append(sys.argv[1]); from cri.images.unpack_worker import main; main(int(sys.argv[2]))"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one layer may unpack to. The ratio guards against bombs, once more than ``free`` bytes are out."""

    entries: int = 5_000_000
    size: int = 512 << 30
    ratio: int = 200
    free: int = 1 << 30

    def bytes_for(self, compressed: int) -> int:
        return min(self.size, self.free + self.ratio * compressed)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer as it now lies in its directory."""

    diff_id: str
    archive: int  # bytes of the uncompressed archive
    bytes: int  # on disk
    inodes: int
    entries: int
    implicit: int = 0  # directories that still have to take after the layers below
    dropped: int = 0  # extended attributes left out


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that has the first ``size`` bytes of an archive and takes the rest."""

    fd: int
    size: int


class Feed:
    """The writing end of one archive's pipe. ``done`` becomes the Unpacked, or a Failure."""

    def __init__(self, fd: int, number: int, done: asyncio.Future[Unpacked]) -> None:
        self._fd, self.number, self.done = fd, number, done

    async def write(self, chunk: bytes) -> bool:
        """Pass bytes on, waiting while the pipe is full. False: the reader has given up, and ``done`` says why."""
        view = memoryview(chunk)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._writable()
            except BrokenPipeError:
                return False
        return True

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_writer(self._fd, wake)
        try:
            await ready
        finally:
            loop.remove_writer(self._fd)

    def close(self) -> None:
        """End of the archive; also how an unpacking is abandoned."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Unpacker:
    """One helper process. Close it; a daemon that dies takes it along."""

    @property
    def alive(self) -> bool:
        return not self._ended

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._process, self._channel = process, channel
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = 0
        self._ended = False
        asyncio.get_running_loop().add_reader(channel.fileno(), self._readable)

    @classmethod
    async def start(cls) -> Unpacker:
        """Exec the helper: isolated from PYTHON* variables and the working directory, nothing in its environment, the interpreter
        from a read-only clone that nothing an archive does could write to."""
        image = read_only_image(Path(sys.executable))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-c",
                _CODE,
                _ROOT,
                str(theirs.fileno()),
                executable=f"/proc/self/fd/{image}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                cwd="/",
                env={},
                pass_fds=(theirs.fileno(), image),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(image)
        ours.setblocking(False)
        return cls(process, ours)

    async def unpack(self, directory: Path, compressed: int, algorithm: str, limits: Limits, kept: Kept | None = None) -> Feed:
        """Begin to apply an archive of ``compressed`` bytes to the empty ``directory``. What ``kept`` has of it already is read from
        there, and what is fed is added to it."""
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            with suppress(PermissionError):  # beyond the user's pipe allowance: the default 64 KiB works as well
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE)
            os.set_blocking(write, False)
            request: dict[str, Any] = {
                "op": "unpack",
                "entries": limits.entries,
                "size": limits.bytes_for(compressed),
                "algorithm": algorithm,
            }
            request["have"] = kept.size if kept else 0
            number, answer = await self._send(request, (directory,), (read, kept.fd) if kept else (read,))
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)

        async def finish() -> Unpacked:
            return Unpacked(**await answer)

        done = asyncio.ensure_future(finish())
        done.add_done_callback(lambda f: f.cancelled() or f.exception())  # an abandoned archive's error is nobody's
        return Feed(write, number, done)

    async def abandon(self, feed: Feed) -> None:
        """End an unpacking that is not wanted: it keeps what it was fed, and is killed if that takes long."""
        feed.close()
        done, _ = await asyncio.wait([feed.done], timeout=_DRAIN)
        if not done and self.alive:
            with suppress(Failure):
                await self._send({"op": "stop", "layer": feed.number}, ())
            await asyncio.wait([feed.done], timeout=_PATIENCE)
        feed.done.cancel()

    async def settle(self, layer: int, directory: Path, snapshots: Path, below: Sequence[str]) -> None:
        """Let implied directories of the layer unpacked as number ``layer`` take after ``below``, topmost first."""
        _, answer = await self._send({"op": "settle", "layer": layer, "below": list(below)}, (directory, snapshots))
        await answer

    async def sync(self, directory: Path) -> None:
        """syncfs(2), in a process that may block."""
        _, answer = await self._send({"op": "sync"}, (directory,))
        await answer

    async def close(self) -> None:
        """End the helper and its children, and reap it."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._fail("unpack helper was stopped")
        with suppress(ProcessLookupError):
            self._process.kill()
        with suppress(TimeoutError):  # a process stuck in the kernel dies when that lets go of it, and asyncio reaps it then
            await asyncio.wait_for(self._process.wait(), _PATIENCE)

    async def _send(
        self, request: dict[str, Any], directories: Sequence[Path], fds: Sequence[int] = ()
    ) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        loop = asyncio.get_running_loop()
        self._numbers += 1
        number = self._numbers
        message = json.dumps({"id": number, **request}).encode()
        opened: list[int] = []
        try:
            for directory in directories:
                opened.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for _ in range(3000):
                try:
                    socket.send_fds(self._channel, [message], [*opened, *fds])
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.01)  # the helper is a few messages behind; there are as many as layers
            else:
                raise Failure("unpack", "send", message="helper does not read its socket")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Failure("unpack", "send", message="helper has ended") from error
        finally:
            for fd in opened:
                os.close(fd)
        self._waiting[number] = loop.create_future()
        return number, self._waiting[number]

    def _readable(self) -> None:
        try:
            message = self._channel.recv(1 << 17)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._fail("unpack helper ended early")
            return
        answer = json.loads(message)
        future = self._waiting.pop(answer["id"], None)
        if future is None or future.done():
            return
        if "ok" in answer:
            future.set_result(answer["ok"])
        else:
            error = answer["error"]
            future.set_exception(
                Failure("unpack layer", errno=error.get("errno"), path=error.get("path", ""), message=error.get("message", ""))
            )

    def _fail(self, why: str) -> None:
        self._ended = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Failure("unpack layer", message=why))
        self._waiting.clear()


class Helper:
    """The helper that all pulls share: started for the first, ended when none has needed it for a while."""

    def __init__(self) -> None:
        self._starting: asyncio.Task[Unpacker] | None = None
        self._users = 0
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to start it, if it is not there: a pull calls this before it knows whether it will need it."""
        ready = self._starting
        if ready is None or (ready.done() and (ready.cancelled() or ready.exception() or not ready.result().alive)):
            self._retire()
            self._starting = asyncio.create_task(Unpacker.start())
            self._starting.add_done_callback(lambda t: t.cancelled() or t.exception())  # said by ``lease``
        self._rest()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Unpacker]:
        """The running helper, for as long as the context lasts."""
        self._users += 1
        try:
            self.start()
            assert self._starting is not None
            yield await asyncio.shield(self._starting)
        finally:
            self._users -= 1
            self._rest()

    async def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._retire()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not self._users:
            self._idle = asyncio.get_running_loop().call_later(_IDLE, self._retire)

    def _retire(self) -> None:
        if self._starting is not None:
            task = asyncio.create_task(_end(self._starting))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._starting = None


async def _end(starting: asyncio.Task[Unpacker]) -> None:
    with suppress(Failure, OSError):  # one that did not start has nothing to end; who needed it was told
        await (await starting).close()
