"""An upgraded connection as numbered streams, whichever protocol carries them: ``spdy_session`` or ``channel_session``.

Back pressure: outwards, ``writable`` follows the transport's buffer (and a peer's windows), and sources stop reading while it is
False. Inwards, what sinks have not taken yet is counted, and above ``UNREAD`` nothing more is read from the peer: as with the
peers' implementations one stream that is not read ends up stopping the others of its connection, but memory is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

UNREAD: Final = 1 << 20  # bytes of one connection that sinks have not taken yet
HIGH_WATER: Final = 256 * 1024  # bytes in the transport's buffer above which sources pause
FLOOD: Final = 4 << 20  # bytes in it that only answers to a peer that does not read them can reach
HEADROOM: Final = 16  # bytes before what a source has read, for the header of a frame
LINGER: Final = 2.0  # s for the peer to close, so that what we sent last is not lost to a reset


class Sink(Protocol):
    """Where a stream's bytes go. ``feed`` may keep some; it tells ``Stream.consumed`` as they leave."""

    def feed(self, data: bytes) -> None: ...

    def finish(self) -> None:
        """No more comes."""
        ...

    def abort(self) -> None:
        """The stream is gone."""
        ...


class Discard:
    """A sink for what nobody wants."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def feed(self, data: bytes) -> None:
        self._stream.consumed(len(data))

    def finish(self) -> None:
        return

    def abort(self) -> None:
        return


class Stream:
    """One direction pair. What arrives before there is a sink waits for it."""

    __slots__ = ("_sink", "_waiting", "ended", "finished", "headers", "number", "over", "session")

    def __init__(self, session: Session, number: int, headers: dict[str, str]) -> None:
        self.session, self.number, self.headers = session, number, headers
        self.ended = False  # the peer sends no more
        self.finished = False  # we send no more
        self.over = False  # reset, or the connection is lost
        self._sink: Sink | None = None
        self._waiting: deque[bytes] = deque()

    def attach(self, sink: Sink) -> None:
        """Begin to pass on what arrives."""
        self._sink = sink
        while self._waiting:
            sink.feed(self._waiting.popleft())
        if self.over:
            sink.abort()
        elif self.ended:
            sink.finish()

    def discard(self) -> None:
        self.attach(Discard(self))

    def write(self, data: bytes) -> None:
        if not self.over and not self.finished:
            self.session.send(self, data)

    def write_behind_headroom(self, buffer: bytearray, length: int) -> bool:
        """Send ``length`` bytes that lie behind ``HEADROOM`` unused ones. True: the buffer may be used again at once."""
        if self.over or self.finished:
            return True
        return self.session.send_in_place(self, buffer, length)

    def end(self) -> None:
        """Send no more."""
        if not self.over and not self.finished:
            self.finished = True
            self.session.send_end(self)

    def reset(self) -> None:
        """Give both directions up."""
        if not self.over:
            self.session.send_reset(self)
            self.on_reset()

    def consumed(self, count: int) -> None:
        self.session.consumed(self, count)

    # what the session tells

    def on_data(self, data: bytes) -> None:
        self.session.unread += len(data)
        if self._sink is None:
            self._waiting.append(data)
        else:
            self._sink.feed(data)

    def on_end(self) -> None:
        if not self.ended:
            self.ended = True
            if self._sink is not None:
                self._sink.finish()

    def on_reset(self) -> None:
        if not self.over:
            self.over = True
            if self._sink is not None:
                self._sink.abort()


class Source(Protocol):
    """Something that writes to streams and can be told to wait."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Session:
    """What both kinds have in common. ``lost`` is done when the connection is gone."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        transport.set_write_buffer_limits(HIGH_WATER, HIGH_WATER // 4)
        self.streams: dict[int, Stream] = {}
        self.sources: set[Source] = set()
        self.writable = True
        self.unread = 0
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.active = self._loop.time()
        self._reading = True
        self._closing = False

    # ---- the transport's side

    def received(self, data: bytes) -> None:
        self.active = self._loop.time()
        if self._closing:
            self._last(data)
        else:
            self._receive(data)
        if not self.lost.done() and self._transport.get_write_buffer_size() > FLOOD:
            self.abort()
        if self.unread > UNREAD and self._reading and not self._closing:
            self._reading = False
            self._transport.pause_reading()

    def connection_lost(self) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        for stream in list(self.streams.values()):
            stream.on_reset()
        self.streams.clear()

    def pause_writing(self) -> None:
        self.writable = False
        for source in list(self.sources):
            source.pause()

    def resume_writing(self) -> None:
        self.writable = True
        for source in list(self.sources):
            source.resume()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._transport.abort()

    def close(self) -> None:
        """Say goodbye and close when the peer has, or a moment later. What was written is sent first."""
        if self._closing:
            return
        self._farewell()
        self._closing = True
        for stream in list(self.streams.values()):
            stream.on_reset()
        self.unread = 0
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self._linger()

    def _linger(self) -> None:
        timer = self._loop.call_later(LINGER, self._end)
        self.lost.add_done_callback(lambda _: timer.cancel())

    def _end(self) -> None:
        """A peer that still has something to read may take as long as the idle limit allows; one that has read all has had its time."""
        if self._transport.get_write_buffer_size():
            self._linger()
        else:
            self._transport.close()

    def consumed(self, stream: Stream, count: int) -> None:
        """Bytes of a stream have left our memory."""
        if self._closing:
            return
        self.unread -= count
        if not self._reading and self.unread < UNREAD // 2:
            self._reading = True
            self._transport.resume_reading()

    def _write(self, data: bytes) -> None:
        if data and not self.lost.done():
            self.active = self._loop.time()
            self._transport.write(data)

    # ---- the protocol's side

    def _receive(self, data: bytes) -> None:
        raise NotImplementedError

    def _last(self, data: bytes) -> None:
        """What comes after our goodbye."""

    def _farewell(self) -> None:
        raise NotImplementedError

    def send(self, stream: Stream, data: bytes) -> None:
        raise NotImplementedError

    def send_in_place(self, stream: Stream, buffer: bytearray, length: int) -> bool:
        """See ``Stream.write_behind_headroom``. With a copy, where the protocol has no better way."""
        self.send(stream, bytes(memoryview(buffer)[HEADROOM : HEADROOM + length]))
        return True

    def send_end(self, stream: Stream) -> None:
        raise NotImplementedError

    def send_reset(self, stream: Stream) -> None:
        raise NotImplementedError

    def waits(self, stream: Stream) -> bool:
        """Whether a source should hold back what it has for this stream."""
        return not self.writable
