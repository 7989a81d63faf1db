"""The metrics that ListPodSandboxMetrics reports: names and labels are cAdvisor's, as dashboards know them."""

from __future__ import annotations

from typing import Final, NamedTuple

from protos.runtime.v1 import api_pb2 as v1

#: Labels of every metric. ``id`` is the cgroup, ``name`` the CRI id, ``container`` the name in the pod's specification.
BASE: Final = ("id", "name", "image", "container", "pod", "namespace")


class Metric(NamedTuple):
    """``labels`` come after the common ones."""

    help: str
    kind: v1.MetricType
    labels: tuple[str, ...] = ()


def _counter(text: str, *labels: str) -> Metric:
    return Metric(text, v1.COUNTER, labels)


def _gauge(text: str, *labels: str) -> Metric:
    return Metric(text, v1.GAUGE, labels)


CPU: Final = {
    "container_cpu_usage_seconds_total": _counter("CPU time used, in seconds.", "cpu"),
    "container_cpu_user_seconds_total": _counter("CPU time used in user mode, in seconds."),
    "container_cpu_system_seconds_total": _counter("CPU time used in the kernel, in seconds."),
    "container_cpu_cfs_periods_total": _counter("Periods of the CPU quota that have passed."),
    "container_cpu_cfs_throttled_periods_total": _counter("Periods in which the CPU quota ran out."),
    "container_cpu_cfs_throttled_seconds_total": _counter("Time held back by the CPU quota, in seconds."),
}
MEMORY: Final = {
    "container_memory_usage_bytes": _gauge("Memory in use, with all caches, in bytes."),
    "container_memory_working_set_bytes": _gauge("Memory in use without inactive file pages, in bytes; evictions go by it."),
    "container_memory_rss": _gauge("Anonymous memory, in bytes."),
    "container_memory_cache": _gauge("Page cache, in bytes."),
    "container_memory_mapped_file": _gauge("Mapped files in memory, in bytes."),
    "container_memory_kernel_usage": _gauge("Memory of the kernel's own, in bytes."),
    "container_memory_swap": _gauge("Swap in use, in bytes."),
    "container_memory_max_usage_bytes": _gauge("The most memory that was ever in use, in bytes."),
    "container_memory_failcnt": _counter("How often the memory limit was hit."),
    "container_memory_failures_total": _counter("Page faults.", "failure_type", "scope"),
    "container_oom_events_total": _counter("Processes that were killed for lack of memory."),
}
FILESYSTEM: Final = {
    "container_fs_usage_bytes": _gauge("Disk space that the writable layer takes, in bytes.", "device"),
    "container_fs_limit_bytes": _gauge("Size of the file system that the writable layer is on, in bytes.", "device"),
    "container_fs_inodes_total": _gauge("Inodes of the file system that the writable layer is on.", "device"),
    "container_fs_inodes_free": _gauge("Free inodes of the file system that the writable layer is on.", "device"),
    "container_fs_reads_total": _counter("Reads done.", "device"),
    "container_fs_reads_bytes_total": _counter("Bytes read.", "device"),
    "container_fs_writes_total": _counter("Writes done.", "device"),
    "container_fs_writes_bytes_total": _counter("Bytes written.", "device"),
    "container_blkio_device_usage_total": _counter("Bytes moved from and to a device.", "device", "major", "minor", "operation"),
}
HUGETLB: Final = {
    "container_hugetlb_usage_bytes": _gauge("Huge pages in use, in bytes.", "pagesize"),
    "container_hugetlb_max_usage_bytes": _gauge("The most huge pages that were ever in use, in bytes.", "pagesize"),
}
PRESSURE: Final = {
    f"container_pressure_{resource}_{kind}_seconds_total": _counter(f"Time in which {who} tasks waited for {what}, in seconds.")
    for resource, what in (("cpu", "a CPU"), ("memory", "memory"), ("io", "I/O"))
    for kind, who in (("waiting", "some"), ("stalled", "all"))
}
NETWORK: Final = {
    f"container_network_{direction}_{what}_total": _counter(f"{text} {verb}.", "interface")
    for direction, verb in (("receive", "received"), ("transmit", "sent"))
    for what, text in (
        ("bytes", "Bytes"),
        ("packets", "Packets"),
        ("packets_dropped", "Dropped packets that should have been"),
        ("errors", "Packets with errors"),
    )
}
PROCESSES: Final = {
    "container_processes": _gauge("Processes."),
    "container_threads": _gauge("Threads."),
    "container_threads_max": _gauge("The most threads there may be; 0 for no limit."),
    "container_file_descriptors": _gauge("Open file descriptors."),
    "container_sockets": _gauge("Open sockets."),
    "container_ulimits_soft": _gauge("Soft limits of the first process.", "ulimit"),
}
SPECIFIED: Final = {
    "container_spec_cpu_period": _gauge("Period of the CPU quota, in microseconds."),
    "container_spec_cpu_quota": _gauge("CPU quota, in microseconds for each period."),
    "container_spec_cpu_shares": _gauge("CPU shares."),
    "container_spec_memory_limit_bytes": _gauge("Memory limit, in bytes; 0 for none."),
    "container_spec_memory_reservation_limit_bytes": _gauge("Memory that is protected from being reclaimed, in bytes; 0 for none."),
    "container_spec_memory_swap_limit_bytes": _gauge("Swap limit, in bytes; 0 for none."),
}
LIFE: Final = {
    "container_last_seen": _gauge("When this was read, in seconds since the epoch."),
    "container_start_time_seconds": _gauge("When the container was started, in seconds since the epoch."),
}

METRICS: Final = {**CPU, **MEMORY, **FILESYSTEM, **HUGETLB, **PRESSURE, **NETWORK, **PROCESSES, **SPECIFIED, **LIFE}


def descriptors() -> list[v1.MetricDescriptor]:
    """All of them, also those that this machine has nothing to say about: the list may not change."""
    return [v1.MetricDescriptor(name=name, help=metric.help, label_keys=(*BASE, *metric.labels)) for name, metric in METRICS.items()]
