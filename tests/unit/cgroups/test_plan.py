"""Resources → control file writes, as data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shim.cgroups import plan
from shim.cgroups.layout import Layout
from shim.cgroups.plan import Write
from shim.errors import Failure
from shim.oci.spec import (
    CPU,
    BlockIO,
    HugepageLimit,
    InterfacePriority,
    Memory,
    NetworkResources,
    Pids,
    Resources,
    ThrottleDevice,
    WeightDevice,
)

ROOT = "/sys/fs/cgroup"
V1 = Layout(1, ROOT, {name: f"{ROOT}/{name}" for name in ("cpu", "cpuacct", "cpuset", "memory", "devices", "blkio", "pids", "hugetlb")})
V2 = Layout(2, ROOT, dict.fromkeys(("cpu", "cpuset", "memory", "io", "pids", "hugetlb"), ROOT))


def written(wanted: Resources, layout: Layout, *, update: bool = False) -> list[tuple[str, str]]:
    return [(write.file, write.value) for write in plan.resources(wanted, layout, update=update)]


def test_what_a_new_group_has_anyway_is_not_written() -> None:
    defaults = Resources(memory=Memory(limit=-1, swap=-1), cpu=CPU(shares=1024, quota=-1, period=100000, burst=0, idle=0), pids=Pids(-1))
    assert written(defaults, V1) == written(defaults, V2) == []
    assert written(Resources(), V1, update=True) == []


def test_an_update_writes_defaults_too() -> None:
    defaults = Resources(memory=Memory(limit=-1), cpu=CPU(shares=1024, quota=-1, period=100000), pids=Pids(-1))
    assert written(defaults, V1, update=True) == [
        ("memory.limit_in_bytes", "-1"),
        ("memory.memsw.limit_in_bytes", "-1"),
        ("cpu.shares", "1024"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "-1"),
        ("pids.max", "max"),
    ]
    assert written(defaults, V2, update=True) == [
        ("memory.max", "max"),
        ("memory.swap.max", "max"),
        ("cpu.weight", "100"),
        ("cpu.max", "max 100000"),
        ("pids.max", "max"),
    ]


def test_a_kubelet_container() -> None:
    wanted = Resources(
        memory=Memory(limit=1 << 26, swap=1 << 26),
        cpu=CPU(shares=102, quota=10000, period=100000, cpus="0-1", mems="0"),
        hugepage_limits=(HugepageLimit("2MB", 0),),
        pids=Pids(50),
    )
    assert written(wanted, V1) == [
        ("memory.limit_in_bytes", "67108864"),
        ("memory.memsw.limit_in_bytes", "67108864"),
        ("cpu.shares", "102"),
        ("cpu.cfs_quota_us", "10000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "50"),
        ("hugetlb.2MB.limit_in_bytes", "0"),
        ("hugetlb.2MB.rsvd.limit_in_bytes", "0"),
    ]
    assert written(wanted, V2) == [
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("cpu.weight", "17"),
        ("cpu.max", "10000 100000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "50"),
        ("hugetlb.2MB.max", "0"),
        ("hugetlb.2MB.rsvd.max", "0"),
    ]


@pytest.mark.parametrize(
    ("shares", "weight"),
    [(0, 1), (2, 1), (3, 2), (102, 17), (256, 35), (1024, 100), (2048, 174), (262144, 10000), (10**9, 10000)],
)
def test_weight_of_shares(shares: int, weight: int) -> None:
    assert plan.weight_of_shares(shares) == weight


def test_weights_grow_with_shares() -> None:
    weights = [plan.weight_of_shares(shares) for shares in range(2, 262145, 7)]
    assert weights == sorted(weights)
    assert min(weights) == 1 and max(weights) <= 10000


@pytest.mark.parametrize(
    ("limit", "swap", "alone"),
    [(100, 100, 0), (100, 150, 50), (100, -1, -1), (100, None, None), (-1, None, -1), (100, 0, None)],
)
def test_swap_alone(limit: int | None, swap: int | None, alone: int | None) -> None:
    assert plan.swap_v2(limit, swap) == alone


@pytest.mark.parametrize(("limit", "swap"), [(None, 100), (-1, 100), (100, 99)])
def test_swap_that_cannot_be_split(limit: int | None, swap: int) -> None:
    with pytest.raises(Failure):
        plan.swap_v2(limit, swap)


def test_swap_accounting_may_be_off_where_it_would_change_nothing() -> None:
    def swap_write(swap: int, layout: Layout) -> Write:
        return next(w for w in plan.resources(Resources(memory=Memory(limit=100, swap=swap)), layout, update=True) if "sw" in w.file)

    for layout in (V1, V2):
        assert swap_write(100, layout).optional and swap_write(-1, layout).optional and not swap_write(200, layout).optional


def test_an_idle_group_has_no_weight() -> None:
    assert written(Resources(cpu=CPU(shares=512, idle=1)), V1) == [("cpu.idle", "1")]
    assert written(Resources(cpu=CPU(shares=512, idle=0)), V2, update=True) == [("cpu.idle", "0"), ("cpu.weight", "59")]


def test_quota_period_and_burst() -> None:
    assert written(Resources(cpu=CPU(quota=20000)), V2) == [("cpu.max", "20000")]
    assert written(Resources(cpu=CPU(period=50000)), V2) == [("cpu.max", "max 50000")]
    assert written(Resources(cpu=CPU(quota=20000, burst=5000)), V2) == [("cpu.max", "20000"), ("cpu.max.burst", "5000")]
    assert all(write.again for write in plan.resources(Resources(cpu=CPU(quota=1, period=2, burst=3)), V1))


def test_realtime_is_version_1_only() -> None:
    wanted = Resources(cpu=CPU(realtime_period=1000000, realtime_runtime=1000))
    assert written(wanted, V1) == [("cpu.rt_period_us", "1000000"), ("cpu.rt_runtime_us", "1000")]
    with pytest.raises(Failure):
        written(wanted, V2)


def test_other_memory_settings() -> None:
    memory = Memory(reservation=5, swappiness=0, disable_oom_killer=True, kernel=7, kernel_tcp=6)
    assert written(Resources(memory=memory), V1) == [
        ("memory.soft_limit_in_bytes", "5"),
        ("memory.kmem.tcp.limit_in_bytes", "6"),
        ("memory.swappiness", "0"),
        ("memory.oom_control", "1"),
    ]
    assert written(Resources(memory=memory), V2) == [("memory.low", "5")]
    with pytest.raises(Failure):
        written(Resources(memory=Memory(swappiness=101)), V1)


def test_block_io() -> None:
    io = BlockIO(
        weight=500,
        weight_device=(WeightDevice(8, 0, 100),),
        throttle_read_bps_device=(ThrottleDevice(8, 0, 1024),),
        throttle_write_iops_device=(ThrottleDevice(8, 16, 7),),
    )
    assert written(Resources(block_io=io), V1) == [
        ("blkio.bfq.weight", "500"),
        ("blkio.bfq.weight_device", "8:0 100"),
        ("blkio.throttle.read_bps_device", "8:0 1024"),
        ("blkio.throttle.write_iops_device", "8:16 7"),
    ]
    writes = plan.resources(Resources(block_io=io), V2)
    assert [(w.file, w.value) for w in writes] == [
        ("io.bfq.weight", "500"),
        ("io.bfq.weight", "8:0 100"),
        ("io.max", "8:0 rbps=1024"),
        ("io.max", "8:16 wiops=7"),
    ]
    assert writes[0].otherwise == ("io.weight", "4950")
    assert (plan.io_weight(10), plan.io_weight(1000)) == (1, 10000)


def test_network_classes() -> None:
    network = Resources(network=NetworkResources(0x100001, (InterfacePriority("eth0", 5),)))
    with_network = replace(V1, controllers={**V1.controllers, "net_cls": "/n", "net_prio": "/n"})
    assert written(network, with_network) == [("net_cls.classid", "1048577"), ("net_prio.ifpriomap", "eth0 5")]
    with pytest.raises(Failure):
        written(network, V1)


def test_unified() -> None:
    assert written(Resources(unified={"memory.high": "max", "io.max": "8:0 rbps=1\n8:16 wbps=2"}), V2) == [
        ("io.max", "8:0 rbps=1"),
        ("io.max", "8:16 wbps=2"),
        ("memory.high", "max"),
    ]
    for key in ("memory", "../x.y", "misc.max", "cgroup.procs", "cgroup.kill"):
        with pytest.raises(Failure):
            written(Resources(unified={key: "1"}), V2)
    with pytest.raises(Failure):
        written(Resources(unified={"memory.high": "1"}), V1)


def test_missing_controllers() -> None:
    bare = Layout(2, ROOT, {"cpu": ROOT})
    assert written(Resources(hugepage_limits=(HugepageLimit("2MB", 0),)), bare) == []
    with pytest.raises(Failure) as missing:
        written(Resources(memory=Memory(limit=5)), bare)
    assert "memory controller" in str(missing.value) and missing.value.hint
