"""LinuxContainerResources to OCI resources, and the merge that UpdateContainerResources means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cri.errors import InvalidArgument
from cri.spec import strings
from cri.spec.inputs import HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.linux import cpus
from shim.oci import spec as oci

_CPU_LIST = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,5}(KB|MB|GB)")
_UNIFIED = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
_PERIODS, _LEAST_QUOTA = (1000, 1000000), 1000  # µs, the kernel's
_NUMBERS = ("cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "memory_swap_limit_in_bytes")


def build(
    wanted: v1.LinuxContainerResources,
    host: HostFacts,
    *,
    devices: tuple[oci.DeviceCgroup, ...] = (),
    block_io: oci.BlockIO | None = None,
    field: str = "config.linux.resources",
) -> oci.Resources:
    """The limits of a request. Zero and empty mean "not set", as everywhere in CRI; -1 is "no limit" for quota, memory and swap."""
    check(wanted, field)
    limit, swap = wanted.memory_limit_in_bytes, wanted.memory_swap_limit_in_bytes
    if swap > 0 and limit <= 0:  # the kernel has a limit of memory plus swap, or one of swap alone: neither can be told from this
        raise InvalidArgument(f"{swap}, but the memory has no limit", field=f"{field}.memory_swap_limit_in_bytes")
    if limit and not swap:
        swap = limit  # memory + swap: a container does not swap unless the request says so
    memory = oci.Memory(limit=limit or None, swap=(swap or None) if host.swap else None)
    cpu = oci.CPU(
        shares=wanted.cpu_shares or None,
        quota=wanted.cpu_quota or None,
        period=wanted.cpu_period or None,
        cpus=wanted.cpuset_cpus,
        mems=wanted.cpuset_mems,
    )
    if wanted.unified and host.cgroup_version == 1:
        raise InvalidArgument("set, but this host has cgroup v1", field=f"{field}.unified")
    pages = _hugepages(wanted.hugepage_limits, host, f"{field}.hugepage_limits")
    return oci.Resources(
        devices=devices,
        memory=memory if memory != oci.Memory() else None,
        cpu=cpu if cpu != oci.CPU() else None,
        block_io=block_io,
        hugepage_limits=tuple(oci.HugepageLimit(size, number) for size, number in pages.items()),
        unified=dict(wanted.unified),
    )


def _hugepages(limits: Iterable[v1.HugepageLimit], host: HostFacts, field: str) -> dict[str, int]:
    """Limits by page size. The kubelet sends 0 for every size that a container does not ask for, also where nothing could use it."""
    found: dict[str, int] = {}
    for i, page in enumerate(limits):
        if page.limit and not host.hugetlb:
            raise InvalidArgument("the hugetlb cgroup controller is not available", field=f"{field}[{i}].limit")
        if page.limit and host.hugepage_sizes and page.page_size not in host.hugepage_sizes:
            sizes = ", ".join(sorted(host.hugepage_sizes))
            raise InvalidArgument(f"this host has pages of {sizes}, not of {page.page_size!r:.40}", field=f"{field}[{i}].page_size")
        found[page.page_size] = page.limit
    return found if host.hugetlb else {}


def merge(stored: v1.LinuxContainerResources, update: v1.LinuxContainerResources) -> v1.LinuxContainerResources:
    """The request that stands after an update: what ``update`` leaves unset keeps the stored value. Both stay as they are.

    A stored swap limit below the new memory limit would be refused by the kernel, so it follows, unless the update sets it. The OOM score
    is given to processes when they start, and what runs keeps it: an update leaves what is reported as it is.
    """
    check(update, "linux")
    merged = v1.LinuxContainerResources()
    merged.CopyFrom(stored)
    for name in (*_NUMBERS, "cpuset_cpus", "cpuset_mems"):
        value = getattr(update, name)
        if value:
            setattr(merged, name, value)
    limit, swap = merged.memory_limit_in_bytes, merged.memory_swap_limit_in_bytes
    if not update.memory_swap_limit_in_bytes and 0 < swap < limit:
        merged.memory_swap_limit_in_bytes = limit
    pages = {h.page_size: h.limit for h in (*stored.hugepage_limits, *update.hugepage_limits)}
    del merged.hugepage_limits[:]
    merged.hugepage_limits.extend(v1.HugepageLimit(page_size=size, limit=number) for size, number in pages.items())
    merged.unified.update(update.unified)
    return merged


def check(wanted: v1.LinuxContainerResources, field: str) -> None:
    """Refuse what no kernel accepts, before anything is made."""
    for name in _NUMBERS:
        least = 0 if name in ("cpu_period", "cpu_shares") else -1
        if getattr(wanted, name) < least:
            raise InvalidArgument(f"{getattr(wanted, name)} is below {least}", field=f"{field}.{name}")
    if wanted.cpu_period and not _PERIODS[0] <= wanted.cpu_period <= _PERIODS[1]:
        raise InvalidArgument(f"{wanted.cpu_period} µs is outside {_PERIODS[0]}..{_PERIODS[1]}", field=f"{field}.cpu_period")
    if 0 < wanted.cpu_quota < _LEAST_QUOTA:
        raise InvalidArgument(f"{wanted.cpu_quota} µs is below {_LEAST_QUOTA}", field=f"{field}.cpu_quota")
    limit, swap = wanted.memory_limit_in_bytes, wanted.memory_swap_limit_in_bytes
    if limit > 0 and 0 < swap < limit:
        raise InvalidArgument(f"{swap} is below the memory limit {limit}", field=f"{field}.memory_swap_limit_in_bytes")
    oom_score_adj(wanted, field)
    for name in ("cpuset_cpus", "cpuset_mems"):
        value = getattr(wanted, name)
        if value and not _CPU_LIST.fullmatch(value):
            raise InvalidArgument(f"{value!r:.80} is not a list of numbers and ranges", field=f"{field}.{name}")
    for i, page in enumerate(wanted.hugepage_limits):
        if not _PAGE_SIZE.fullmatch(page.page_size):
            raise InvalidArgument(f"{page.page_size!r:.40} is not a page size", field=f"{field}.hugepage_limits[{i}].page_size")
    for key, value in wanted.unified.items():
        # A key is the name of a file in the container's cgroup: with a slash it would be another cgroup's.
        if not _UNIFIED.fullmatch(key):
            raise InvalidArgument(f"{key!r:.80} is not the name of a cgroup file", field=f"{field}.unified")
        strings.text(value, f"{field}.unified[{key}]")


def oom_score_adj(wanted: v1.LinuxContainerResources, field: str = "config.linux.resources") -> int:
    """The badness adjustment of the container's processes."""
    if not -1000 <= wanted.oom_score_adj <= 1000:
        raise InvalidArgument(f"{wanted.oom_score_adj} is outside -1000..1000", field=f"{field}.oom_score_adj")
    return wanted.oom_score_adj


def exec_affinity(wanted: v1.LinuxContainerResources, policy: str) -> oci.ExecCPUAffinity | None:
    """Where exec sessions run: with the policy "first" on the first processor of the container's cpuset, if it has one."""
    if policy != "first" or not wanted.cpuset_cpus:
        return None
    try:
        first = str(cpus.parse(wanted.cpuset_cpus)[0])
    except ValueError as error:
        raise InvalidArgument(str(error), field="config.linux.resources.cpuset_cpus") from None
    return oci.ExecCPUAffinity(initial="", final=first)
