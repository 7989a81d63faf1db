"""stdio's loop: containers' output ends to CRI logs, with fairness, bounded memory and no wake-up while nobody writes.

The supervisor asks over a SEQPACKET pair: ``add``, ``attach``, ``close_stdin``, ``drain``, ``reopen``, ``remove``, ``stop``
(``{"n", "op", "id", …}``, answered by ``{"n", "ok"|"error"}``). When it dies, stdio goes on: its successor's stdio takes over with
SIGTERM through the lock file.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shim import wire
from shim.errors import Failure
from shim.stdio.attach import Client, Clients
from shim.stdio.framing import Clock, Framer
from shim.stdio.lock import take_over
from shim.stdio.logfile import LogFile

READ = 128 * 1024  # bytes per read: stays in the second-level cache, so the copies of framing are cheap; what a SIGKILL can cost
_BUSY = 0.005  # s between two rounds below which a stream counts as busy
_PAUSE = 0.002  # s for which a busy writer fills its FIFO before it is read again: few large reads instead of many small ones
_RETRY = 0.25  # s between two tries to write after an error
_RECENT = 60.0  # s after a failure within which another one finds no patience
_PATIENCE = 5.0  # s of failing writes after which output is dropped, so that a full disk does not stop containers for good

Streams = {"stdout": "stdout", "stderr": "stderr", "console": "stdout"}  # name of an end: stream in the log


@dataclass(slots=True, eq=False)
class Sink:
    """One container's log and what could not be written to it yet."""

    id: str
    log: LogFile
    streams: list[Stream] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)  # stdin's end, held so that it has no end while a supervisor is replaced
    waiting: bytes = b""
    failing_since: float = 0.0  # monotonic; 0: writes succeed
    last_failure: float = -_RECENT  # monotonic
    dropped: int = 0  # records


@dataclass(slots=True, eq=False)
class Stream:
    """One output end. ``fd`` is -1 after end of file."""

    sink: Sink
    fd: int
    framer: Framer
    capacity: int  # bytes of the FIFO, 0 for a console
    name: str  # of the stream in the log
    armed: bool = False
    clients: list[Client] = field(default_factory=list)


