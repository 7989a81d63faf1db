"""What a group has used. Read by the daemon and by tools: files only, no state, nothing that a container could influence but numbers."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from shim.cgroups import group as files
from shim.cgroups.group import Group
from shim.errors import Failure

UNLIMITED_V1 = 1 << 62  # version 1 has no "max": it shows the largest page-aligned number, a little below 2^63


@dataclass(frozen=True, slots=True)
class Pressure:
    """One line of a PSI file: shares of time in percent over 10, 60 and 300 s, and µs in total."""

    avg10: float
    avg60: float
    avg300: float
    total: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Time in which some, or all, tasks waited for one resource."""

    some: Pressure
    full: Pressure | None = None


@dataclass(frozen=True, slots=True)
class Cpu:
    """Nanoseconds; periods as counted."""

    usage: int = 0
    user: int = 0
    system: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled: int = 0
    quota: int | None = None  # µs, None for unlimited
    period: int | None = None  # µs
    stall: Stall | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; a limit of None is none. ``working_set`` is usage without what reclaim would take first, as the kubelet counts."""

    usage: int = 0
    working_set: int = 0
    rss: int = 0
    cache: int = 0
    mapped: int = 0
    kernel: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    peak: int = 0
    failures: int = 0
    oom_kills: int = 0
    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    swap_limit: int | None = None
    stall: Stall | None = None


@dataclass(frozen=True, slots=True)
class Io:
    """One block device's totals."""

    major: int
    minor: int
    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True)
