"""Channels and tunnel against wsproto's client end."""

from __future__ import annotations

import base64
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import events
from wsproto.connection import Connection, ConnectionType

from cri.streaming import websocket
from cri.streaming.http1 import BadRequest, Request
from cri.streaming.websocket import DIALECTS, Channels, Closed, Ended, Received, Tunnel


def client() -> Connection:
    return Connection(ConnectionType.CLIENT)


def answer(peer: Connection, machine: websocket.Frames) -> list[events.Event]:
    peer.receive_data(machine.take())
    return list(peer.events())


def request(**changes: str) -> Request:
    headers = {"sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="} | {
        name.replace("_", "-"): value for name, value in changes.items()
    }
    return Request("GET", "/exec/x", "", tuple(headers.items()))


def test_the_handshake_of_rfc_6455() -> None:
    assert websocket.accept_headers(request(), "v4.channel.k8s.io") == [
        ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"),
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"sec_websocket_version": "8"}, {"sec_websocket_key": "!!"}, {"sec_websocket_key": "c2hvcnQ="}])
def test_a_handshake_that_is_none(changes: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        websocket.accept_headers(request(**changes), "")


def test_binary_channels_and_the_end_of_one() -> None:
    peer, machine = client(), Channels(DIALECTS["v5.channel.k8s.io"])
    assert machine.receive(peer.send(events.BytesMessage(data=b"\x00input"))) == [Received(0, b"input")]
    assert machine.receive(peer.send(events.BytesMessage(data=b"\xff\x00"))) == [Ended(0)]
    machine.send(1, b"output")
    machine.send(2, b"")
    assert [bytes(e.data) for e in answer(peer, machine) if isinstance(e, events.BytesMessage)] == [b"\x01output", b"\x02"]


def test_only_v5_has_an_end_of_channel() -> None:
    machine = Channels(DIALECTS["v4.channel.k8s.io"])
    assert machine.receive(client().send(events.BytesMessage(data=b"\xff\x00"))) == [Received(255, b"\x00")]


def test_base64_channels() -> None:
    peer, machine = client(), Channels(DIALECTS["v4.base64.channel.k8s.io"])
    assert machine.receive(peer.send(events.TextMessage(data="0" + base64.b64encode(b"\x00in").decode()))) == [Received(0, b"\x00in")]
    machine.send(1, b"out\xff")
    (event,) = answer(peer, machine)
    assert isinstance(event, events.TextMessage)
    assert event.data == "1" + base64.b64encode(b"out\xff").decode()
    assert machine.receive(peer.send(events.TextMessage(data="0*"))) == [Closed()]


def test_a_text_message_without_end_is_bounded() -> None:
    peer, machine, seen = client(), Channels(DIALECTS["base64.channel.k8s.io"]), []
    for _ in range(40):
        seen += machine.receive(peer.send(events.TextMessage(data="A" * 65536, message_finished=False)))
        if seen:
            break
    assert seen == [Closed()]


def test_text_in_a_binary_dialect_is_taken_as_bytes() -> None:
    machine = Channels(DIALECTS["v4.channel.k8s.io"])
    assert machine.receive(client().send(events.TextMessage(data="\x00ls\n"))) == [Received(0, b"ls\n")]


def test_a_message_in_pieces_keeps_its_channel() -> None:
    peer, machine = client(), Channels(DIALECTS["v4.channel.k8s.io"])
    data = peer.send(events.BytesMessage(data=b"\x00abc", message_finished=False)) + peer.send(events.BytesMessage(data=b"def"))
    assert machine.receive(data) == [Received(0, b"abc"), Received(0, b"def")]


def test_pings_and_the_close_handshake() -> None:
    peer, machine = client(), Channels(DIALECTS["v4.channel.k8s.io"])
    assert machine.receive(peer.send(events.Ping(payload=b"p"))) == []
    assert answer(peer, machine) == [events.Pong(payload=b"p")]
    assert machine.receive(peer.send(events.CloseConnection(code=1000))) == [Closed()]
    assert isinstance(answer(peer, machine)[0], events.CloseConnection)
    machine.send(1, b"too late")
    assert machine.take() == b""


def test_an_unmasked_frame_is_an_error() -> None:
    assert Channels(DIALECTS["v4.channel.k8s.io"]).receive(b"\x82\x02\x00a") == [Closed()]


def test_the_tunnel_carries_binary_only() -> None:
    peer, tunnel = client(), Tunnel()
    assert tunnel.receive(peer.send(events.BytesMessage(data=b"spdy"))) == [b"spdy"]
    tunnel.send(b"frames")
    assert [bytes(e.data) for e in answer(peer, tunnel) if isinstance(e, events.BytesMessage)] == [b"frames"]
    assert tunnel.receive(peer.send(events.TextMessage(data="x"))) == [Closed()]


@given(seed=st.integers(0, 1 << 32), messages=st.lists(st.tuples(st.integers(0, 4), st.binary(min_size=1, max_size=300)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_however_the_bytes_are_split_the_channels_are_the_same(seed: int, messages: list[tuple[int, bytes]]) -> None:
    rng, peer, machine = random.Random(seed), client(), Channels(DIALECTS["v4.channel.k8s.io"])
    data = b"".join(peer.send(events.BytesMessage(data=bytes((channel,)) + body)) for channel, body in messages)
    got: dict[int, bytes] = {}
    while data:
        size = rng.randint(1, 40)
        for event in machine.receive(data[:size]):
            assert isinstance(event, Received)
            got[event.channel] = got.get(event.channel, b"") + event.data
        data = data[size:]
    wanted: dict[int, bytes] = {}
    for channel, body in messages:
        wanted[channel] = wanted.get(channel, b"") + body
    assert got == wanted


@given(st.lists(st.binary(max_size=64), max_size=6), st.sampled_from(sorted(DIALECTS)))
@settings(max_examples=150, deadline=None)
def test_noise_closes_and_raises_nothing(pieces: list[bytes], dialect: str) -> None:
    machine = Channels(DIALECTS[dialect])
    for piece in pieces:
        if machine.closed:
            break
        machine.receive(piece)
