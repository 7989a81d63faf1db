"""Streams of a SPDY connection, over TCP or through a WebSocket tunnel: the I/O around the machine of ``spdy``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cri.streaming import spdy, websocket
from cri.streaming.session import HEADROOM, Session, Stream
from cri.streaming.spdy_frames import ProtocolError, Status


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
            try:
                self._transport.write_eof()
            except OSError:  # the peer has reset the connection, which the loop is about to find out
                self._transport.abort()

    def _last(self, data: bytes) -> None:
        if self._tunnel is not None and any(isinstance(piece, websocket.Closed) for piece in self._tunnel.receive(data)):
            self._transport.close()