class Hugetlb:
    page_size: str
    usage: int
    peak: int | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Each part is None where the machine or group lacks its controller."""

    cpu: Cpu | None
    memory: Memory | None
    pids: int | None
    pids_limit: int | None
    io: tuple[Io, ...]
    io_stall: Stall | None
    hugetlb: tuple[Hugetlb, ...] = ()


def read(group: Group) -> Stats:
    """Raises Failure with ENOENT if the group is gone."""
    try:
        return _read_v1(group) if group.version == 1 else _read_v2(group)
    except OSError as error:
        if error.errno == errno.ENODEV:
            error.errno = errno.ENOENT
        raise Failure.wrap("read cgroup", "read", error) from error


# ---- version 2


def _read_v2(group: Group) -> Stats:
    top = group.paths[""]
    enabled = set(files.read(f"{top}/cgroup.controllers").split())
    return Stats(
        cpu=_cpu_v2(top),
        memory=_memory_v2(top) if "memory" in enabled else None,
        pids=int(files.read(f"{top}/pids.current")) if "pids" in enabled else None,
        pids_limit=_limit(_optional(f"{top}/pids.max")) if "pids" in enabled else None,
        io=_io_v2(_optional(f"{top}/io.stat")),
        io_stall=pressure(_optional(f"{top}/io.pressure")),
        hugetlb=_hugetlb_v2(top) if "hugetlb" in enabled else (),
    )


def _cpu_v2(top: str) -> Cpu:
    stat = _table(files.read(f"{top}/cpu.stat"))
    quota, period = None, None
    if fields := _optional(f"{top}/cpu.max").split():
        quota, period = _limit(fields[0]), int(fields[1])
    return Cpu(
        usage=stat.get("usage_usec", 0) * 1000,
        user=stat.get("user_usec", 0) * 1000,
        system=stat.get("system_usec", 0) * 1000,
        periods=stat.get("nr_periods", 0),
        throttled_periods=stat.get("nr_throttled", 0),
        throttled=stat.get("throttled_usec", 0) * 1000,
        quota=quota,
        period=period,
        stall=pressure(_optional(f"{top}/cpu.pressure")),
    )


def _memory_v2(top: str) -> Memory:
    stat = _table(files.read(f"{top}/memory.stat"))
    usage = int(files.read(f"{top}/memory.current"))
    swap = _optional(f"{top}/memory.swap.current")
    events = _table(files.read(f"{top}/memory.events"))
    return Memory(
        usage=usage,
        working_set=max(usage - stat.get("inactive_file", 0), 0),
        rss=stat.get("anon", 0),
        cache=stat.get("file", 0),
        mapped=stat.get("file_mapped", 0),
        kernel=stat.get("kernel", 0),
        page_faults=stat.get("pgfault", 0),
        major_page_faults=stat.get("pgmajfault", 0),
        peak=int(_optional(f"{top}/memory.peak") or 0),
        failures=events.get("max", 0),
        oom_kills=events.get("oom_kill", 0),
        limit=_limit(files.read(f"{top}/memory.max")),
        reservation=_limit(_optional(f"{top}/memory.low")) or None,
        swap=int(swap) if swap else None,
        swap_limit=_limit(_optional(f"{top}/memory.swap.max")),
        stall=pressure(_optional(f"{top}/memory.pressure")),
    )


def _io_v2(text: str) -> tuple[Io, ...]:
    found = []
    for line in text.splitlines():
        device, *pairs = line.split()
        values = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs) if value.isdigit()}
        if values:  # a device that the group has not touched may be listed without any
            major, _, minor = device.partition(":")
            numbers = (values.get(key, 0) for key in ("rbytes", "wbytes", "rios", "wios"))
            found.append(Io(int(major), int(minor), *numbers))
    return tuple(found)


def _hugetlb_v2(top: str) -> tuple[Hugetlb, ...]:
    found = []
    for size in page_sizes():
        usage = _optional(f"{top}/hugetlb.{size}.current")
        if usage:
            events = _table(_optional(f"{top}/hugetlb.{size}.events"))
            found.append(Hugetlb(size, int(usage), failures=events.get("max", 0)))
    return tuple(found)


# ---- version 1


def _read_v1(group: Group) -> Stats:
    paths = group.paths
    pids = paths.get("pids")
    return Stats(
        cpu=_cpu_v1(paths),
        memory=_memory_v1(paths["memory"]) if "memory" in paths else None,
        pids=int(files.read(f"{pids}/pids.current")) if pids else None,
        pids_limit=_limit(files.read(f"{pids}/pids.max")) if pids else None,
        io=_io_v1(paths["blkio"]) if "blkio" in paths else (),
        io_stall=None,
        hugetlb=_hugetlb_v1(paths["hugetlb"]) if "hugetlb" in paths else (),
    )


def _cpu_v1(paths: dict[str, str]) -> Cpu | None:
    if "cpuacct" not in paths:
        return None
    account = paths["cpuacct"]
    stat: dict[str, int] = {}
    quota, period = None, None
    if control := paths.get("cpu"):
        stat = _table(files.read(f"{control}/cpu.stat"))
        if text := _optional(f"{control}/cpu.cfs_quota_us"):
            quota, period = _limit(text), int(files.read(f"{control}/cpu.cfs_period_us"))
    return Cpu(
        usage=int(files.read(f"{account}/cpuacct.usage")),
        user=int(_optional(f"{account}/cpuacct.usage_user") or 0),
        system=int(_optional(f"{account}/cpuacct.usage_sys") or 0),
        periods=stat.get("nr_periods", 0),
        throttled_periods=stat.get("nr_throttled", 0),
        throttled=stat.get("throttled_time", 0),
        quota=quota,
        period=period,
    )


def _memory_v1(top: str) -> Memory:
    stat = _table(files.read(f"{top}/memory.stat"))
    usage = int(files.read(f"{top}/memory.usage_in_bytes"))
    both = _optional(f"{top}/memory.memsw.limit_in_bytes")
    limit = _limit(files.read(f"{top}/memory.limit_in_bytes"))
    both_limit = _limit(both)
    return Memory(
        usage=usage,
        working_set=max(usage - stat.get("total_inactive_file", 0), 0),
        rss=stat.get("total_rss", 0),
        cache=stat.get("total_cache", 0),
        mapped=stat.get("total_mapped_file", 0),
        kernel=int(_optional(f"{top}/memory.kmem.usage_in_bytes") or 0),
        page_faults=stat.get("total_pgfault", 0),
        major_page_faults=stat.get("total_pgmajfault", 0),
        peak=int(files.read(f"{top}/memory.max_usage_in_bytes")),
        failures=int(files.read(f"{top}/memory.failcnt")),
        oom_kills=_table(files.read(f"{top}/memory.oom_control")).get("oom_kill", 0),
        limit=limit,
        reservation=_limit(_optional(f"{top}/memory.soft_limit_in_bytes")),
        swap=stat.get("total_swap") if both else None,
        swap_limit=both_limit - limit if both_limit is not None and limit is not None else None,
    )


def _io_v1(top: str) -> tuple[Io, ...]:
    totals: dict[tuple[int, int], dict[str, int]] = {}
    for file, suffix in (("blkio.throttle.io_service_bytes_recursive", "b"), ("blkio.throttle.io_serviced_recursive", "n")):
        for line in _optional(f"{top}/{file}").splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[1] in ("Read", "Write"):
                major, _, minor = fields[0].partition(":")
                totals.setdefault((int(major), int(minor)), {})[fields[1] + suffix] = int(fields[2])
    return tuple(Io(*device, *(each.get(key, 0) for key in ("Readb", "Writeb", "Readn", "Writen"))) for device, each in totals.items())


def _hugetlb_v1(top: str) -> tuple[Hugetlb, ...]:
    found = []
    for size in page_sizes():
        base = f"{top}/hugetlb.{size}"
        if usage := _optional(f"{base}.usage_in_bytes"):
            peak, failures = _optional(f"{base}.max_usage_in_bytes"), _optional(f"{base}.failcnt")
            found.append(Hugetlb(size, int(usage), int(peak or 0), int(failures or 0)))
    return tuple(found)


# ---- parsing


def page_sizes() -> tuple[str, ...]:
    """Huge page sizes of this machine as control files name them: 2MB, 1GB."""
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except FileNotFoundError:
        return ()
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names)
    return tuple(f"{kb >> 20}GB" if kb >= 1 << 20 else f"{kb >> 10}MB" if kb >= 1 << 10 else f"{kb}KB" for kb in sizes)


def pressure(text: str) -> Stall | None:
    """A PSI file; None for an empty text, which a kernel without PSI amounts to."""
    lines: dict[str, Pressure] = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        lines[kind] = Pressure(float(values["avg10"]), float(values["avg60"]), float(values["avg300"]), int(values["total"]))
    return Stall(lines["some"], lines.get("full")) if "some" in lines else None


def _table(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split(" ", 1) for line in text.splitlines() if " " in line)
    return {name: int(value) for name, value in pairs if value.lstrip("-").isdigit()}


def _limit(text: str) -> int | None:
    text = text.strip()
    if text in ("", "max"):
        return None
    value = int(text)
    return None if value < 0 or value >= UNLIMITED_V1 else value


def _optional(path: str) -> str:
    """The file, empty where this kernel lacks it or has it switched off (PSI)."""
    try:
        return files.read(path).strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            return ""
        raise
