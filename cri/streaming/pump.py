"""Between file descriptors (pipes, terminals, sockets) and streams, driven by the event loop's readiness and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from cri.streaming.session import HEADROOM, Stream

READ: Final = 128 * 1024  # bytes at a time
_PER_WAKEUP: Final = 4  # reads: other sessions want the loop, too
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT})


class FdSource:
    """Reads a descriptor into a stream until end of file, then ends the stream and calls ``done``. The descriptor stays the caller's."""

    def __init__(self, fd: int, stream: Stream, done: Callable[[], None] = lambda: None, *, end: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd, self._stream, self._done, self._end = fd, stream, done, end
        self._buffer = bytearray(HEADROOM + READ)
        self._watching = False
        self.open = True
        self.over: asyncio.Future[None] = self._loop.create_future()
        self.broken = False  # it ended with an error: the other side of a socket was rude
        self.active = self._loop.time()  # when it last got something, or was held up
        stream.session.sources.add(self)
        self.resume()

    def pause(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        if self.open and not self._watching and not self._stream.session.waits(self._stream):
            self._watching = True
            self.active = self._loop.time()
            self._loop.add_reader(self._fd, self._readable)

    @property
    def held_up(self) -> bool:
        """True while the peer does not read."""
        return self.open and not self._watching

    def _readable(self) -> None:
        for _ in range(_PER_WAKEUP):
            try:
                count = os.readv(self._fd, (memoryview(self._buffer)[HEADROOM:],))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                count = 0  # EIO: the terminal's last process is gone
                self.broken = error.errno == errno.ECONNRESET
            if not count or self._stream.over:
                self.stop()
                return
            self.active = self._loop.time()
            if not self._stream.write_behind_headroom(self._buffer, count):
                self._buffer = bytearray(HEADROOM + READ)
            if self._stream.session.waits(self._stream):
                self.pause()
                return
            if count < READ:
                return

    def stop(self) -> None:
        """End the stream and read no more."""
        if self.open:
            self.pause()
            self.open = False
            self._stream.session.sources.discard(self)
            if self._end:
                self._stream.end()
            self.over.set_result(None)
            self._done()


class FdSink:
    """Writes a stream into a descriptor; ``ended`` is called once, when all is written or there is nobody to read it."""

    def __init__(self, fd: int, stream: Stream, ended: Callable[[], None] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd, self._stream, self._ended = fd, stream, ended
        self._backlog: deque[memoryview] = deque()
        self._watching = self._finishing = False
        self.open = True
        stream.attach(self)

    def feed(self, data: bytes) -> None:
        if not self.open:
            self._stream.consumed(len(data))
            return
        self._backlog.append(memoryview(data))
        if not self._watching:
            self._write()

    def finish(self) -> None:
        self._finishing = True
        if not self._backlog:
            self.stop()

    def abort(self) -> None:
        """What has arrived is still written: a client may send its last words and go."""
        self.finish()

    def _write(self) -> None:
        while self._backlog:
            piece = self._backlog[0]
            try:
                count = os.write(self._fd, piece)
            except BlockingIOError:
                self._watch(True)
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                self.stop()
                return
            if count == len(piece):
                self._backlog.popleft()
            else:
                self._backlog[0] = piece[count:]
            self._stream.consumed(count)
        self._watch(False)
        if self._finishing:
            self.stop()

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watching:
            self._watching = wanted
            if wanted:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)

    def stop(self) -> None:
        """Write no more; what has not been written is dropped."""
        if not self.open:
            return
        self.open = False
        self._watch(False)
        left = sum(map(len, self._backlog))
        self._backlog.clear()
        if left:
            self._stream.consumed(left)
        self._ended()


def half_close(sock: socket.socket) -> None:
    """End our direction of a TCP connection; one that is gone is fine."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno not in _GONE:
            raise