class Stdio:
    """The table and its loop. ``control`` is the supervisor's end of the pair."""

    def __init__(self, control: wire.Connection) -> None:
        self._control: wire.Connection | None = control
        self._sinks: dict[str, Sink] = {}
        self._by_fd: dict[int, Stream] = {}
        self._data = select.epoll()
        self._outer = select.epoll()
        self._control_poll = select.poll()
        self._outer.register(control.fileno(), select.EPOLLIN)
        self._outer.register(self._data.fileno(), select.EPOLLIN)
        self._control_poll.register(control.fileno(), select.POLLIN)
        self._buffer = memoryview(bytearray(READ))
        self._clock = Clock()
        self._clients = Clients(self._outer)
        self._failing: set[Sink] = set()  # those whose records are held back
        self._next_retry = 0.0
        self._operations: dict[str, Callable[[dict[str, Any], tuple[int, ...]], dict[str, Any]]] = {
            "add": self._add,
            "attach": self._attach,
            "close_stdin": self._close_stdin,
            "drain": self._drain,
            "reopen": self._reopen,
            "remove": self._remove,
        }
        self.stopping = False

    def wake_on(self, fd: int) -> None:
        """Leave the wait when ``fd`` is readable: a signal handler alone does not end epoll_wait (PEP 475)."""
        self._outer.register(fd, select.EPOLLIN)

    def run(self) -> None:
        """Until ``stop`` or SIGTERM; then every unfinished line goes out as P."""
        last = 0.0
        while not self.stopping:
            if self._failing:
                self._retry()
            for fd, _ in self._outer.poll(_RETRY if self._failing or self._clients.waiting else None):
                self._clients.ready(fd)
            if self._clients.waiting:
                self._clients.expire()
            self._serve()
            full, read = self._round()
            now = time.monotonic()
            if read and not full and now - last < _BUSY:
                self._pause()
            last = now
        self._interrupt()

    def _pause(self) -> None:
        """Let busy writers get ahead; requests are served meanwhile."""
        if self._control is None:
            time.sleep(_PAUSE)
        elif self._control_poll.poll(_PAUSE * 1000):
            self._serve()

    # ---- data

    def _round(self) -> tuple[bool, bool]:
        """One read of every stream that has bytes: (some FIFO was nearly full, anything was read)."""
        full = read = False
        for fd, _ in self._data.poll(0):
            stream = self._by_fd.get(fd)
            if stream is None or not stream.armed:
                continue
            count = self._pump(stream)
            read = read or count > 0
            full = full or count * 2 >= min(stream.capacity or READ, READ)
        return full, read

    def _pump(self, stream: Stream) -> int:
        """Read once and log it; bytes read, 0 at end of file or when nothing is there."""
        try:
            count = os.readv(stream.fd, (self._buffer,))
        except BlockingIOError:
            return 0
        except OSError:  # EIO: nobody has the terminal open any more
            count = 0
        stamp = self._clock.now()
        if count == 0:
            self._write(stream.sink, stream.framer.finish(stamp))
            self._close_stream(stream)
            return 0
        data = bytes(self._buffer[:count])
        self._write(stream.sink, stream.framer.feed(data, stamp))
        if stream.clients:
            self._tee(stream, data)
        return count

    def _write(self, sink: Sink, records: bytes) -> None:
        """Append; on an error keep the records and stop reading (the FIFO is the buffer), past ``_PATIENCE`` drop and count them."""
        if not records:
            return
        if sink in self._failing:
            sink.waiting += records
            return
        try:
            sink.log.append(records)
        except OSError as error:
            now = time.monotonic()
            recent, sink.last_failure = now - sink.last_failure < _RECENT, now
            if sink.failing_since:
                sink.dropped += records.count(b"\n")
                return
            sink.failing_since = now
            if recent:  # a disk that is full again and again must not hold the container up each time
                sink.dropped += records.count(b"\n")
                self._event(sink, error)
                return
            sink.waiting = records
            self._failing.add(sink)
            for stream in sink.streams:
                self._disarm(stream)
            self._event(sink, error)
        else:
            if sink.failing_since:
                self._recovered(sink)

    def _retry(self) -> None:
        """Try logs that could not be written again; when patience is over, read on and drop."""
        now = time.monotonic()
        if now < self._next_retry:
            return
        self._next_retry = now + _RETRY
        for sink in list(self._failing):
            try:
                sink.log.append(sink.waiting)
            except OSError:
                if now - sink.failing_since <= _PATIENCE:
                    continue
                sink.dropped += sink.waiting.count(b"\n")
            else:
                self._recovered(sink)
            sink.waiting = b""
            self._failing.discard(sink)
            for stream in sink.streams:
                self._arm(stream)

    def _recovered(self, sink: Sink) -> None:
        sink.failing_since = 0.0
        self._event(sink, None)
        sink.dropped = 0

    def _tee(self, stream: Stream, data: bytes) -> None:
        """Copy to attached clients; while one of them holds bytes back, the FIFO is the buffer."""
        for client in stream.clients:
            self._clients.write(client, data)
        stream.clients = [client for client in stream.clients if client.fd >= 0]
        if any(client.held for client in stream.clients):
            self._disarm(stream)

    def _arm(self, stream: Stream) -> None:
        if stream.sink in self._failing or any(client.held for client in stream.clients):
            return
        if not stream.armed and stream.fd >= 0:
            self._data.register(stream.fd, select.EPOLLIN)
            stream.armed = True

    def _disarm(self, stream: Stream) -> None:
        if stream.armed:
            self._data.unregister(stream.fd)
            stream.armed = False

    def _close_stream(self, stream: Stream) -> None:
        if stream.fd >= 0:
            self._disarm(stream)
            del self._by_fd[stream.fd]
            os.close(stream.fd)
            stream.fd = -1
            for client in stream.clients:
                self._clients.finish(client)
            stream.clients.clear()

    # ---- requests

    def _serve(self) -> None:
        """Answer what the supervisor has asked; its death is no reason to stop."""
        while self._control is not None:
            try:
                self._control.flush()
                message = self._control.receive()
                if message is None:
                    return
                self._answer(self._control, message)
            except wire.Closed:
                self._outer.unregister(self._control.fileno())
                self._control.close()
                self._control = None

    def _answer(self, control: wire.Connection, message: wire.Message) -> None:
        body, fds = message
        name = body["op"]
        reply: dict[str, Any]
        if name == "stop":
            self.stopping = True
            reply = {"ok": {}}
        else:
            try:
                reply = {"ok": self._operations[name](body, fds)}
            except Failure as failure:
                reply = {"error": failure.to_json()}
            except OSError as error:
                reply = {"error": Failure.wrap("stdio", str(name), error).to_json()}
        control.send({"n": body["n"], **reply})

    def _add(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        names = dict(zip(body["names"], fds, strict=True))
        known = self._sinks.get(body["id"])
        try:
            sink = known or Sink(body["id"], LogFile(body["log_path"]))
        except Failure:
            for fd in fds:
                os.close(fd)
            raise
        self._sinks[sink.id] = sink
        for name, fd in names.items():
            os.set_blocking(fd, False)
            if name == "stdin":
                sink.inputs[name] = fd
                continue
            capacity = 0 if name == "console" else fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            stream = Stream(sink, fd, Framer(Streams[name], crlf=name == "console"), capacity, Streams[name])
            sink.streams.append(stream)
            self._by_fd[fd] = stream
            self._arm(stream)
        return {}

    def _attach(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        """Copy what comes from now on to pipes, which are taken over; to those of an output that has ended, end of file."""
        sink = self._sinks.get(body["id"])
        streams = {stream.name: stream for stream in sink.streams} if sink is not None else {}
        for name, fd in zip(body["names"], fds, strict=True):
            stream = streams.get(name)
            if stream is None or stream.fd < 0:
                os.close(fd)
                continue
            stream.clients = [client for client in stream.clients if client.fd >= 0]
            stream.clients.append(self._clients.add(fd, partial(self._arm, stream)))
        return {}

    def _close_stdin(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        sink = self._sinks.get(body["id"])
        if sink is not None and "stdin" in sink.inputs:
            os.close(sink.inputs.pop("stdin"))
        return {}

    def _drain(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        """Log what is in the FIFOs now, and the last line although no newline came: the container's init has exited."""
        sink = self._sinks.get(body["id"])
        if sink is None:
            return {"complete": True}
        for stream in list(sink.streams):
            left = self._available(stream)
            while stream.fd >= 0 and sink not in self._failing:
                count = self._pump(stream)
                left -= count
                if count == 0 or left < 0:  # other processes may write for ever; what was there at the exit is read
                    break
            self._write(sink, stream.framer.finish(self._clock.now()))
        return {"complete": sink not in self._failing}

    @staticmethod
    def _available(stream: Stream) -> int:
        if stream.fd < 0:
            return 0
        count = bytearray(4)
        fcntl.ioctl(stream.fd, termios.FIONREAD, count)
        return int.from_bytes(count, "little")

    def _reopen(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        sink = self._sinks.get(body["id"])
        if sink is None:
            raise Failure("log", "reopen", message="the container has no log")
        sink.log.reopen()
        return {}

    def _remove(self, body: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        sink = self._sinks.pop(body["id"], None)
        if sink is not None:
            for stream in sink.streams:
                self._close_stream(stream)
            for fd in sink.inputs.values():
                os.close(fd)
            self._failing.discard(sink)
            try:
                if body.get("unused"):
                    sink.log.discard_empty()
            finally:
                sink.log.close()
        return {}

    # ---- ends

    def _event(self, sink: Sink, error: OSError | None) -> None:
        """Tell the supervisor that a log cannot be written (``errno``), or can again (None) and how many records are lost."""
        if self._control is not None:
            number = None if error is None else error.errno
            self._control.send({"event": "log.error", "id": sink.id, "path": sink.log.path, "errno": number, "dropped": sink.dropped})

    def _interrupt(self) -> None:
        stamp = self._clock.now()
        for sink in self._sinks.values():
            for stream in sink.streams:
                self._write(sink, stream.framer.interrupt(stamp))
        if self._control is not None:
            self._control.flush()


def serve(control: wire.Connection, state: int) -> None:
    """stdio's whole life, in a child that is already clean. ``state`` is the state directory's fd."""
    lock = take_over(state)
    stdio = Stdio(control)

    def stop(number: int, frame: object) -> None:
        stdio.stopping = True

    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stdio.wake_on(wake_read)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file size limit is an error of one write, not our end
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    gc.disable()  # nothing here makes cycles, and a collection would touch every page shared with the supervisor
    stdio.run()
    os.close(lock)
