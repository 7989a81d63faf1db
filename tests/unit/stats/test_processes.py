"""Processes as /proc shows them."""

from __future__ import annotations

import os
import socket

import pytest

from cri.stats import processes
from cri.stats.descriptors import BASE, METRICS, descriptors
from cri.stats.metrics import device_name
from protos.runtime.v1 import api_pb2 as v1


def test_this_process() -> None:
    me = os.getpid()
    before = processes.read([me], me)
    with socket.socket(), socket.socket():
        after = processes.read([me, 2**22 + 1], me)
    assert (after.processes, after.sockets - before.sockets, after.descriptors - before.descriptors) == (2, 2, 2)
    assert after.threads >= 1
    assert processes.read([], 2**22 + 1) == processes.Processes()


def test_a_container_with_many_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them are looked at than is bearable; how many there are is known all the same."""
    monkeypatch.setattr("cri.stats.processes._DESCRIPTORS", 3)
    me = os.getpid()
    pairs = [socket.socketpair() for _ in range(10)]
    found = processes.read([me, me], me)
    for pair in pairs:
        for end in pair:
            end.close()
    assert found.sockets <= 3
    assert found.descriptors >= 20 or os.stat("/proc/self/fd").st_size == 0


@pytest.mark.parametrize("value, expected", [("1024", 1024), ("unlimited", None)])
def test_limits(value: str, expected: int | None) -> None:
    text = f"Limit             Soft Limit   Hard Limit   Units     \nMax open files            {value}    4096    files\n"
    assert processes.soft_limit(text, "Max open files") == expected
    assert processes.soft_limit(text, "Max nothing") is None


def test_descriptors_are_complete() -> None:
    found = descriptors()
    assert [each.name for each in found] == list(METRICS)
    assert all(tuple(each.label_keys[: len(BASE)]) == BASE and each.help for each in found)
    gauges = {name for name, metric in METRICS.items() if metric.kind == v1.GAUGE}
    assert {name for name in METRICS if not name.endswith("_total")} - gauges == {"container_memory_failcnt"}
    assert {name for name in gauges if name.endswith("_total")} == {"container_fs_inodes_total"}


def test_devices_without_a_name() -> None:
    assert device_name(0, 9999) == ""
