"""SPDY/3.1 frames: bytes to frames and back (draft-mbelshe-httpbis-spdy-00, 2.2 and 2.6). No streams here: see ``spdy``.

Every count and length is checked against a limit before anything is allocated for it (CVE-2026-35469). Data frames are not
collected: what has arrived of one is passed on at once, so a frame of 16 MiB costs no memory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from cri.streaming.spdy_dictionary import DICTIONARY

VERSION: Final = 3
MAX_STREAM_ID: Final = 0x7FFFFFFF
MAX_CONTROL: Final = 32 * 1024  # bytes of a control frame: a stream's headers are some hundred
MAX_HEADER_BLOCK: Final = 64 * 1024  # bytes once inflated
MAX_HEADERS: Final = 100
MAX_SETTINGS: Final = 32
MAX_DATA: Final = 0xFFFFFF  # bytes, what the length field can say

FIN: Final = 0x01
UNIDIRECTIONAL: Final = 0x02

_WORDS = struct.Struct(">II")
_SYN_STREAM = struct.Struct(">IIBB")
_U32 = struct.Struct(">I")

Headers: TypeAlias = Sequence[tuple[str, str]]


class Type(IntEnum):
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Status(IntEnum):
    """Of RST_STREAM."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9


class GoAway(IntEnum):
    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class ProtocolError(Exception):
    """The peer broke the protocol; the connection is of no more use."""


class Data(NamedTuple):
    """A piece of a data frame; ``fin`` only on the last piece of a frame that has the flag."""

    stream_id: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class Control:
    """A control frame with its payload unread, but for ``headers`` where the type has them."""

    type: Type
    flags: int
    payload: bytes
    headers: tuple[tuple[str, str], ...] = ()

    def word(self, index: int) -> int:
        number: int = _U32.unpack_from(self.payload, index * 4)[0]
        return number

    def id(self, index: int = 0) -> int:
        """A stream id: the reserved bit is ignored."""
        return self.word(index) & MAX_STREAM_ID


#: Type to the payload's fixed size, or the fewest bytes where headers or settings follow.
_EXACT: Final = {Type.RST_STREAM: 8, Type.PING: 4, Type.GOAWAY: 8, Type.WINDOW_UPDATE: 8}
_AT_LEAST: Final = {Type.SYN_STREAM: 10, Type.SYN_REPLY: 4, Type.HEADERS: 4, Type.SETTINGS: 4}
#: Where the header block begins.
_BLOCK: Final = {Type.SYN_STREAM: 10, Type.SYN_REPLY: 4, Type.HEADERS: 4}
_FLAGS: Final = {Type.SYN_STREAM: FIN | UNIDIRECTIONAL, Type.SYN_REPLY: FIN, Type.HEADERS: FIN, Type.SETTINGS: 1}


class Reader:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: tuple[int, bool] | None = None  # stream and FIN of the data frame that is being read
        self._left = 0  # bytes of it
        self._inflater = zlib.decompressobj(zdict=DICTIONARY)

    def feed(self, data: bytes) -> Iterator[Control | Data]:
        """Frames, as far as they are there. Raises ProtocolError, after which this reader is useless."""
        rest = self._rest + data if self._rest else data
        at, end = 0, len(rest)
        while True:
            if self._data is not None:
                piece = rest[at : at + self._left] if at or end > self._left else rest
                at += len(piece)
                self._left -= len(piece)
                stream_id, fin = self._data
                if self._left == 0:
                    self._data = None
                    yield Data(stream_id, piece, fin)
                    continue
                if piece:
                    yield Data(stream_id, piece, False)
                break
            if end - at < 8:
                break
            first, second = _WORDS.unpack_from(rest, at)
            flags, length = second >> 24, second & 0xFFFFFF
            if not first >> 31:
                self._data, self._left = (first, bool(flags & FIN)), length
                if first == 0 or flags & ~FIN:
                    raise ProtocolError("data frame with stream id 0 or unknown flags")
                at += 8
                continue
            kind = _checked(first, flags, length)
            if end - at < 8 + length:
                break
            payload = rest[at + 8 : at + 8 + length]
            at += 8 + length
            yield self._control(kind, flags, payload)
        self._rest = rest[at:]

    def _control(self, kind: Type, flags: int, payload: bytes) -> Control:
        if kind in _BLOCK:
            start = _BLOCK[kind]
            return Control(kind, flags, payload[:start], self._headers(payload[start:]))
        if kind == Type.SETTINGS and (_U32.unpack_from(payload)[0] * 8 + 4 != len(payload) or len(payload) > MAX_SETTINGS * 8 + 4):
            raise ProtocolError("settings: count and length do not agree, or too many")
        return Control(kind, flags, payload)

    def _headers(self, block: bytes) -> tuple[tuple[str, str], ...]:
        try:
            plain = self._inflater.decompress(block, MAX_HEADER_BLOCK + 1)
        except zlib.error as error:
            raise ProtocolError(f"headers: {error}") from None
        if len(plain) > MAX_HEADER_BLOCK or self._inflater.unconsumed_tail or self._inflater.unused_data:
            raise ProtocolError("headers: longer than allowed")
        return parse_headers(plain)


