"""The SPDY machine: two of them joined, byte streams split at random, and a peer that breaks every rule."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.streaming import spdy
from cri.streaming import spdy_frames as frames
from cri.streaming.spdy import Connection, Ended, GoneAway, Opened, Pong, Received, Replied, Reset, Role, State, Writable
from cri.streaming.spdy_dictionary import DICTIONARY
from cri.streaming.spdy_frames import ProtocolError, Status

HEADERS = (("streamtype", "stdin"), ("port", "80"))


class Pair:
    """A client and a server, joined; bytes travel in pieces of random size if ``split`` is given."""

    def __init__(self, split: random.Random | None = None) -> None:
        self.client, self.server = Connection(Role.CLIENT), Connection(Role.SERVER)
        self._split = split

    def _move(self, source: Connection, target: Connection) -> list[spdy.Event]:
        data, events = source.take(), []
        while data:
            size = len(data) if self._split is None else self._split.randint(1, 23)
            events += target.receive(data[:size])
            data = data[size:]
        return events

    def to_server(self) -> list[spdy.Event]:
        return self._move(self.client, self.server)

    def to_client(self) -> list[spdy.Event]:
        return self._move(self.server, self.client)

    def open(self) -> int:
        stream = self.client.open(HEADERS)
        assert self.to_server() == [Opened(stream, HEADERS)]
        self.server.reply(stream)
        assert self.to_client() == [Replied(stream, ())]
        return stream


def joined(events: list[spdy.Event]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Received))


def test_the_dictionary_is_the_drafts() -> None:
    """Its Adler-32 goes over the wire: another one and no peer understands us."""
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)


def test_what_spdystream_sends() -> None:
    """Bytes of Go's framer: SYN_STREAM 1 with ``Streamtype: error``, compressed at its best level and flushed."""
    block = zlib.compressobj(9, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    plain = struct.pack(">II", 1, 10) + b"streamtype" + struct.pack(">I", 5) + b"error"
    payload = struct.pack(">IIBB", 1, 0, 0, 0) + block.compress(plain) + block.flush(zlib.Z_SYNC_FLUSH)
    server = Connection(Role.SERVER)
    assert server.receive(struct.pack(">HHI", 0x8003, 1, len(payload)) + payload) == [Opened(1, (("streamtype", "error"),))]
    server.reply(1)
    reply = server.take()
    assert reply[:4] == b"\x80\x03\x00\x02" and reply[8:12] == b"\0\0\0\1"
    inflater = zlib.decompressobj(zdict=DICTIONARY)
    assert inflater.decompress(reply[12:]) == b"\0\0\0\0"
    server.send(1, b"hi")
    server.send(1, b"", fin=True)
    assert server.take() == b"\0\0\0\1\0\0\0\2hi" + b"\0\0\0\1\1\0\0\0"


def test_a_stream_from_beginning_to_end() -> None:
    pair = Pair()
    stream = pair.open()
    pair.client.send(stream, b"question", fin=True)
    assert pair.to_server() == [Received(stream, b"question"), Ended(stream)]
    assert pair.server.state(stream) is State.REMOTE_ENDED
    with pytest.raises(ValueError, match="SEND_DATA in state LOCAL_ENDED"):
        pair.client.send(stream, b"more")
    pair.server.send(stream, b"answer", fin=True)
    assert pair.to_client() == [Received(stream, b"answer"), Ended(stream)]
    assert pair.server.streams == pair.client.streams == ()


def test_data_before_the_reply() -> None:
    pair = Pair()
    stream = pair.client.open(HEADERS)
    pair.client.send(stream, b"early", fin=True)
    assert pair.to_server() == [Opened(stream, HEADERS), Received(stream, b"early"), Ended(stream)]
    assert pair.server.state(stream) is State.REQUESTED_ENDED
    pair.server.reply(stream)
    assert pair.server.state(stream) is State.REMOTE_ENDED
    pair.to_client()
    assert pair.client.state(stream) is State.LOCAL_ENDED


def test_a_reset_is_the_end_and_late_data_is_dropped() -> None:
    pair = Pair()
    stream = pair.open()
    pair.server.reset(stream)
    pair.client.send(stream, b"on its way")
    assert pair.to_client() == [Reset(stream, Status.CANCEL)]
    assert pair.to_server() == []
    assert pair.server.take() == b""


def test_a_stream_that_never_was() -> None:
    pair = Pair()
    assert pair.server.receive(frames.data_header(7, 2) + b"xy") == []
    assert pair.server.take() == frames.rst_stream(7, Status.INVALID_STREAM)


def test_data_after_the_end_resets() -> None:
    pair = Pair()
    stream = pair.open()
    end = frames.data_header(stream, 0, fin=True)
    assert pair.server.receive(end + frames.data_header(stream, 1) + b"x") == [
        Ended(stream), Reset(stream, Status.STREAM_ALREADY_CLOSED),
    ]  # fmt: skip


def test_pings_of_both_sides() -> None:
    pair = Pair()
    number = pair.client.ping()
    assert number % 2 == 1 and pair.to_server() == [] and pair.to_client() == [Pong(number)]
    number = pair.server.ping()
    assert number % 2 == 0 and pair.to_client() == [] and pair.to_server() == [Pong(number)]


def test_go_away() -> None:
    pair = Pair()
    stream = pair.open()
    pair.server.close()
    crossing = pair.client.open(HEADERS)
    assert pair.to_client() == [GoneAway(stream, 0)]
    assert pair.to_server() == [] and pair.server.state(crossing) is State.CLOSED
    with pytest.raises(ValueError):
        pair.client.open(HEADERS)
    pair.client.send(stream, b"goes on")
    assert joined(pair.to_server()) == b"goes on"


def test_too_many_streams_are_refused() -> None:
    server, client = Connection(Role.SERVER, max_streams=2), Connection(Role.CLIENT)
    for _ in range(3):
        client.open(HEADERS)
    assert len(server.receive(client.take())) == 2
    assert server.take() == frames.rst_stream(5, Status.REFUSED_STREAM)


def test_a_frame_of_many_megabytes_is_passed_on_in_pieces() -> None:
    pair = Pair()
    stream = pair.open()
    assert pair.server.receive(frames.data_header(stream, 1 << 23, fin=True)) == []
    for _ in range(127):
        assert pair.server.receive(b"x" * 65536) == [Received(stream, b"x" * 65536)]
    assert pair.server.receive(b"x" * 65536) == [Received(stream, b"x" * 65536), Ended(stream)]


def test_more_than_a_frame_can_say_is_sent_in_several() -> None:
    pair = Pair()
    stream = pair.open()
    pair.server.send(stream, b"z" * (frames.MAX_DATA + 5), fin=True)
    events = pair.to_client()
    assert len(joined(events)) == frames.MAX_DATA + 5 and events[-1] == Ended(stream)


def test_a_header_whose_data_the_caller_sends() -> None:
    pair = Pair()
    stream = pair.open()
    head = pair.server.head(stream, 5)
    assert head is not None and pair.client.receive(head + b"hello") == [Received(stream, b"hello")]
    pair.server.ping()
    assert pair.server.head(stream, 5) is None  # the ping goes first
    pair.server.take()
    pair.server.receive(frames.window_update(stream, 10))
    assert pair.server.head(stream, 5) is None  # a peer with windows


def test_windows_count_once_a_peer_shows_that_it_uses_them() -> None:
    pair = Pair()
    stream = pair.open()
    pair.server.send(stream, b"a" * 100_000)  # spdystream never grants anything: nothing is held back
    assert len(joined(pair.to_client())) == 100_000
    pair = Pair()
    stream = pair.open()
    pair.server.receive(frames.settings([(spdy.INITIAL_WINDOW_SIZE, 1000)]))
    pair.server.send(stream, b"b" * 1500, fin=True)
    assert pair.server.held(stream) == 500 and len(joined(pair.to_client())) == 1000
    assert pair.server.receive(frames.window_update(stream, 200)) == []
    assert pair.server.receive(frames.window_update(stream, 300)) == [Writable(stream)]
    events = pair.to_client()
    assert len(joined(events)) == 500 and events[-1] == Ended(stream)
    with pytest.raises(ValueError):
        pair.server.send(stream, b"after the end")


def test_what_was_consumed_is_granted_to_a_peer_that_uses_windows() -> None:
    pair = Pair()
    stream = pair.open()
    pair.server.consumed(stream, 40_000)
    assert pair.server.take() == b""
    pair.server.receive(frames.window_update(0, 1))
    pair.server.consumed(stream, 10_000)
    assert pair.server.take() == frames.window_update(0, 50_000) + frames.window_update(stream, 50_000)


def test_a_window_that_overflows() -> None:
    pair = Pair()
    stream = pair.open()
    assert pair.server.receive(frames.window_update(stream, 0x7FFFFFFF)) == [Reset(stream, Status.FLOW_CONTROL_ERROR)]
    with pytest.raises(ProtocolError):
        pair.server.receive(frames.window_update(0, 0x7FFFFFFF))


def block(plain: bytes) -> bytes:
    deflater = zlib.compressobj(zdict=DICTIONARY)
    return deflater.compress(plain) + deflater.flush(zlib.Z_SYNC_FLUSH)


def syn(plain: bytes) -> bytes:
    return frames.control(frames.Type.SYN_STREAM, 0, struct.pack(">IIBB", 1, 0, 0, 0) + block(plain))


U32 = struct.Struct(">I").pack
BAD = {
    "a control frame longer than allowed": struct.pack(">HHI", 0x8003, 1, frames.MAX_CONTROL + 1),
    "the longest control frame": struct.pack(">HHI", 0x8003, 1, 0xFFFFFF),
    "a billion headers": syn(U32(1_000_000_000)),
    "a header of 4 GiB": syn(U32(1) + U32(0xFFFFFFFF)),
    "a value of 4 GiB": syn(U32(1) + U32(1) + b"a" + U32(0xFFFFFFFF)),
    "a block that ends early": syn(U32(2) + U32(1) + b"a" + U32(0)),
    "a doubled name": syn(U32(2) + (U32(1) + b"a" + U32(0)) * 2),
    "an upper-case name": syn(U32(1) + U32(1) + b"A" + U32(0)),
    "a zip bomb": syn(U32(1) + U32(1) + b"a" + U32(1 << 26) + b"\0" * (1 << 26)),
    "many values": syn(U32(1) + U32(1) + b"a" + U32(200) + b"\0" * 200),
    "no zlib": frames.control(frames.Type.SYN_STREAM, 0, struct.pack(">IIBB", 1, 0, 0, 0) + b"plain text"),
    "a billion settings": frames.control(frames.Type.SETTINGS, 0, U32(1_000_000_000)),
    "many settings": frames.settings([(1, 1)] * (frames.MAX_SETTINGS + 1)),
    "settings that are shorter than they say": frames.control(frames.Type.SETTINGS, 0, U32(2) + bytes(8)),
    "a reset of 7 bytes": frames.control(frames.Type.RST_STREAM, 0, bytes(7)),
    "a ping with flags": frames.control(frames.Type.PING, 1, bytes(4)),
    "an unknown type": struct.pack(">HHI", 0x8003, 5, 0),
    "another version": struct.pack(">HHI", 0x8002, 6, 4),
    "data on stream 0": frames.data_header(0, 1),
    "an even stream id": frames.control(frames.Type.SYN_STREAM, 0, struct.pack(">IIBB", 2, 0, 0, 0) + block(U32(0))),
    "a stream id of 0": frames.control(frames.Type.SYN_STREAM, 0, struct.pack(">IIBB", 0, 0, 0, 0) + block(U32(0))),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2,
}


@pytest.mark.parametrize("name", BAD)
def test_a_peer_that_breaks_the_rules(name: str) -> None:
    """CVE-2026-35469: no count and no length is believed before it is checked."""
    server = Connection(Role.SERVER)
    with pytest.raises(ProtocolError):
        server.receive(BAD[name])
        server.receive(bytes(frames.MAX_CONTROL))
    assert server.take().endswith(frames.go_away(0, frames.GoAway.PROTOCOL_ERROR))


def test_a_stream_id_that_goes_back() -> None:
    pair = Pair()
    pair.open()
    pair.open()
    with pytest.raises(ProtocolError):
        pair.server.receive(syn(U32(0)))


def test_a_peer_that_only_complains_about_is_given_up() -> None:
    server = Connection(Role.SERVER)
    with pytest.raises(ProtocolError):
        for number in range(1, 3000, 2):
            server.receive(frames.data_header(number, 0))


@given(seed=st.integers(0, 1 << 32), payloads=st.lists(st.binary(max_size=200), max_size=12), streams=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_however_the_bytes_are_split_the_streams_are_the_same(seed: int, payloads: list[bytes], streams: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng)
    ids = [pair.client.open((("streamtype", "data"), ("requestid", str(n)))) for n in range(streams)]
    assert [event.stream_id for event in pair.to_server() if isinstance(event, Opened)] == ids
    for number in ids:
        pair.server.reply(number)
    assert [type(event) for event in pair.to_client()] == [Replied] * streams
    sent: dict[int, bytes] = dict.fromkeys(ids, b"")
    got: dict[int, bytes] = dict.fromkeys(ids, b"")
    for payload in payloads:
        number = rng.choice(ids)
        sent[number] += payload
        pair.client.send(number, payload)
        if rng.random() < 0.3:
            pair.client.ping()
    for number in ids:
        pair.client.send(number, b"", fin=True)
    events = pair.to_server()
    for event in events:
        if isinstance(event, Received):
            got[event.stream_id] += event.data
    assert got == sent and [event.stream_id for event in events if isinstance(event, Ended)] == ids


@given(st.lists(st.binary(max_size=64), max_size=8))
@settings(max_examples=200, deadline=None)
def test_noise_raises_nothing_but_protocol_errors(pieces: list[bytes]) -> None:
    server = Connection(Role.SERVER)
    try:
        for piece in pieces:
            server.receive(piece)
    except ProtocolError:
        assert server.take()


KINDS = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9])


