"""Resources and device policies as unit properties, and the names of scopes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cgroups import devices, names, units
from shim.cgroups.group import Group, group_at
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci.spec import CPU, BlockIO, DeviceCgroup, Memory, Pids, Resources

MIB = 1 << 20
ALLOWED = {
    *("MemoryMax", "MemoryLimit", "MemorySwapMax", "MemoryLow", "MemoryMin", "MemoryHigh", "CPUWeight", "CPUShares", "TasksMax"),
    *("CPUQuotaPerSecUSec", "CPUQuotaPeriodUSec", "AllowedCPUs", "AllowedMemoryNodes", "IOWeight", "BlockIOWeight"),
}


def table(wanted: Resources, version: int = 2, *, update: bool = False) -> dict[str, Any]:
    return {name: value for name, (_, value) in units.resources(wanted, version, update=update)}


@pytest.mark.parametrize(
    "wanted, v1, v2",
    [
        (Resources(), {}, {}),
        (Resources(memory=Memory(limit=MIB)), {"MemoryLimit": MIB}, {"MemoryMax": MIB}),
        (Resources(memory=Memory(limit=MIB, swap=3 * MIB)), {"MemoryLimit": MIB}, {"MemoryMax": MIB, "MemorySwapMax": 2 * MIB}),
        (Resources(memory=Memory(limit=MIB, swap=MIB)), {"MemoryLimit": MIB}, {"MemoryMax": MIB, "MemorySwapMax": 0}),
        (Resources(memory=Memory(limit=-1)), {}, {}),
        (Resources(memory=Memory(reservation=MIB)), {}, {"MemoryLow": MIB}),
        (Resources(cpu=CPU(shares=512)), {"CPUShares": 512}, {"CPUWeight": 59}),
        (Resources(cpu=CPU(shares=512, idle=1)), {}, {}),
        (Resources(cpu=CPU(quota=50_000, period=100_000)), {"CPUQuotaPerSecUSec": 500_000}, {"CPUQuotaPerSecUSec": 500_000}),
        (
            Resources(cpu=CPU(quota=33_333, period=50_000)),  # whole percents, never fewer
            {"CPUQuotaPeriodUSec": 50_000, "CPUQuotaPerSecUSec": 670_000},
            {"CPUQuotaPeriodUSec": 50_000, "CPUQuotaPerSecUSec": 670_000},
        ),
        (Resources(cpu=CPU(quota=1000, period=1_000_000)), None, {"CPUQuotaPeriodUSec": 1_000_000, "CPUQuotaPerSecUSec": 10_000}),
        (Resources(cpu=CPU(cpus="0-2,8", mems="1")), {}, {"AllowedCPUs": b"\x07\x01", "AllowedMemoryNodes": b"\x02"}),
        (Resources(pids=Pids(10)), {"TasksMax": 10}, {"TasksMax": 10}),
        (Resources(pids=Pids(0)), {}, {}),
        (Resources(block_io=BlockIO(weight=500)), {"BlockIOWeight": 500}, {"IOWeight": 4950}),
        (
            Resources(unified={"memory.high": "4096", "memory.max": "max", "pids.max": "7", "cpu.weight": "9", "hugetlb.2MB.max": "0"}),
            None,
            {"MemoryHigh": 4096, "MemoryMax": units.INFINITY, "TasksMax": 7, "CPUWeight": 9},
        ),
        (Resources(unified={"cpu.max": "5000 10000"}), None, {"CPUQuotaPeriodUSec": 10_000, "CPUQuotaPerSecUSec": 500_000}),
        (Resources(unified={"cpu.max": "max"}, cpu=CPU(quota=1000)), None, {"CPUQuotaPerSecUSec": units.INFINITY}),
    ],
)
def test_properties(wanted: Resources, v1: dict[str, Any] | None, v2: dict[str, Any]) -> None:
    if v1 is not None:
        assert table(wanted, 1) == v1
    assert table(wanted) == v2


def test_an_update_says_what_is_unlimited_now() -> None:
    wanted = Resources(memory=Memory(limit=-1), cpu=CPU(quota=-1, period=100_000), pids=Pids(0))
    assert table(wanted, update=True) == {
        "MemoryMax": units.INFINITY,
        "MemorySwapMax": units.INFINITY,
        "CPUQuotaPeriodUSec": 100_000,
        "CPUQuotaPerSecUSec": units.INFINITY,
        "TasksMax": units.INFINITY,
    }
    assert table(wanted, 1, update=True)["MemoryLimit"] == units.INFINITY


@given(st.dictionaries(st.text(max_size=20) | st.sampled_from(["memory.high", "cpu.max", "cpuset.cpus", "pids.max"]), st.text(max_size=20)))
def test_cve_2024_3154_no_text_becomes_the_name_of_a_property(unified: dict[str, str]) -> None:
    assert set(table(Resources(unified=unified))) <= ALLOWED


def test_devices_by_number() -> None:
    """As the daemon asks for them: nothing but the usual ones and one of its own."""
    rules = (DeviceCgroup(False, access="rwm"), DeviceCgroup(True, "b", 7, 3, "r"), DeviceCgroup(True, "c", 10, None, "rw"))
    properties = dict(units.devices(devices.policy(rules)))
    assert properties["DevicePolicy"] == ("s", "strict")
    allowed = dict(properties["DeviceAllow"][1])
    assert allowed["/dev/block/7:3"] == "r"
    assert allowed["char-10"] == "rw"
    assert allowed["/dev/char/1:3"] == "rwm"
    assert (allowed["char-*"], allowed["block-*"], allowed["char-136"]) == ("m", "m", "rwm")
    assert set(allowed) == {
        *("/dev/block/7:3", "char-10", "char-*", "block-*", "char-136", "/dev/char/5:0", "/dev/char/5:2"),
        *(f"/dev/char/1:{minor}" for minor in (3, 5, 7, 8, 9)),
    }


def test_all_devices_and_none_of_our_business() -> None:
    assert units.devices(None) == ()
    everything = devices.policy([DeviceCgroup(True, access="rwm")])
    assert units.devices(everything) == (("DevicePolicy", ("s", "auto")),)
    assert units.devices(everything, update=True)[1] == ("DeviceAllow", ("a(ss)", []))
    strict = units.devices(devices.policy([DeviceCgroup(False)]), update=True)
    assert [name for name, _ in strict] == ["DevicePolicy", "DeviceAllow", "DeviceAllow"]
    assert strict[1] == ("DeviceAllow", ("a(ss)", []))  # an update replaces the list


# ---- names


def test_where_a_scope_is() -> None:
    path = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-shim-abc.scope"
    assert names.scope("kubepods-burstable-pod1_2.slice:cri-shim:abc") == ("kubepods-burstable-pod1_2.slice", "cri-shim-abc.scope", path)
    assert names.scope("-.slice:cri-shim:a").path == "/cri-shim-a.scope"
    assert group_at(Layout(2, "/c", {}), "a-b.slice:cri-shim:x") == Group(
        2, "/a.slice/a-b.slice/cri-shim-x.scope", {"": "/c/a.slice/a-b.slice/cri-shim-x.scope"}, "cri-shim-x.scope"
    )
    hybrid = group_at(Layout(1, "/c", {"memory": "/c/memory", "name=systemd": "/c/systemd"}, "/c/unified"), "a.slice:cri-shim:x")
    assert hybrid.unified == "/c/unified/a.slice/cri-shim-x.scope"
    assert hybrid.paths["name=systemd"] == "/c/systemd/a.slice/cri-shim-x.scope"
    assert Group.from_json(hybrid.to_json()) == hybrid
    plain = group_at(Layout(1, "/c", {"memory": "/c/memory"}, "/c/unified"), "/a/b")
    assert (plain.unit, plain.unified, plain.to_json()) == ("", "", {"version": 1, "path": "/a/b", "paths": {"memory": "/c/memory/a/b"}})


@pytest.mark.parametrize(
    "path",
    ["a--b.slice:p:x", "-a.slice:p:x", "a-.slice:p:x", ".slice:p:x", "a:p:x", "a b.slice:p:x", "a.slice:p:", "a.slice:p:x y"],
)
def test_names_that_systemd_would_read_otherwise(path: str) -> None:
    with pytest.raises(Failure):
        names.scope(path)


@given(st.text(max_size=40))
def test_slices_are_what_systemd_takes(text: str) -> None:
    if names.is_slice(text):
        assert re.fullmatch(r"(-|[A-Za-z0-9_.\\]+(-[A-Za-z0-9_.\\]+)*)\.slice", text)