def _checked(first: int, flags: int, length: int) -> Type:
    """The type of a control frame whose beginning makes sense; looked at before its payload is waited for."""
    if first >> 16 & 0x7FFF != VERSION:
        raise ProtocolError(f"version {first >> 16 & 0x7FFF}")
    try:
        kind = Type(first & 0xFFFF)
    except ValueError:
        raise ProtocolError(f"frame type {first & 0xFFFF}") from None
    if flags & ~_FLAGS.get(kind, 0):
        raise ProtocolError(f"{kind.name} with flags {flags:#x}")
    if length > MAX_CONTROL or length != _EXACT.get(kind, length) or length < _AT_LEAST.get(kind, 0):
        raise ProtocolError(f"{kind.name} of {length} bytes")
    return kind


def parse_headers(plain: bytes) -> tuple[tuple[str, str], ...]:
    """An inflated block. A header with several values comes several times."""
    at = 0

    def take() -> bytes:
        nonlocal at
        length = number()
        if length > len(plain) - at:
            raise ProtocolError("headers: a length reaches beyond the block")
        at += length
        return plain[at - length : at]

    def number() -> int:
        nonlocal at
        if len(plain) - at < 4:
            raise ProtocolError("headers: block ends early")
        at += 4
        value: int = _U32.unpack_from(plain, at - 4)[0]
        return value

    count = number()
    if count > MAX_HEADERS:
        raise ProtocolError(f"{count} headers")
    found: dict[str, tuple[str, ...]] = {}
    for _ in range(count):
        name, value = take().decode("latin-1"), take().decode("utf-8", "replace")
        if not name or name in found or name != name.lower():
            raise ProtocolError("headers: a name is empty, doubled or not in lower case")
        found[name] = tuple(value.split("\0"))
    if at != len(plain):
        raise ProtocolError("headers: bytes after the last one")
    if sum(map(len, found.values())) > MAX_HEADERS:
        raise ProtocolError("headers: too many values")
    return tuple((name, value) for name, values in found.items() for value in values)


class Writer:
    """Frames to bytes. The compressor's state is shared by all header blocks, so their order on the wire is that of the calls."""

    def __init__(self) -> None:
        # Smallest window that holds the dictionary: 2 KiB instead of 32 for a handful of headers.
        self._deflater = zlib.compressobj(6, zlib.DEFLATED, 11, 4, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)

    def syn_stream(self, stream_id: int, headers: Headers, flags: int = 0) -> bytes:
        return control(Type.SYN_STREAM, flags, _SYN_STREAM.pack(stream_id, 0, 0, 0) + self._block(headers))

    def syn_reply(self, stream_id: int, headers: Headers, flags: int = 0) -> bytes:
        return control(Type.SYN_REPLY, flags, _U32.pack(stream_id) + self._block(headers))

    def headers(self, stream_id: int, headers: Headers, flags: int = 0) -> bytes:
        return control(Type.HEADERS, flags, _U32.pack(stream_id) + self._block(headers))

    def _block(self, headers: Headers) -> bytes:
        merged: dict[str, str] = {}
        for name, value in headers:
            merged[name.lower()] = f"{merged[name.lower()]}\0{value}" if name.lower() in merged else value
        plain = [_U32.pack(len(merged))]
        for name, value in merged.items():
            for text in (name.encode("latin-1"), value.encode()):
                plain += (_U32.pack(len(text)), text)
        return self._deflater.compress(b"".join(plain)) + self._deflater.flush(zlib.Z_SYNC_FLUSH)


def control(kind: Type, flags: int, payload: bytes) -> bytes:
    return _WORDS.pack(0x80000000 | VERSION << 16 | kind, flags << 24 | len(payload)) + payload


def data_header(stream_id: int, length: int, *, fin: bool = False) -> bytes:
    return _WORDS.pack(stream_id, (FIN << 24 if fin else 0) | length)


def rst_stream(stream_id: int, status: Status) -> bytes:
    return control(Type.RST_STREAM, 0, _WORDS.pack(stream_id, status))


def ping(number: int) -> bytes:
    return control(Type.PING, 0, _U32.pack(number))


def go_away(last_stream_id: int, status: GoAway) -> bytes:
    return control(Type.GOAWAY, 0, _WORDS.pack(last_stream_id, status))


def window_update(stream_id: int, delta: int) -> bytes:
    return control(Type.WINDOW_UPDATE, 0, _WORDS.pack(stream_id, delta))


def settings(values: Sequence[tuple[int, int]]) -> bytes:
    body = b"".join(_WORDS.pack(number & 0xFFFFFF, value) for number, value in values)
    return control(Type.SETTINGS, 0, _U32.pack(len(values)) + body)
