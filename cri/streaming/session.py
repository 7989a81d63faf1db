"""An upgraded connection as numbered streams, whichever protocol carries them; the I/O around the machines of ``spdy`` and ``websocket``.

Back pressure: outwards, ``writable`` follows the transport's buffer (and a peer's windows), and sources stop reading while it is
False. Inwards, what sinks have not taken yet is counted, and above ``UNREAD`` nothing more is read from the peer: as with the
peers' implementations one stream that is not read ends up stopping the others of its connection, but memory is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from cri.streaming import spdy, websocket
from cri.streaming.spdy_frames import ProtocolError, Status

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


class SpdySession(Session):
    """Streams that the peer opens; ``on_stream`` says whether one is wanted."""

    def __init__(self, transport: asyncio.Transport, on_stream: Callable[[Stream], bool], tunnel: websocket.Tunnel | None = None) -> None:
        super().__init__(transport)
        self._spdy = spdy.Connection(spdy.Role.SERVER)
        self._on_stream, self._tunnel = on_stream, tunnel

    def _receive(self, data: bytes) -> None:
        if self._tunnel is None:
            self._feed(data)
        else:
            for piece in self._tunnel.receive(data):
                if isinstance(piece, websocket.Closed):
                    self._flush()
                    self._transport.close()
                    return
                self._feed(piece)
        self._flush()

    def _feed(self, data: bytes) -> None:
        try:
            for event in self._spdy.receive(data):
                self._event(event)
        except ProtocolError:
            self._flush()
            self._transport.close()

    def _event(self, event: spdy.Event) -> None:
        match event:
            case spdy.Received():
                stream_ = self.streams.get(event.stream_id)
                if stream_ is not None:  # a handler of an event that came with this one may have reset it
                    stream_.on_data(event.data)
            case spdy.Opened():
                stream = Stream(self, event.stream_id, dict(event.headers))
                if self._on_stream(stream):
                    self.streams[stream.number] = stream
                    self._spdy.reply(stream.number)
                else:
                    self._spdy.reset(stream.number, Status.REFUSED_STREAM)
            case spdy.Ended():
                stream_ = self.streams.get(event.stream_id)
                if stream_ is not None:
                    stream_.on_end()
                    self._forget(event.stream_id)
            case spdy.Reset():
                stream_ = self.streams.pop(event.stream_id, None)
                if stream_ is not None:
                    stream_.on_reset()
            case spdy.Writable():
                self.resume_writing()
            case spdy.GoneAway() | spdy.Replied() | spdy.Pong():
                return

    def _forget(self, stream_id: int) -> None:
        if self._spdy.state(stream_id) is spdy.State.CLOSED:
            self.streams.pop(stream_id, None)

    def _flush(self) -> None:
        data = self._spdy.take()
        if self._tunnel is not None:
            if data:
                self._tunnel.send(data)
            data = self._tunnel.take()
        self._write(data)

    def send(self, stream: Stream, data: bytes) -> None:
        self._spdy.send(stream.number, data)
        self._flush()

    def send_in_place(self, stream: Stream, buffer: bytearray, length: int) -> bool:
        head = self._spdy.head(stream.number, length) if self._tunnel is None and not self.lost.done() else None
        if head is None:
            return super().send_in_place(stream, buffer, length)
        start = HEADROOM - len(head)
        buffer[start:HEADROOM] = head
        self.active = self._loop.time()
        self._transport.write(memoryview(buffer)[start : HEADROOM + length])
        # What the kernel did not take is kept, since Python 3.12 without a copy: the buffer is the transport's then.
        return self._transport.get_write_buffer_size() == 0

    def send_end(self, stream: Stream) -> None:
        self._spdy.send(stream.number, b"", fin=True)
        self._forget(stream.number)
        self._flush()

    def send_reset(self, stream: Stream) -> None:
        self._spdy.reset(stream.number)
        self.streams.pop(stream.number, None)
        self._flush()

    def waits(self, stream: Stream) -> bool:
        return not self.writable or self._spdy.held(stream.number) > 0

    def consumed(self, stream: Stream, count: int) -> None:
        super().consumed(stream, count)
        if not self._closing:
            self._spdy.consumed(stream.number, count)
            self._flush()

    def _farewell(self) -> None:
        """As the peers close: streams that the other side has not ended are reset, then GOAWAY."""
        for stream_id in self._spdy.streams:
            if self._spdy.state(stream_id) is not spdy.State.LOCAL_ENDED:  # of those, we have said all and the peer knows
                self._spdy.reset(stream_id)
        self._spdy.close()
        if self._tunnel is not None:
            self._tunnel.send(self._spdy.take())
            self._tunnel.close()
        self._flush()
        if self._tunnel is None and self._transport.can_write_eof() and not self.lost.done():
            self._transport.write_eof()

    def _last(self, data: bytes) -> None:
        if self._tunnel is not None and any(isinstance(piece, websocket.Closed) for piece in self._tunnel.receive(data)):
            self._transport.close()


class ChannelSession(Session):
    """Streams that exist from the beginning, numbered by what they are. What comes on other channels is ignored."""

    def __init__(self, transport: asyncio.Transport, dialect: websocket.Dialect, numbers: list[int]) -> None:
        super().__init__(transport)
        self._channels = websocket.Channels(dialect)
        self.streams.update((number, Stream(self, number, {})) for number in numbers)

    def _receive(self, data: bytes) -> None:
        closed = False
        for event in self._channels.receive(data):
            match event:
                case websocket.Received():
                    stream = self.streams.get(event.channel)
                    if stream is not None and not stream.ended:
                        stream.on_data(event.data)
                case websocket.Ended():
                    stream = self.streams.get(event.channel)
                    if stream is not None:
                        stream.on_end()
                case websocket.Closed():
                    closed = True
        self._write(self._channels.take())
        if closed:
            self._transport.close()

    def send(self, stream: Stream, data: bytes) -> None:
        self._channels.send(stream.number, data)
        self._write(self._channels.take())

    def send_end(self, stream: Stream) -> None:
        return  # the end of the connection says it

    def send_reset(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)

    def _farewell(self) -> None:
        self._channels.close()
        self._write(self._channels.take())

    def _last(self, data: bytes) -> None:
        if any(isinstance(event, websocket.Closed) for event in self._channels.receive(data)):
            self._transport.close()
