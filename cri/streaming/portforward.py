"""Port-forward on the wire: each connection is a pair of streams, ``data`` and ``error``, with the port in their headers.

Over WebSocket without the tunnel (the older way, which the Python client uses) ports are named in advance: channel 2n is data and 2n+1
error of the n-th, and the server's first message on each is the port, two bytes, little end first; one connection per port.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from cri.streaming.channel_session import ChannelSession
from cri.streaming.pump import FdSink, FdSource, half_close
from cri.streaming.remotecommand import STREAM_TYPE
from cri.streaming.session import Session, Stream

PROTOCOL: Final = "portforward.k8s.io"
PAIR_TIMEOUT: Final = 30.0  # s for the second stream of a pair
MAX_PAIRS: Final = 1000


class Connector(Protocol):
    """Connections to the ports of one pod."""

    async def connect(self, port: int) -> socket.socket:
        """A connected, non-blocking socket, the caller's. Raises what the client is told."""
        ...

    def close(self) -> None:
        """Give back what it keeps."""
        ...


@dataclass(frozen=True, slots=True)
class Forward:
    """A port-forward that a token stands for."""

    owner: str  # pod id
    ports: tuple[int, ...]
    connector: Callable[[], Connector]
    path: str = "portforward"


def parse_port(text: str) -> int | None:
    """None for what is not a port."""
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        return None
    return int(text) if 0 < int(text) < 1 << 16 else None


@dataclass(slots=True)
class _Pair:
    port: int
    streams: dict[str, Stream] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Forwarder:
    """The connections of one session."""

    def __init__(self, connector: Connector, describe: Callable[[Exception], str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._connector, self._describe = connector, describe
        self._pairs: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def opened(self, stream: Stream) -> bool:
        """Take a SPDY stream; False for one that has no port or is not data or error of a new pair."""
        port, kind = parse_port(stream.headers.get("port", "")), stream.headers.get(STREAM_TYPE, "")
        if port is None or kind not in ("data", "error") or len(self._pairs) + len(self._tasks) >= MAX_PAIRS:
            return False
        # Clients before 1.2 sent no number: they opened error, then data, right after each other.
        number = stream.headers.get("requestid") or str(stream.number if kind == "error" else stream.number - 2)
        pair = self._pairs.get(number)
        if pair is None:
            pair = self._pairs[number] = _Pair(port)
            pair.timer = self._loop.call_later(PAIR_TIMEOUT, self._incomplete, number)
        elif kind in pair.streams or pair.port != port:
            return False
        pair.streams[kind] = stream
        if len(pair.streams) == 2:
            del self._pairs[number]
            if pair.timer is not None:
                pair.timer.cancel()
            self._loop.call_soon(self.start, pair.port, pair.streams["data"], pair.streams["error"])
        return True

    def _incomplete(self, number: str) -> None:
        for stream in self._pairs.pop(number).streams.values():
            stream.reset()

    def start(self, port: int, data: Stream, error: Stream) -> None:
        error.discard()
        task = self._loop.create_task(self._forward(port, data, error), name=f"port-forward {port}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, port: int, data: Stream, error: Stream) -> None:
        try:
            sock = await self._connector.connect(port)
        except Exception as problem:
            error.write(f"error forwarding port {port} to pod: {self._describe(problem)}".encode())
            error.end()
            data.reset()
            return
        try:
            await Relay(sock, data).over
        finally:
            sock.close()
            error.end()
            data.end()

    async def close(self) -> None:
        for pair in self._pairs.values():
            if pair.timer is not None:
                pair.timer.cancel()
        self._pairs.clear()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._connector.close()


class Relay:
    """A socket and a stream joined. ``over`` when both directions have ended, or one of the ends is gone."""

    def __init__(self, sock: socket.socket, stream: Stream) -> None:
        self._sock, self._stream = sock, stream
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over.add_done_callback(self._stop)
        self._sink: FdSink | None = None
        self._source = FdSource(sock.fileno(), stream, self._check)
        self._sink = FdSink(sock.fileno(), stream, self._written)

    def _written(self) -> None:
        half_close(self._sock)
        self._check()

    def _check(self) -> None:
        if self._source.broken:
            self._stream.reset()
        sink_over = self._sink is not None and not self._sink.open
        if not self.over.done() and (self._stream.over or (sink_over and not self._source.open)):
            self.over.set_result(None)

    def _stop(self, _: object) -> None:
        self._source.stop()
        if self._sink is not None:
            self._sink.stop()


def serve_channels(session: ChannelSession, ports: tuple[int, ...], forwarder: Forwarder) -> None:
    """Both channels of each port begin with the port's number; then they are a pair like any other."""
    for index, port in enumerate(ports):
        data, error = session.streams[2 * index], session.streams[2 * index + 1]
        for stream in (data, error):
            stream.write(port.to_bytes(2, "little"))
        forwarder.start(port, data, error)


async def serve(session: Session, forwarder: Forwarder) -> None:
    """Until the client is gone, or this is cancelled because the pod is."""
    try:
        await asyncio.wait((session.lost,))  # not awaited itself: to be cancelled in that would cancel it
    finally:
        await forwarder.close()
        session.close()
