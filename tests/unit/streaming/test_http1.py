"""The request that a streaming connection begins with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.streaming.http1 import MAX_REQUEST, BadRequest, Exchange

REQUEST = (
    b"POST /exec/token?x=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n"
    b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\nX-Stream-Protocol-Version: v3.channel.k8s.io, v2.channel.k8s.io\r\n\r\n"
)


@pytest.mark.parametrize("step", [1, 7, len(REQUEST)])
def test_a_request_in_pieces(step: int) -> None:
    exchange, request = Exchange(), None
    data = REQUEST + b"\x80\x03"
    for start in range(0, len(data), step):
        assert request is None or start >= len(REQUEST)
        request = request or exchange.receive(data[start : start + step])
    assert request is not None
    assert (request.method, request.path, request.query) == ("POST", "/exec/token", "x=1")
    assert request.upgrades_to("spdy/3.1") and not request.upgrades_to("websocket")
    assert request.all("x-stream-protocol-version") == ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io"]
    if step == len(REQUEST):
        assert exchange.rest == b""


def test_what_follows_belongs_to_the_next_protocol() -> None:
    exchange = Exchange()
    assert exchange.receive(REQUEST + b"\x80\x03rest")
    assert exchange.rest == b"\x80\x03rest"
    answer = exchange.switch("SPDY/3.1", [("X-Stream-Protocol-Version", "v4.channel.k8s.io")])
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n") and answer.endswith(b"\r\n\r\n")


def test_a_refusal() -> None:
    exchange = Exchange()
    exchange.receive(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = exchange.refuse(BadRequest(404, "unknown, used or expired"))
    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n") and answer.endswith(b"\r\n\r\nunknown, used or expired\n")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x03\x00\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * MAX_REQUEST,  # and no end in sight
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\nabcde",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: x\r\n\r\n",
    ],
)
def test_what_is_no_request(data: bytes) -> None:
    exchange = Exchange()
    with pytest.raises(BadRequest) as refused:
        exchange.receive(data)
    assert 400 <= refused.value.status < 500
    assert exchange.refuse(refused.value).startswith(b"HTTP/1.1 4")


@given(st.lists(st.binary(max_size=80), max_size=5))
@settings(max_examples=150, deadline=None)
def test_noise(pieces: list[bytes]) -> None:
    exchange = Exchange()
    try:
        for piece in pieces:
            if piece and exchange.receive(piece) is not None:
                return
    except BadRequest as error:
        assert exchange.refuse(error)
