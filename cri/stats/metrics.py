"""ListMetricDescriptors, ListPodSandboxMetrics and StreamPodSandboxMetrics.

Everything is read in a thread: a scrape is rare, reads many files, and goes through the descriptors of every process.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, NamedTuple

from cri.containers.model import Container
from cri.pods.model import Pod, Pods
from cri.state.listing import pages
from cri.stats import groups, network, processes
from cri.stats.descriptors import METRICS, descriptors
from cri.stats.layers import Layer
from cri.stats.meters import Meters
from cri.stats.network import Interface
from cri.stats.pods import own_group, parents
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim import cgroups
from shim.cgroups import stats as cgroup_stats
from shim.cgroups.group import Group
from shim.cgroups.stats import Cpu, Io, Memory, Stall, Stats
from shim.errors import Failure

_SECOND: Final = 1_000_000_000
_KERNEL_SHARES: Final = 1024  # of a group that nobody gave any

Labels = tuple[str, ...]


class ContainerTarget(NamedTuple):
    """A running container, as the thread needs to know it."""

    id: str
    labels: Labels
    group: Group
    pid: int
    started_at: int
    cpu_shares: int
    layer: Layer | None


class PodTarget(NamedTuple):
    """A ready pod. ``group`` is None where the pod has none of its own."""

    id: str
    labels: Labels
    network_labels: Labels
    group: Group | None
    interfaces: tuple[Interface, ...]
    containers: list[ContainerTarget]


class Disk(NamedTuple):
    """The file system of the writable layers."""

    device: str
    size: int
    inodes: int
    free_inodes: int


def list_descriptors() -> v1.ListMetricDescriptorsResponse:
    """What there may be."""
    return v1.ListMetricDescriptorsResponse(descriptors=descriptors())


async def list_metrics(*, pods: Pods, meters: Meters, supervisor: Supervisor) -> v1.ListPodSandboxMetricsResponse:
    """All metrics of ready pods and their running containers, as of now."""
    return v1.ListPodSandboxMetricsResponse(pod_metrics=await _collect(pods, meters, supervisor))


async def stream_metrics(*, pods: Pods, meters: Meters, supervisor: Supervisor) -> AsyncIterator[v1.StreamPodSandboxMetricsResponse]:
    """The same in several messages."""
    for page in pages(await _collect(pods, meters, supervisor)):
        yield v1.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=page)


async def _collect(pods: Pods, meters: Meters, supervisor: Supervisor) -> list[v1.PodSandboxMetrics]:
    async with meters.scraping:
        return await _scrape(pods, meters, supervisor)


async def _scrape(pods: Pods, meters: Meters, supervisor: Supervisor) -> list[v1.PodSandboxMetrics]:
    counted = parents(pods)
    ready = [pod for pod in pods.store if pod.state == v1.SANDBOX_READY]
    await meters.layers.first([container for pod in ready for container in pod.containers.values() if container.running])
    targets = [
        _pod_target(pod, own_group(pod, counted), await network.read(pod, supervisor), meters)
        for pod in ready
        if pod.state == v1.SANDBOX_READY
    ]
    return await asyncio.to_thread(_read_all, targets, meters.layers.mountpoint)


def _pod_target(pod: Pod, own: bool, interfaces: tuple[Interface, ...], meters: Meters) -> PodTarget:
    metadata, parent = pod.config.metadata, pod.config.linux.cgroup_parent
    group = groups.parent(meters.layout, parent) if own and parent.strip("/.") else None
    where = (metadata.name, metadata.namespace)
    path = group.path if group is not None else ""
    return PodTarget(
        pod.id,
        (path, "", "", "", *where),
        (path, pod.id, "", "POD", *where),  # under this name the kubelet's users have known the network since there were pause containers
        group,
        interfaces,
        [_container_target(container, where, meters) for container in pod.containers.values() if container.running],
    )


def _container_target(container: Container, pod: Labels, meters: Meters) -> ContainerTarget:
    facts, config = container.facts, container.config
    group = groups.of(meters.layout, facts.cgroups_path)
    return ContainerTarget(
        container.id,
        (group.path, container.id, facts.image_name, config.metadata.name, *pod),
        group,
        facts.pid,
        facts.started_at,
        config.linux.resources.cpu_shares or _KERNEL_SHARES,
        meters.layers.get(container),
    )


# ---- in the thread


class _Sheet:
    """Metrics with the same common labels."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self.metrics: list[v1.Metric] = []

    def add(self, name: str, value: int, *labels: str, timestamp: int = 0) -> None:
        """``timestamp`` (ns) only for what was not measured now."""
        self.metrics.append(
            v1.Metric(
                name=name,
                timestamp=timestamp,
                metric_type=METRICS[name].kind,
                label_values=self._labels + labels,
                value={"value": value},
            )
        )


