"""Which control files a set of resources comes down to. Pure: OCI resources in, ordered writes out.

Conversions follow what the kubelet and the peers show for the same pod: config-linux.md for the fields, runc for what it leaves open.
Device rules are not files with values and live in ``devices``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci.spec import CPU, BlockIO, HugepageLimit, Memory, NetworkResources, Resources, ThrottleDevice

DEFAULT_SHARES, DEFAULT_PERIOD = 1024, 100_000


class Write(NamedTuple):
    """``optional``: the machine may lack the file or controller. ``again``: EINVAL may only mean "not before another write of this
    plan" (quota against period, limit against swap), so it is tried once more after the others. ``otherwise``: file and value to use
    where ``file`` does not exist.
    """

    controller: str
    file: str
    value: str
    optional: bool = False
    again: bool = False
    otherwise: tuple[str, str] | None = None


def resources(wanted: Resources, layout: Layout, *, update: bool = False) -> tuple[Write, ...]:
    """The writes for a new group, or with ``update`` for one that has had other limits. Raises Failure for what cannot be had here.

    A new group is not told what it has anyway: writes that equal the kernel's default are left out.
    """
    writes = tuple(_v1(wanted, update) if layout.version == 1 else _v2(wanted, layout, update))
    kept = []
    for write in writes:
        if write.controller in layout.controllers or write.controller == "cgroup":
            kept.append(write)
        elif not write.optional:
            raise Failure(
                "cgroup", path=write.file, message=f"the {write.controller} controller is not available", hint=_MISSING[layout.version]
            )
    return tuple(kept)


_MISSING = {
    1: "mount its hierarchy, or enable it on the kernel command line",
    2: "enable it on the kernel command line (cgroup_enable=) and in the root's cgroup.subtree_control",
}


# ---- version 1


def _v1(wanted: Resources, update: bool) -> Iterator[Write]:
    if wanted.unified:
        raise Failure("cgroup", path=min(wanted.unified), message="unified resources need cgroup v2, and this machine has v1")
    if wanted.memory is not None:
        yield from _memory_v1(wanted.memory, update)
    if wanted.cpu is not None:
        yield from _cpu_v1(wanted.cpu, update)
        yield from _cpuset(wanted.cpu)
    if wanted.pids is not None:
        yield from _pids(wanted.pids.limit, update)
    if wanted.block_io is not None:
        yield from _blkio(wanted.block_io)
    yield from _hugetlb(wanted.hugepage_limits, "limit_in_bytes")
    if wanted.network is not None:
        yield from _network(wanted.network)


def _memory_v1(memory: Memory, update: bool) -> Iterator[Write]:
    limit, swap = memory.limit or None, memory.swap or None
    if limit == -1 and swap is None and update:
        swap = -1  # a memory limit cannot be above the one on memory plus swap
    unlimited = not update
    if limit is not None and not (limit < 0 and unlimited):
        yield Write("memory", "memory.limit_in_bytes", str(limit), again=True)
    if swap is not None and not (swap < 0 and unlimited):
        if swap > 0 and limit is not None and limit > swap:
            raise Failure("cgroup", path="memory.memsw.limit_in_bytes", message="memory plus swap is limited below memory alone")
        # Without swap accounting there is no such file, and a limit that allows no swap is met where nothing counts it.
        yield Write("memory", "memory.memsw.limit_in_bytes", str(swap), optional=swap < 0 or swap == limit, again=True)
    if memory.reservation:
        yield Write("memory", "memory.soft_limit_in_bytes", str(memory.reservation))
    if memory.kernel_tcp:
        yield Write("memory", "memory.kmem.tcp.limit_in_bytes", str(memory.kernel_tcp), optional=True)
    if memory.swappiness is not None and memory.swappiness >= 0:
        if memory.swappiness > 100:
            raise Failure("cgroup", path="memory.swappiness", message=f"{memory.swappiness} is not between 0 and 100")
        yield Write("memory", "memory.swappiness", str(memory.swappiness))
    if memory.disable_oom_killer or (update and memory.disable_oom_killer is not None):
        yield Write("memory", "memory.oom_control", "1" if memory.disable_oom_killer else "0")


def _cpu_v1(cpu: CPU, update: bool) -> Iterator[Write]:
    if cpu.idle is not None and (cpu.idle or update):
        yield Write("cpu", "cpu.idle", str(cpu.idle), optional=not cpu.idle)
    if cpu.shares and not cpu.idle and (update or cpu.shares != DEFAULT_SHARES):  # an idle group has no shares: EINVAL
        yield Write("cpu", "cpu.shares", str(cpu.shares))
    # Each of period, quota and burst is checked against the others' present values.
    if cpu.period and (update or cpu.period != DEFAULT_PERIOD):
        yield Write("cpu", "cpu.cfs_period_us", str(cpu.period), again=True)
    if cpu.quota and (update or cpu.quota > 0):
        yield Write("cpu", "cpu.cfs_quota_us", str(max(cpu.quota, -1)), again=True)
    if cpu.burst is not None and (cpu.burst or update):
        yield Write("cpu", "cpu.cfs_burst_us", str(cpu.burst), optional=not cpu.burst, again=True)
    if cpu.realtime_period:
        yield Write("cpu", "cpu.rt_period_us", str(cpu.realtime_period), again=True)
    if cpu.realtime_runtime:
        yield Write("cpu", "cpu.rt_runtime_us", str(cpu.realtime_runtime), again=True)


def _cpuset(cpu: CPU) -> Iterator[Write]:
    if cpu.cpus:
        yield Write("cpuset", "cpuset.cpus", cpu.cpus)
    if cpu.mems:
        yield Write("cpuset", "cpuset.mems", cpu.mems)


def _pids(limit: int, update: bool) -> Iterator[Write]:
    if limit > 0:
        yield Write("pids", "pids.max", str(limit))
    elif update:
        yield Write("pids", "pids.max", "max")


def _blkio(io: BlockIO) -> Iterator[Write]:
    # Which of the two files exists depends on the I/O scheduler that was built in.
    if io.weight:
        yield Write("blkio", "blkio.bfq.weight", str(io.weight), otherwise=("blkio.weight", str(io.weight)))
    if io.leaf_weight:
        yield Write("blkio", "blkio.leaf_weight", str(io.leaf_weight))
    for device in io.weight_device:
        number = f"{device.major}:{device.minor}"
        if device.weight:
            value = f"{number} {device.weight}"
            yield Write("blkio", "blkio.bfq.weight_device", value, otherwise=("blkio.weight_device", value))
        if device.leaf_weight:
            yield Write("blkio", "blkio.leaf_weight_device", f"{number} {device.leaf_weight}")
    for kind, _, devices in _throttles(io):
        for throttle in devices:
            yield Write("blkio", f"blkio.throttle.{kind}_device", f"{throttle.major}:{throttle.minor} {throttle.rate}")


def _throttles(io: BlockIO) -> tuple[tuple[str, str, tuple[ThrottleDevice, ...]], ...]:
    return (
        ("read_bps", "rbps", io.throttle_read_bps_device),
        ("write_bps", "wbps", io.throttle_write_bps_device),
        ("read_iops", "riops", io.throttle_read_iops_device),
        ("write_iops", "wiops", io.throttle_write_iops_device),
    )


def _hugetlb(limits: tuple[HugepageLimit, ...], suffix: str) -> Iterator[Write]:
    # The kubelet limits every page size of every container to 0 unless it asks for some, so a machine without the controller must do.
    # "rsvd" (5.7+) stops a process at mmap; the plain limit kills it with SIGBUS at the page fault.
    for limit in limits:
        yield Write("hugetlb", f"hugetlb.{limit.page_size}.{suffix}", str(limit.limit), optional=True)
        yield Write("hugetlb", f"hugetlb.{limit.page_size}.rsvd.{suffix}", str(limit.limit), optional=True)


def _network(network: NetworkResources) -> Iterator[Write]:
    if network.class_id:
        yield Write("net_cls", "net_cls.classid", str(network.class_id))
    for entry in network.priorities:
        yield Write("net_prio", "net_prio.ifpriomap", f"{entry.name} {entry.priority}")


# ---- version 2


def _v2(wanted: Resources, layout: Layout, update: bool) -> Iterator[Write]:
    if wanted.memory is not None:
        yield from _memory_v2(wanted.memory, update)
    if wanted.cpu is not None:
        yield from _cpu_v2(wanted.cpu, update)
        yield from _cpuset(wanted.cpu)
    if wanted.pids is not None:
        yield from _pids(wanted.pids.limit, update)
    if wanted.block_io is not None:
        yield from _io(wanted.block_io)
    yield from _hugetlb(wanted.hugepage_limits, "max")
    yield from _unified(wanted.unified, layout)


def _memory_v2(memory: Memory, update: bool) -> Iterator[Write]:
    swap = swap_v2(memory.limit, memory.swap)
    if memory.limit and (memory.limit > 0 or update):
        yield Write("memory", "memory.max", _or_max(memory.limit))
    if swap is not None and (swap >= 0 or update):
        # Without swap accounting the file is missing; then neither "no limit" nor "no swap" has anything to do.
        yield Write("memory", "memory.swap.max", _or_max(swap), optional=swap <= 0)
    if memory.reservation:
        yield Write("memory", "memory.low", _or_max(memory.reservation))


def swap_v2(limit: int | None, swap: int | None) -> int | None:
    """Version 2 counts swap alone where OCI counts memory plus swap. -1 means unlimited; None leaves it as it is.

    Raises Failure if the sum cannot be split.
    """
    if not swap:
        return -1 if limit == -1 else None
    if swap < 0:
        return -1
    if not limit or limit < 0:
        raise Failure("cgroup", path="memory.swap.max", message="a limit on memory plus swap needs one on memory")
    if swap < limit:
        raise Failure("cgroup", path="memory.swap.max", message="memory plus swap is limited below memory alone")
    return swap - limit


def _or_max(value: int) -> str:
    return str(value) if value >= 0 else "max"


def _cpu_v2(cpu: CPU, update: bool) -> Iterator[Write]:
    if cpu.realtime_runtime or cpu.realtime_period:
        raise Failure("cgroup", path="cpu.rt_runtime_us", message="cgroup v2 cannot limit realtime scheduling")
    if cpu.idle is not None and (cpu.idle or update):
        yield Write("cpu", "cpu.idle", str(cpu.idle), optional=not cpu.idle)
    if cpu.shares and not cpu.idle:  # an idle group has no weight: EINVAL
        weight = weight_of_shares(cpu.shares)
        if update or weight != 100:
            yield Write("cpu", "cpu.weight", str(weight))
    quota, period = cpu.quota or 0, cpu.period or 0
    if update or quota > 0 or period not in (0, DEFAULT_PERIOD):
        if period:
            yield Write("cpu", "cpu.max", f"{quota if quota > 0 else 'max'} {period}", again=True)
        elif quota:
            yield Write("cpu", "cpu.max", str(quota) if quota > 0 else "max", again=True)  # the period stays
    if cpu.burst is not None and (cpu.burst or update):
        yield Write("cpu", "cpu.max.burst", str(cpu.burst), optional=not cpu.burst, again=True)


def weight_of_shares(shares: int) -> int:
    """cpu.weight (1…10000) for cpu.shares (2…262144), both defaults (1024, 100) mapped onto each other.

    A quadratic in log2(shares), as runc 1.3.2 and crun 1.23 have it (kubernetes/kubernetes#131216); the older linear conversion gave
    a container that asks for one CPU a weight of 39, well below what does not ask.
    """
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))


def _io(io: BlockIO) -> Iterator[Write]:
    # io.bfq.weight has the old scale (1…1000), io.weight of the cost model its own (1…10000).
    if io.weight:
        yield Write("io", "io.bfq.weight", str(io.weight), otherwise=("io.weight", str(io_weight(io.weight))))
    for device in io.weight_device:
        if device.weight:
            number = f"{device.major}:{device.minor}"
            cost = ("io.weight", f"{number} {io_weight(device.weight)}")
            yield Write("io", "io.bfq.weight", f"{number} {device.weight}", otherwise=cost)
    for _, key, devices in _throttles(io):
        for throttle in devices:
            yield Write("io", "io.max", f"{throttle.major}:{throttle.minor} {key}={throttle.rate or 'max'}")


def io_weight(weight: int) -> int:
    """io.weight for a blkio.weight (10…1000), linear as in runc."""
    return 1 + (weight - 10) * 9999 // 990


def _unified(unified: dict[str, str], layout: Layout) -> Iterator[Write]:
    for key in sorted(unified):
        controller, dot, _ = key.partition(".")
        if "/" in key or "\0" in key or not dot or (controller == "cgroup" and not key.startswith("cgroup.max.")):
            raise Failure("cgroup", path=key, message="not a resource of cgroup v2")
        if controller != "cgroup" and controller not in layout.controllers:
            raise Failure("cgroup", path=key, message=f"the {controller} controller is not available", hint=_MISSING[2])
        for line in unified[key].splitlines() or [""]:  # control files take one line per write(2)
            yield Write(controller, key, line)