@st.composite
def control_frames(draw: st.DrawFn) -> bytes:
    kind, flags = draw(KINDS), draw(st.sampled_from([0, 0, 0, 1, 2, 255]))
    words = b"".join(U32(draw(st.sampled_from([0, 1, 2, 3, 5, 0x7FFFFFFF, 0xFFFFFFFF]))) for _ in range(draw(st.integers(0, 4))))
    payload = words + draw(st.one_of(st.just(b""), st.binary(max_size=12), st.just(block(U32(0)))))
    return struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload


@given(
    st.lists(
        st.one_of(control_frames(), st.builds(lambda n, d: frames.data_header(n, len(d)) + d, st.integers(0, 9), st.binary(max_size=9)))
    )
)
@settings(max_examples=300, deadline=None)
def test_frames_that_make_no_sense_leave_a_consistent_machine(sequence: list[bytes]) -> None:
    server = Connection(Role.SERVER)
    known: set[int] = set()
    try:
        for frame in sequence:
            for event in server.receive(frame):
                if isinstance(event, Opened):
                    known.add(event.stream_id)
                    server.reply(event.stream_id)
                elif isinstance(event, Received | Ended | Reset):
                    assert event.stream_id in known
    except ProtocolError:
        pass
    assert set(server.streams) <= known
    for number in server.streams:
        server.reset(number)
    assert server.streams == ()