def _read_all(targets: Sequence[PodTarget], mountpoint: str) -> list[v1.PodSandboxMetrics]:
    disk = _disk(mountpoint)
    return [_pod(target, disk) for target in targets]


def _pod(target: PodTarget, disk: Disk) -> v1.PodSandboxMetrics:
    whole, net = _Sheet(target.labels), _Sheet(target.network_labels)
    stats = _stats(target.group) if target.group is not None else None
    if stats is not None:
        _add_group(whole, stats)
    for one in target.interfaces:
        _add_interface(net, one)
    containers = [v1.ContainerMetrics(container_id=each.id, metrics=_container(each, disk)) for each in target.containers]
    return v1.PodSandboxMetrics(pod_sandbox_id=target.id, metrics=whole.metrics + net.metrics, container_metrics=containers)


def _container(target: ContainerTarget, disk: Disk) -> list[v1.Metric]:
    """Nothing of a container that has ended meanwhile."""
    stats = _stats(target.group)
    if stats is None:
        return []
    sheet = _Sheet(target.labels)
    _add_group(sheet, stats)
    _add_specified(sheet, stats, target.cpu_shares)
    _add_disk(sheet, target.layer, disk)
    _add_processes(sheet, stats, processes.read(cgroups.pids(target.group), target.pid))
    sheet.add("container_last_seen", time.time_ns() // _SECOND)
    sheet.add("container_start_time_seconds", target.started_at // _SECOND)
    return sheet.metrics


def _stats(group: Group) -> Stats | None:
    try:
        return cgroup_stats.read(group)
    except Failure as failure:
        if failure.errno != errno.ENOENT:
            raise
        return None


def _add_group(sheet: _Sheet, stats: Stats) -> None:
    if stats.cpu is not None:
        _add_cpu(sheet, stats.cpu)
        _add_pressure(sheet, "cpu", stats.cpu.stall)
    if stats.memory is not None:
        _add_memory(sheet, stats.memory)
        _add_pressure(sheet, "memory", stats.memory.stall)
    _add_pressure(sheet, "io", stats.io_stall)
    for one in stats.io:
        _add_io(sheet, one)
    for pages_of in stats.hugetlb:
        sheet.add("container_hugetlb_usage_bytes", pages_of.usage, pages_of.page_size)
        if pages_of.peak is not None:
            sheet.add("container_hugetlb_max_usage_bytes", pages_of.peak, pages_of.page_size)


def _add_cpu(sheet: _Sheet, cpu: Cpu) -> None:
    sheet.add("container_cpu_usage_seconds_total", cpu.usage // _SECOND, "total")
    sheet.add("container_cpu_user_seconds_total", cpu.user // _SECOND)
    sheet.add("container_cpu_system_seconds_total", cpu.system // _SECOND)
    if cpu.quota is not None:
        sheet.add("container_cpu_cfs_periods_total", cpu.periods)
        sheet.add("container_cpu_cfs_throttled_periods_total", cpu.throttled_periods)
        sheet.add("container_cpu_cfs_throttled_seconds_total", cpu.throttled // _SECOND)


def _add_memory(sheet: _Sheet, memory: Memory) -> None:
    for name, value in (
        ("container_memory_usage_bytes", memory.usage),
        ("container_memory_working_set_bytes", memory.working_set),
        ("container_memory_rss", memory.rss),
        ("container_memory_cache", memory.cache),
        ("container_memory_mapped_file", memory.mapped),
        ("container_memory_kernel_usage", memory.kernel),
        ("container_memory_swap", memory.swap or 0),
        ("container_memory_max_usage_bytes", memory.peak),
        ("container_memory_failcnt", memory.failures),
        ("container_oom_events_total", memory.oom_kills),
    ):
        sheet.add(name, value)
    for kind, value in (("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)):
        for scope in ("container", "hierarchy"):
            sheet.add("container_memory_failures_total", value, kind, scope)


def _add_pressure(sheet: _Sheet, resource: str, stall: Stall | None) -> None:
    if stall is None:
        return
    sheet.add(f"container_pressure_{resource}_waiting_seconds_total", stall.some.total // 1_000_000)
    if stall.full is not None:
        sheet.add(f"container_pressure_{resource}_stalled_seconds_total", stall.full.total // 1_000_000)


def _add_io(sheet: _Sheet, one: Io) -> None:
    device = device_name(one.major, one.minor)
    sheet.add("container_fs_reads_total", one.reads, device)
    sheet.add("container_fs_reads_bytes_total", one.read_bytes, device)
    sheet.add("container_fs_writes_total", one.writes, device)
    sheet.add("container_fs_writes_bytes_total", one.written_bytes, device)
    for operation, value in (("Read", one.read_bytes), ("Write", one.written_bytes)):
        sheet.add("container_blkio_device_usage_total", value, device, str(one.major), str(one.minor), operation)


def _add_interface(sheet: _Sheet, one: Interface) -> None:
    for direction, values in (
        ("receive", (one.rx_bytes, one.rx_packets, one.rx_dropped, one.rx_errors)),
        ("transmit", (one.tx_bytes, one.tx_packets, one.tx_dropped, one.tx_errors)),
    ):
        for what, value in zip(("bytes", "packets", "packets_dropped", "errors"), values, strict=True):
            sheet.add(f"container_network_{direction}_{what}_total", value, one.name)


def _add_specified(sheet: _Sheet, stats: Stats, cpu_shares: int) -> None:
    sheet.add("container_spec_cpu_shares", cpu_shares)
    if stats.cpu is not None and stats.cpu.period is not None:
        sheet.add("container_spec_cpu_period", stats.cpu.period)
        if stats.cpu.quota is not None:
            sheet.add("container_spec_cpu_quota", stats.cpu.quota)
    if stats.memory is not None:
        sheet.add("container_spec_memory_limit_bytes", stats.memory.limit or 0)
        sheet.add("container_spec_memory_reservation_limit_bytes", stats.memory.reservation or 0)
        sheet.add("container_spec_memory_swap_limit_bytes", stats.memory.swap_limit or 0)


def _add_disk(sheet: _Sheet, layer: Layer | None, disk: Disk) -> None:
    if layer is not None:
        sheet.add("container_fs_usage_bytes", layer.bytes, disk.device, timestamp=layer.taken)
    sheet.add("container_fs_limit_bytes", disk.size, disk.device)
    sheet.add("container_fs_inodes_total", disk.inodes, disk.device)
    sheet.add("container_fs_inodes_free", disk.free_inodes, disk.device)


def _add_processes(sheet: _Sheet, stats: Stats, found: processes.Processes) -> None:
    sheet.add("container_processes", found.processes)
    sheet.add("container_threads", stats.pids if stats.pids is not None else found.threads)
    sheet.add("container_threads_max", stats.pids_limit or 0)
    sheet.add("container_file_descriptors", found.descriptors)
    sheet.add("container_sockets", found.sockets)
    if found.open_files is not None:
        sheet.add("container_ulimits_soft", found.open_files, "max_open_files")


def _disk(mountpoint: str) -> Disk:
    facts, device = os.statvfs(mountpoint), os.stat(mountpoint).st_dev
    return Disk(device_name(os.major(device), os.minor(device)), facts.f_blocks * facts.f_frsize, facts.f_files, facts.f_ffree)


@functools.lru_cache(maxsize=256)
def device_name(major: int, minor: int) -> str:
    """``/dev/sda1``; empty for a file system without a block device."""
    try:
        return "/dev/" + os.path.basename(os.readlink(f"/sys/dev/block/{major}:{minor}"))
    except FileNotFoundError:
        return ""
