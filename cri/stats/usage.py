"""One sample of a control group: what the frequent RPCs need, in as few reads as possible (``shim.cgroups.stats`` reads everything)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from shim.cgroups import stats
from shim.cgroups.stats import Stall

#: Reads a control file by its path; empty where there is none.
Read = Callable[[str], bytes]

_UNLIMITED: Final = stats.UNLIMITED_V1


class Usage(NamedTuple):
    """Nanoseconds and bytes. None: not accounted on this machine, or no limit."""

    cpu: int | None = None
    memory: int | None = None
    working_set: int = 0
    rss: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    memory_limit: int | None = None
    swap: int | None = None
    swap_limit: int | None = None
    pids: int | None = None
    cpu_stall: Stall | None = None
    memory_stall: Stall | None = None
    io_stall: Stall | None = None


def read_v1(directories: Mapping[str, str], read: Read) -> Usage | None:
    """A sample of the group whose directory for each controller is given; None if it is gone."""
    account, memory, pids = directories.get("cpuacct"), directories.get("memory"), directories.get("pids")
    cpu = number(read(f"{account}/cpuacct.usage")) if account else None
    count = number(read(f"{pids}/pids.current")) if pids else None
    stat = read(f"{memory}/memory.stat") if memory else b""
    if not stat:
        return Usage(cpu=cpu, pids=count) if cpu is not None else None
    used = number(read(f"{memory}/memory.usage_in_bytes")) or 0
    most = limit(read(f"{memory}/memory.limit_in_bytes"))
    both = read(f"{memory}/memory.memsw.limit_in_bytes")  # memory and swap together; absent without swap accounting
    most_both = limit(both)
    return Usage(
        cpu,
        used,
        max(used - field(stat, b"total_inactive_file"), 0),
        field(stat, b"total_rss"),
        field(stat, b"total_pgfault"),
        field(stat, b"total_pgmajfault"),
        most,
        field(stat, b"total_swap") if both else None,
        most_both - most if most_both is not None and most is not None else None,
        count,
    )


def read_v2(top: str, read: Read) -> Usage | None:
    """The same in the unified hierarchy."""
    cpu = read(f"{top}/cpu.stat")
    if not cpu:
        return None
    stat = read(f"{top}/memory.stat")
    used = number(read(f"{top}/memory.current")) or 0
    return Usage(
        field(cpu, b"usage_usec") * 1000,
        used if stat else None,
        max(used - field(stat, b"inactive_file"), 0),
        field(stat, b"anon"),
        field(stat, b"pgfault"),
        field(stat, b"pgmajfault"),
        limit(read(f"{top}/memory.max")),
        number(read(f"{top}/memory.swap.current")),
        limit(read(f"{top}/memory.swap.max")),
        number(read(f"{top}/pids.current")),
        _stall(read(f"{top}/cpu.pressure")),
        _stall(read(f"{top}/memory.pressure")),
        _stall(read(f"{top}/io.pressure")),
    )


def total(samples: Iterable[Usage]) -> Usage | None:
    """Of several groups together; pressure does not add up. A limit holds only if each has one. None of none."""
    found = list(samples)
    if not found:
        return None
    return Usage(
        _sum(each.cpu for each in found),
        _sum(each.memory for each in found),
        sum(each.working_set for each in found),
        sum(each.rss for each in found),
        sum(each.page_faults for each in found),
        sum(each.major_page_faults for each in found),
        _sum_all([each.memory_limit for each in found]),
        _sum(each.swap for each in found),
        _sum_all([each.swap_limit for each in found]),
        _sum(each.pids for each in found),
    )


def field(table: bytes, name: bytes) -> int:
    """The number behind ``name`` in a file of names and numbers; 0 if it is not there."""
    at = (b"\n" + table).find(b"\n" + name + b" ")
    if at < 0:
        return 0
    at += len(name) + 1
    end = table.find(b"\n", at)
    return int(table[at : end if end >= 0 else len(table)])


def number(text: bytes) -> int | None:
    """A file that holds one number; None for an absent one."""
    return int(text) if text else None


def limit(text: bytes) -> int | None:
    """A file that holds a limit; None for an absent file and for no limit (``max``, and version 1's largest number)."""
    text = text.strip()
    if not text or text == b"max":
        return None
    value = int(text)
    return None if value < 0 or value >= _UNLIMITED else value


def _stall(text: bytes) -> Stall | None:
    return stats.pressure(text.decode("ascii", "replace")) if text else None


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _sum_all(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
