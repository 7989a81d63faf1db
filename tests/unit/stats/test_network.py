"""Interface counters, from text and from netlink."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.stats import network
from cri.stats.network import Interface

TEXT = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1000      10    0    0    0     0          0         0     1000      10    0    0    0     0       0          0
  net1:   11      12   13   14    0     0          0         0       21      22   23   24    0     0       0          0
eth0.5:1234567890123 2    3    4    0     0          0         0      5       6    7    8    0     0       0          0
  eth0:    1       2    3    4    0     0          0         0        5       6    7    8    0     0       0          0
"""


def test_text() -> None:
    found = network.ordered(network.parse(TEXT))
    assert [one.name for one in found] == ["eth0", "net1", "eth0.5"]
    assert found[0] == Interface("eth0", 1, 2, 3, 4, 5, 6, 7, 8)
    assert found[2].rx_bytes == 1234567890123


@given(st.text())
def test_any_text(text: str) -> None:
    try:
        network.parse(text)
    except ValueError:
        pass  # sixteen words that are no numbers


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(name: str) -> bytes:
    counters = struct.pack("=24Q", 2, 6, 1, 5, 3, 7, 4, 8, *range(16))
    return message(16, bytes(16) + attribute(3, name.encode() + b"\0") + attribute(99, b"xyz") + attribute(23, counters))


def test_netlink() -> None:
    done, found = network.links(link("lo") + link("eth0"))
    assert not done
    assert network.ordered(found) == (Interface("eth0", 1, 2, 3, 4, 5, 6, 7, 8),)
    assert network.links(link("x") + message(3, bytes(4)))[0]
    with pytest.raises(PermissionError):
        network.links(message(2, struct.pack("=i", -1) + bytes(16)))


@given(st.binary(max_size=200))
def test_netlink_of_any_bytes_ends(data: bytes) -> None:
    try:
        network.links(data)
    except (OSError, struct.error):
        pass


def test_this_process() -> None:
    inode = os.stat("/proc/self/ns/net").st_ino
    assert network.of_process(os.getpid(), inode) is not None
    assert network.of_process(os.getpid(), inode + 1) is None
    assert network.of_process(2**22 + 1, inode) is None
