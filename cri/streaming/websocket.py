"""WebSocket as Kubernetes uses it, on wsproto's machine: numbered channels in one connection (``*.channel.k8s.io``), or a tunnel for SPDY.

A message's first byte (first character, ``0`` + channel, in the base64 kinds) is the channel. v5 adds message ``255, channel``:
the client will send no more on that one. Servers never send it: kubectl takes it for an unknown channel.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from wsproto import events
from wsproto.connection import Connection, ConnectionType
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError, generate_accept_token

from cri.streaming.http1 import BadRequest, Request

MAX_TEXT: Final = 1 << 20  # characters of a base64 message, which can only be decoded whole
END_OF_CHANNEL: Final = 255
TUNNEL_PREFIX: Final = "SPDY/3.1+"


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a subprotocol of ``channel.k8s.io`` means."""

    binary: bool = True
    ends: bool = False  # has the end-of-channel message
    status: bool = False  # the error channel carries metav1.Status, not text


#: "" is a client that names none.
DIALECTS: Final = {
    "": Dialect(),
    "channel.k8s.io": Dialect(),
    "base64.channel.k8s.io": Dialect(binary=False),
    "v4.channel.k8s.io": Dialect(status=True),
    "v4.base64.channel.k8s.io": Dialect(binary=False, status=True),
    "v5.channel.k8s.io": Dialect(ends=True, status=True),
}


@dataclass(slots=True)
class Received:
    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    channel: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over: nothing more comes."""


Event: TypeAlias = Received | Ended | Closed


def accept_headers(request: Request, subprotocol: str) -> list[tuple[str, str]]:
    """Headers of the 101 answer (RFC 6455, 4.2.2). Raises BadRequest."""
    if request.method != "GET":
        raise BadRequest(405, "a WebSocket begins with GET")
    if request.first("sec-websocket-version") != "13":
        raise BadRequest(400, "unknown version of WebSocket", [("Sec-WebSocket-Version", "13")])
    key = request.first("sec-websocket-key")
    try:
        if len(base64.b64decode(key, validate=True)) != 16:
            raise BadRequest(400, "Sec-WebSocket-Key is not 16 bytes")
    except binascii.Error:
        raise BadRequest(400, "Sec-WebSocket-Key is not base64") from None
    headers = [("Sec-WebSocket-Accept", generate_accept_token(key.encode()).decode())]
    return [*headers, ("Sec-WebSocket-Protocol", subprotocol)] if subprotocol else headers


class Frames:
    """The part that both uses share: pings answered, close handshake, what is to be sent."""

    def __init__(self) -> None:
        self._ws = Connection(ConnectionType.SERVER)
        self._out: list[bytes] = []
        self.closed = False  # by either side

    def take(self) -> bytes:
        """What is to be sent now."""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def close(self, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        self._send(events.CloseConnection(code=code, reason=reason))
        self.closed = True

    def _send(self, event: events.Event) -> None:
        if not self.closed:
            try:
                self._out.append(self._ws.send(event))
            except LocalProtocolError:  # the peer has closed meanwhile
                self.closed = True

    def _messages(self, data: bytes) -> Iterator[events.BytesMessage | events.TextMessage | Closed]:
        try:
            self._ws.receive_data(data)
            for event in self._ws.events():
                match event:
                    case events.BytesMessage() | events.TextMessage():
                        yield event
                    case events.Ping():
                        self._send(event.response())
                    case events.CloseConnection():
                        self._send(event.response())
                        self.closed = True
                        yield Closed()
                        return
        except (RemoteProtocolError, LocalProtocolError):
            self.closed = True
            yield Closed()


class Tunnel(Frames):
    """A byte stream in binary messages."""

    def receive(self, data: bytes) -> list[bytes | Closed]:
        found: list[bytes | Closed] = []
        for message in self._messages(data):
            if isinstance(message, Closed):
                found.append(message)
            elif isinstance(message, events.BytesMessage):
                found.append(bytes(message.data))
            else:
                self.close(CloseReason.UNSUPPORTED_DATA, "binary messages only")
                found.append(Closed())
                break
        return found

    def send(self, data: bytes) -> None:
        self._send(events.BytesMessage(data=data))


class Channels(Frames):
    """Channels of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self._dialect = dialect
        self._channel: int | None = None  # of the message that is being received
        self._text: list[str] = []
        self._refused = False
        self._length = 0

    def receive(self, data: bytes) -> list[Event]:
        found: list[Event] = []
        for message in self._messages(data):
            if isinstance(message, Closed):
                found.append(message)
            elif isinstance(message, events.BytesMessage) and self._dialect.binary:
                self._bytes(bytes(message.data), message.message_finished, found)
            elif isinstance(message, events.TextMessage):
                self._characters(message.data, message.message_finished, found)
            else:
                self._refuse("text messages only", found)
            if self._refused:
                break
        return found

    def _refuse(self, reason: str, found: list[Event]) -> None:
        self._refused = True
        self.close(CloseReason.UNSUPPORTED_DATA, reason)
        found.append(Closed())

    def _bytes(self, data: bytes, finished: bool, found: list[Event]) -> None:
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if data and self._channel == END_OF_CHANNEL and self._dialect.ends:
            found.append(Ended(data[0]))
        elif data and self._channel is not None:
            found.append(Received(self._channel, data))
        if finished:
            self._channel = None

    def _characters(self, text: str, finished: bool, found: list[Event]) -> None:
        """Text: base64, or what a client sends as text in a binary dialect, which the peers take as it is."""
        if self._dialect.binary:
            self._bytes(text.encode(), finished, found)
            return
        self._text.append(text)
        self._length += len(text)
        if self._length > MAX_TEXT:
            self._refuse("message too long", found)
            return
        if not finished:
            return
        whole, self._text, self._length = "".join(self._text), [], 0
        if not whole:
            return
        try:
            decoded = base64.b64decode(whole[1:], validate=True)
        except (binascii.Error, ValueError):
            self._refuse("not base64", found)
            return
        if decoded:
            found.append(Received(ord(whole[0]) - ord("0"), decoded))

    def send(self, channel: int, data: bytes) -> None:
        """One message."""
        if self._dialect.binary:
            self._send(events.BytesMessage(data=bytes((channel,)) + data))
        else:
            self._send(events.TextMessage(data=chr(ord("0") + channel) + base64.b64encode(data).decode()))
