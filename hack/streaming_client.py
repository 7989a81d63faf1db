"""Clients of the streaming server for tests and benchmark: blocking sockets around the machines' client ends, in a network namespace."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection, events

from cri.streaming import spdy
from cri.streaming.spdy_frames import Status
from shim.linux import libc

T = TypeVar("T")


def inside(netns: str, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread that is in a network namespace."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(netns, os.O_RDONLY)
            libc.setns(fd, libc.CLONE_NEWNET)
            os.close(fd)
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    if failure:
        raise failure[0]
    return result[0]


def dial(netns: str, url: str, *, receive_buffer: int = 0) -> socket.socket:
    parts = urlsplit(url)

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(20)
        sock.connect((parts.hostname, parts.port))
        return sock

    return inside(netns, connect)


class Refused(Exception):
    """The answer was no upgrade."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status = status


class Client:
    """What both kinds share: received bytes by stream name, and waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data: dict[str, bytearray] = defaultdict(bytearray)
        self.ended: set[str] = set()
        self.closed = False

    def _receive(self, data: bytes) -> None:
        raise NotImplementedError

    def read(self, seconds: float = 20, size: int = 65536) -> bool:
        """Read once; False at end of file."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(size)
        except ConnectionResetError:
            data = b""
        if not data:
            self.closed = True
            return False
        self._receive(data)
        return True

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"not in {seconds} s; so far {dict(self.data)!r:.300}"
            if not self.read(left):
                assert condition(), f"the connection ended; so far {dict(self.data)!r:.300}"

    def finish(self, seconds: float = 20) -> None:
        """Read to the end of the connection."""
        deadline = time.monotonic() + seconds
        while self.read(max(0.01, deadline - time.monotonic())):
            continue
        self.sock.close()

    def vanish(self) -> None:
        """Go without a word: a reset on the wire."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    @property
    def code(self) -> int:
        """Exit code of the status on the error stream."""
        status = json.loads(self.data["error"])
        if status["status"] == "Success":
            return 0
        assert status["reason"] == "NonZeroExitCode", status
        return int(status["details"]["causes"][0]["message"])


class SpdyClient(Client):
    def __init__(self, netns: str, url: str, *protocols: str, sock: socket.socket | None = None, receive_buffer: int = 0) -> None:
        super().__init__(sock or dial(netns, url, receive_buffer=receive_buffer))
        self._spdy = spdy.Connection(spdy.Role.CLIENT)
        self.names: dict[int, str] = {}
        self.ids: dict[str, int] = {}
        self.replied: set[str] = set()
        self.resets: dict[str, int] = {}
        self.gone_away = False
        self.protocol = ""
        if url:
            self._upgrade(url, protocols)

    def _upgrade(self, url: str, protocols: Sequence[str]) -> None:
        lines = [f"POST {urlsplit(url).path} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: SPDY/3.1", "Content-Length: 0"]
        lines += [f"X-Stream-Protocol-Version: {protocol}" for protocol in protocols]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        head, rest = read_head(self.sock)
        self.protocol = head.get("x-stream-protocol-version", "")
        if rest:
            self._receive(rest)

    def _send(self) -> None:
        self.sock.sendall(self._spdy.take())

    def open(self, name: str, **headers: str) -> str:
        """Ask for a stream, without waiting for the reply. ``name`` is its type, up to a dash."""
        number = self._spdy.open([("streamtype", name.partition("-")[0]), *headers.items()])
        self.names[number], self.ids[name] = name, number
        self._send()
        return name

    def send(self, name: str, data: bytes, *, fin: bool = False) -> None:
        self._spdy.send(self.ids[name], data, fin=fin)
        self._send()

    def end(self, name: str) -> None:
        self.send(name, b"", fin=True)

    def reset(self, name: str) -> None:
        self._spdy.reset(self.ids[name], Status.CANCEL)
        self._send()

    def resize(self, height: int, width: int) -> None:
        self.send("resize", json.dumps({"Width": width, "Height": height}).encode() + b"\n")

    def _receive(self, data: bytes) -> None:
        for event in self._spdy.receive(data):
            match event:
                case spdy.Received():
                    self.data[self.names[event.stream_id]] += event.data
                case spdy.Ended():
                    self.ended.add(self.names[event.stream_id])
                case spdy.Replied():
                    self.replied.add(self.names[event.stream_id])
                case spdy.Reset():
                    self.resets[self.names[event.stream_id]] = event.status
                case spdy.GoneAway():
                    self.gone_away = True


class ChannelClient(Client):
    """Channels of a WebSocket."""

    NAMES = ("stdin", "stdout", "stderr", "error", "resize")

    def __init__(self, netns: str, url: str, protocol: str = "v5.channel.k8s.io") -> None:
        super().__init__(dial(netns, url))
        self._ws, self.code_of_close = open_websocket(self.sock, url, protocol), 0
        self._channel: int | None = None

    def send(self, name: str, data: bytes) -> None:
        self.sock.sendall(self._ws.send(events.BytesMessage(data=bytes((self.NAMES.index(name),)) + data)))

    def end(self, name: str) -> None:
        self.sock.sendall(self._ws.send(events.BytesMessage(data=bytes((255, self.NAMES.index(name))))))

    def resize(self, height: int, width: int) -> None:
        self.send("resize", json.dumps({"Width": width, "Height": height}).encode())

    def _receive(self, data: bytes) -> None:
        self._ws.receive_data(data)
        for event in self._ws.events():
            if isinstance(event, events.BytesMessage):
                piece = bytes(event.data)
                if self._channel is None and piece:
                    self._channel, piece = piece[0], piece[1:]
                if self._channel is not None:
                    self.data[self.NAMES[self._channel]] += piece
                if event.message_finished:
                    self._channel = None
            elif isinstance(event, events.CloseConnection):
                self.code_of_close = int(event.code)
                self.sock.sendall(self._ws.send(event.response()))


class TunnelClient(SpdyClient):
    """SPDY inside a WebSocket."""

    def __init__(self, netns: str, url: str) -> None:
        sock = dial(netns, url)
        self._ws = open_websocket(sock, url, "SPDY/3.1+portforward.k8s.io")
        super().__init__(netns, "", sock=sock)

    def _send(self) -> None:
        self.sock.sendall(self._ws.send(events.BytesMessage(data=self._spdy.take())))

    def _receive(self, data: bytes) -> None:
        self._ws.receive_data(data)
        for event in self._ws.events():
            if isinstance(event, events.BytesMessage):
                super()._receive(bytes(event.data))
            elif isinstance(event, events.CloseConnection):
                self.sock.sendall(self._ws.send(event.response()))


def open_websocket(sock: socket.socket, url: str, protocol: str) -> WSConnection:
    ws = WSConnection(ConnectionType.CLIENT)
    sock.sendall(ws.send(events.Request(host="x", target=urlsplit(url).path, subprotocols=[protocol] if protocol else [])))
    while True:
        data = sock.recv(1)  # so that nothing of what follows is taken
        assert data, "no answer"
        ws.receive_data(data)
        for event in ws.events():
            if isinstance(event, events.AcceptConnection):
                assert (event.subprotocol or "") == protocol
                return ws
            if isinstance(event, events.RejectConnection):
                raise Refused(event.status_code, "")


def read_head(sock: socket.socket) -> tuple[dict[str, str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(4096)
        assert more, f"no answer, but {data!r}"
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    if first.split()[1] != "101":
        raise Refused(int(first.split()[1]), rest.decode(errors="replace"))
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}, rest


@dataclass
class Listener:
    """A server inside a pod's network namespace; each connection is handled by ``serve`` in a thread."""

    netns: str
    serve: Callable[[socket.socket], None]
    address: str = "127.0.0.1"
    port: int = 0
    sock: socket.socket = field(init=False)

    def __enter__(self) -> Listener:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET

        def listen() -> socket.socket:
            sock = socket.socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((self.address, self.port))
            sock.listen(128)
            return sock

        self.sock = inside(self.netns, listen)
        self.port = self.sock.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def echo(sock: socket.socket) -> None:
    """All that comes goes back, then the end."""
    with sock:
        while data := sock.recv(65536):
            sock.sendall(data)
