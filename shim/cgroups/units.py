"""Which unit properties a set of resources comes down to. Pure: OCI resources and a device policy in, D-Bus properties out.

systemd writes a unit's control files again whenever it likes (``systemctl daemon-reload``, a change of any property), with its own
defaults for what the unit does not say. So what it has a property for is said; the files that only we know are left alone by it.
``plan`` writes all files exactly, properties or not: these here only have to keep what is there.

Every name comes from this file. No request, annotation or image can name a property (CVE-2024-3154).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from shim.cgroups import plan
from shim.cgroups.devices import ALL, Policy
from shim.oci.spec import CPU, Memory, Resources

#: Name, and the value with its D-Bus signature.
Property: TypeAlias = tuple[str, tuple[str, Any]]

INFINITY = (1 << 64) - 1
_SECOND, _PERCENT = 1_000_000, 10_000  # µs
_LETTERS = ((2, "r"), (4, "w"), (1, "m"))


def scope(slice_name: str, description: str, pid: int) -> tuple[Property, ...]:
    """What every container's scope is. Delegated: below it systemd touches nothing and every controller is on."""
    return (
        ("Description", ("s", description)),
        ("Slice", ("s", slice_name)),
        ("Delegate", ("b", True)),
        # Not stopped with the first services of a shutdown, and not waited for: the kubelet ends pods, in its order.
        ("DefaultDependencies", ("b", False)),
        # Gone when the last process is, however it ended.
        ("CollectMode", ("s", "inactive-or-failed")),
        ("PIDs", ("au", [pid])),
    )


#: Of the runtime's own scope, beside those: it is not limited by what limits units that say nothing.
RUNTIME: tuple[Property, ...] = (("TasksMax", ("t", INFINITY)),)


def resources(wanted: Resources, version: int, *, update: bool = False) -> tuple[Property, ...]:
    """For a new scope, or with ``update`` for one that has had other limits: what is to be unlimited has to be said then.

    Raises Failure where ``plan.resources`` does.
    """
    found: dict[str, Property] = {}
    for entry in _resources(wanted, version, update):
        found[entry[0]] = entry  # a later one, of "unified", is what the files get last
    return tuple(found.values())


def _resources(wanted: Resources, version: int, update: bool) -> Iterator[Property]:
    if wanted.memory is not None:
        yield from _memory(wanted.memory, version, update)
    if wanted.cpu is not None:
        yield from _cpu(wanted.cpu, version, update)
    if wanted.pids is not None and (wanted.pids.limit > 0 or update):
        yield "TasksMax", ("t", wanted.pids.limit if wanted.pids.limit > 0 else INFINITY)
    if wanted.block_io is not None and wanted.block_io.weight:
        weight = wanted.block_io.weight
        yield ("BlockIOWeight", ("t", weight)) if version == 1 else ("IOWeight", ("t", plan.io_weight(weight)))
    for key in sorted(wanted.unified):
        yield from _unified(key, wanted.unified[key].strip())


def _memory(memory: Memory, version: int, update: bool) -> Iterator[Property]:
    limit = memory.limit or None
    if limit is not None and (limit > 0 or update):
        yield "MemoryLimit" if version == 1 else "MemoryMax", ("t", _limit(limit))
    if version == 1:
        return  # it has no property for memory plus swap, and does not write that file
    swap = plan.swap_v2(memory.limit, memory.swap)
    if swap is not None and (swap >= 0 or update):
        yield "MemorySwapMax", ("t", _limit(swap))
    if memory.reservation:
        yield "MemoryLow", ("t", _limit(memory.reservation))


def _cpu(cpu: CPU, version: int, update: bool) -> Iterator[Property]:
    if cpu.shares and not cpu.idle:
        if version == 1:
            yield "CPUShares", ("t", cpu.shares)
        else:
            yield "CPUWeight", ("t", plan.weight_of_shares(cpu.shares))
    if cpu.period and (update or cpu.period != plan.DEFAULT_PERIOD):
        yield "CPUQuotaPeriodUSec", ("t", cpu.period)
    if cpu.quota and (cpu.quota > 0 or update):
        yield "CPUQuotaPerSecUSec", ("t", _per_second(cpu.quota, cpu.period or plan.DEFAULT_PERIOD) if cpu.quota > 0 else INFINITY)
    if version == 2:  # systemd leaves cpusets of version 1 alone
        if cpu.cpus:
            yield "AllowedCPUs", ("ay", _mask(cpu.cpus))
        if cpu.mems:
            yield "AllowedMemoryNodes", ("ay", _mask(cpu.mems))


# Files whose one number is a property's, "max" being infinite.
_UNIFIED: Mapping[str, str] = {
    "memory.min": "MemoryMin",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
    "cpu.weight": "CPUWeight",
}


def _unified(key: str, value: str) -> Iterator[Property]:
    """What is not understood here is left to the kernel, which refuses it when the file is written."""
    if key in _UNIFIED and (value == "max" or value.isdecimal()):
        yield _UNIFIED[key], ("t", INFINITY if value == "max" else min(int(value), INFINITY - 1))
    elif key in ("cpuset.cpus", "cpuset.mems") and value and all(c in "0123456789,-" for c in value):
        yield "AllowedCPUs" if key == "cpuset.cpus" else "AllowedMemoryNodes", ("ay", _mask(value))
    elif key == "cpu.max":
        quota, _, period = value.partition(" ")
        if quota == "max":
            yield "CPUQuotaPerSecUSec", ("t", INFINITY)
        elif quota.isdecimal() and (not period or period.isdecimal()):
            length = int(period or 0) or plan.DEFAULT_PERIOD
            yield "CPUQuotaPeriodUSec", ("t", length)
            yield "CPUQuotaPerSecUSec", ("t", _per_second(int(quota), length))


def _per_second(quota: int, period: int) -> int:
    """µs, rounded up to whole percents: systemd keeps no more over a reload, and would round down."""
    return -(quota * _SECOND // (period * -_PERCENT)) * _PERCENT


def _limit(value: int) -> int:
    return INFINITY if value < 0 else value


def _mask(cpus: str) -> bytes:
    """A list like ``0-3,8`` as systemd's bit mask, the lowest number first."""
    bits = 0
    for part in filter(None, cpus.strip().split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > 1 << 16:
            return b""  # the kernel refuses it when the file is written
        for number in range(int(first), int(last or first) + 1):
            bits |= 1 << number
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def devices(policy: Policy | None, *, update: bool = False) -> tuple[Property, ...]:
    """``None`` leaves devices to the parent. A policy of "all but some" cannot be said: it stays with our own program or rules.

    Numbers instead of paths of device nodes: those need not exist on the host, and might be something else tomorrow.
    """
    if policy is None:
        return ()
    if policy.allow:
        return (("DevicePolicy", ("s", "auto")), *([("DeviceAllow", ("a(ss)", []))] if update else []))
    entries = []
    for entry in policy.exceptions:
        kind = "char" if entry.kind == "c" else "block"
        access = "rwm" if entry.access == ALL else "".join(letter for bit, letter in _LETTERS if entry.access & bit)
        if entry.major is None:
            entries.append((f"{kind}-*", access))
        elif entry.minor is None:
            entries.append((f"{kind}-{entry.major}", access))
        else:
            entries.append((f"/dev/{kind}/{entry.major}:{entry.minor}", access))
    reset: Property = ("DeviceAllow", ("a(ss)", []))  # an empty list empties it, others are added to it
    return (("DevicePolicy", ("s", "strict")), *([reset] if update else []), ("DeviceAllow", ("a(ss)", entries)))
