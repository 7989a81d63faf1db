"""Samples as CRI messages."""

from __future__ import annotations

from cri.stats.layers import Layer
from cri.stats.meters import Reading
from cri.stats.network import Interface
from protos.runtime.v1 import api_pb2 as v1
from shim.cgroups.stats import Pressure, Stall


def cpu(reading: Reading) -> v1.CpuUsage | None:
    """CPU time and rate; None where it is not accounted. The rate is absent until there are two samples."""
    time, sample, rate = reading
    if sample.cpu is None:
        return None
    message = v1.CpuUsage(timestamp=time, usage_core_nano_seconds={"value": sample.cpu}, psi=_psi(sample.cpu_stall))
    if rate is not None:
        message.usage_nano_cores.value = rate
    return message


def memory(reading: Reading) -> v1.MemoryUsage | None:
    """Memory; ``available_bytes`` only under a limit. None where it is not accounted."""
    time, sample, _ = reading
    if sample.memory is None:
        return None
    message = v1.MemoryUsage(
        timestamp=time,
        working_set_bytes={"value": sample.working_set},
        usage_bytes={"value": sample.memory},
        rss_bytes={"value": sample.rss},
        page_faults={"value": sample.page_faults},
        major_page_faults={"value": sample.major_page_faults},
        psi=_psi(sample.memory_stall),
    )
    if sample.memory_limit is not None:
        message.available_bytes.value = max(sample.memory_limit - sample.working_set, 0)
    return message


def swap(reading: Reading) -> v1.SwapUsage | None:
    """Swap; None without swap accounting."""
    time, sample, _ = reading
    if sample.swap is None:
        return None
    message = v1.SwapUsage(timestamp=time, swap_usage_bytes={"value": sample.swap})
    if sample.swap_limit is not None:
        message.swap_available_bytes.value = max(sample.swap_limit - sample.swap, 0)
    return message


def io(reading: Reading) -> v1.IoUsage | None:
    """I/O pressure; None on kernels and hierarchies without it."""
    stall = reading.usage.io_stall
    return v1.IoUsage(timestamp=reading.time, psi=_psi(stall)) if stall is not None else None


def processes(reading: Reading) -> v1.ProcessUsage | None:
    """Tasks, as the pids controller counts them; None without it."""
    pids = reading.usage.pids
    return v1.ProcessUsage(timestamp=reading.time, process_count={"value": pids}) if pids is not None else None


def network(time: int, interfaces: tuple[Interface, ...]) -> v1.NetworkUsage | None:
    """The first interface is the default one; None without any."""
    if not interfaces:
        return None
    default, *others = map(_interface, interfaces)
    return v1.NetworkUsage(timestamp=time, default_interface=default, interfaces=others)


def layer(measured: Layer, mountpoint: str) -> v1.FilesystemUsage:
    """A writable layer, with the time of its measurement."""
    return v1.FilesystemUsage(
        timestamp=measured.taken,
        fs_id={"mountpoint": mountpoint},
        used_bytes={"value": measured.bytes},
        inodes_used={"value": measured.inodes},
    )


def _interface(one: Interface) -> v1.NetworkInterfaceUsage:
    return v1.NetworkInterfaceUsage(
        name=one.name,
        rx_bytes={"value": one.rx_bytes},
        rx_errors={"value": one.rx_errors},
        tx_bytes={"value": one.tx_bytes},
        tx_errors={"value": one.tx_errors},
    )


def _psi(stall: Stall | None) -> v1.PsiStats | None:
    """The kernel counts µs, CRI ns. There is no ``full`` for the CPU of a machine."""
    if stall is None:
        return None
    return v1.PsiStats(Some=_data(stall.some), Full=_data(stall.full) if stall.full is not None else None)


def _data(line: Pressure) -> v1.PsiData:
    return v1.PsiData(Total=line.total * 1000, Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300)
