"""Channels of a WebSocket as streams: the I/O around the machine of ``websocket``."""

from __future__ import annotations

import asyncio

from cri.streaming import websocket
from cri.streaming.session import Session, Stream


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
