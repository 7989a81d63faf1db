"""The wire: what goes in comes out, and everything else closes the connection."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim import wire
from shim.errors import Failure
from shim.linux import libc

Pair = tuple[wire.Connection, wire.Connection]


def make_pair() -> Pair:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return wire.Connection(a), wire.Connection(b)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = make_pair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, wire.Connection]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = wire.Connection(b)
    yield a, connection
    a.close()
    connection.close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8).filter(lambda k: k != "memfd"), json_values, max_size=6))
def test_round_trip(body: dict[str, Any]) -> None:
    a, b = make_pair()
    try:
        a.send(body)
        message = b.receive()
        assert message == wire.Message(body, ())
        assert b.receive() is None
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("size", [wire.INLINE - 20, wire.INLINE, wire.INLINE + 1, 1 << 20])
def test_large_messages_travel_in_memory_files(pair: Pair, size: int) -> None:
    read, write = os.pipe()
    try:
        pair[0].send({"op": "x", "data": "a" * size}, (write,))
        message = pair[1].receive()
        assert message is not None
        assert message.body == {"op": "x", "data": "a" * size}
        os.write(message.fds[0], b"through")
        assert os.read(read, 100) == b"through"
        assert not os.get_inheritable(message.fds[0])
        message.close()
    finally:
        os.close(read)
        os.close(write)


def test_limits(pair: Pair) -> None:
    with pytest.raises(ValueError):
        pair[0].send({"data": "a" * (wire.MAX_PAYLOAD + 1)})
    with pytest.raises(ValueError):
        pair[0].send({}, [0] * (wire.MAX_FDS + 1))
    with pytest.raises(ValueError):
        pair[0].send({"x": float("nan")})


def test_order_and_fds_survive_a_full_socket(pair: Pair) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    count = 0
    while not pair[0].pending:
        pair[0].send({"n": count, "pad": "p" * 8000}, (fd,) if count % 5 == 0 else ())
        count += 1
    for _ in range(20):
        pair[0].send({"n": count, "pad": ""}, (fd,))
        count += 1
    os.close(fd)
    for expected in range(count):
        message = pair[1].receive()
        if message is None:
            pair[0].flush()
            message = pair[1].receive()
        assert message is not None
        assert message.body["n"] == expected
        message.close()
    assert not pair[0].pending


def test_a_peer_that_never_reads_is_given_up(pair: Pair) -> None:
    with pytest.raises(wire.Closed):
        for _ in range(wire.MAX_OUTBOX * 2):
            pair[0].send({"pad": "p" * 1000})


@pytest.mark.parametrize("data", [b"[]", b"1", b"{", b"\xff\xfe", b"{" * 20000, b'{"memfd":5}', b"nul"])
def test_what_is_no_message_closes(raw: tuple[socket.socket, wire.Connection], data: bytes) -> None:
    raw[0].send(data)
    with pytest.raises(wire.Closed):
        raw[1].receive()


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_message_or_close(data: bytes) -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = wire.Connection(b)
    try:
        a.send(data)
        try:
            message = connection.receive()
        except wire.Closed:
            return
        assert message is not None and isinstance(message.body, dict)
    finally:
        a.close()
        connection.close()


def test_truncated_messages_close(raw: tuple[socket.socket, wire.Connection]) -> None:
    raw[0].send(b'{"a":"' + b"x" * wire.INLINE + b'"}')
    with pytest.raises(wire.Closed, match="truncated"):
        raw[1].receive()


def test_truncated_fds_close_and_leak_nothing(raw: tuple[socket.socket, wire.Connection]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fds = array.array("i", [0] * (wire.MAX_FDS + 40))
    raw[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(wire.Closed, match="truncated"):
        raw[1].receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_end_of_file_closes(raw: tuple[socket.socket, wire.Connection]) -> None:
    raw[0].close()
    with pytest.raises(wire.Closed, match="end of file"):
        raw[1].receive()


def test_an_unsealed_payload_is_not_read(raw: tuple[socket.socket, wire.Connection]) -> None:
    memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(memory, b'{"op":"evil"}')
    fds = array.array("i", [memory])
    raw[0].sendmsg([b'{"memfd":13}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    os.close(memory)
    with pytest.raises(wire.Closed, match="sealed"):
        raw[1].receive()


@pytest.mark.parametrize("size", [0, -1, 12, 14, 1 << 40, "13", None])
def test_a_payload_of_another_size_is_not_read(raw: tuple[socket.socket, wire.Connection], size: Any) -> None:
    memory = libc.sealed_memfd("x", b'{"op":"evil"}')
    raw[0].sendmsg([wire.encode({"memfd": size})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))])
    os.close(memory)
    with pytest.raises(wire.Closed):
        raw[1].receive()


def test_another_user_is_refused() -> None:
    """A connection made by nobody: credentials are those at connect time."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")  # autobind: no path that nobody could not reach
    listener.listen()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(listener.getsockname())
        client.recv(1)
        os._exit(0)
    accepted, _ = listener.accept()
    with pytest.raises(wire.Closed, match="uid 65534"):
        wire.Connection(accepted)
    os.waitpid(pid, 0)
    listener.close()


GOOD: dict[str, dict[str, Any]] = {
    "pod.netlink": {"id": "a"},
    "pod.sysctls": {"id": "a", "write": {"net/ipv4/ip_forward": None}},
    "container.kill": {"id": "a", "signal": 9, "all": True},
    "exec.kill": {"id": "a", "signal": 15, "tree": False},
    "hello": {"version": 1},
}


@pytest.mark.parametrize("op", GOOD)
def test_table_accepts(op: str) -> None:
    assert wire.check({"v": wire.VERSION, "n": 1, "op": op, **GOOD[op]}, 0) is None


@pytest.mark.parametrize(
    ("body", "fds"),
    [
        ({"v": 2, "op": "hello", "version": 1}, 0),
        ({"op": "hello", "version": 1}, 0),
        ({"v": 1, "n": 1, "op": "format.disk"}, 0),
        ({"v": 1, "n": 1, "op": ["hello"]}, 0),
        ({"v": 1, "n": 1}, 0),
        ({"v": 1, "op": "pod.netlink", "id": "a"}, 0),
        ({"v": 1, "n": 1, "op": "pod.netlink", "id": "../a"}, 0),
        ({"v": 1, "n": 1, "op": "pod.netlink", "id": ""}, 0),
        ({"v": 1, "n": 1, "op": "container.kill", "id": "a", "signal": True}, 0),
        ({"v": 1, "n": 1, "op": "container.kill", "id": "a", "signal": 9, "all": 1}, 0),
        ({"v": 1, "n": 1, "op": "container.kill", "signal": 9}, 0),
        ({"v": 1, "n": 1, "op": "container.update", "id": "a"}, 0),
        ({"v": 1, "n": 1, "op": "pod.netlink", "id": "a"}, 1),
    ],
)
def test_table_refuses(body: dict[str, Any], fds: int) -> None:
    failure = wire.check(body, fds)
    assert isinstance(failure, Failure)
    assert str(failure)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["v", "op", "id", "signal", "fds"]), json_values | st.sampled_from([1, *wire.OPERATIONS])))
def test_table_never_raises(body: dict[str, Any]) -> None:
    wire.check(body, 0)
