"""Interface counters of a pod, without entering its network namespace: this process has threads and never calls setns.

A process in the namespace shows its interfaces in /proc/<pid>/net/dev. Which namespace that is gets checked by its inode, as the pid
could be another process's by now, and a privileged container may have left its pod's namespace. Where no process qualifies, a netlink
socket tells, which the supervisor's child opens inside.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from cri.pods.model import Pod
from cri.supervisor import Supervisor
from shim.errors import Failure

DEFAULT: Final = "eth0"  # what every CNI configuration and the built-in bridge call the first interface

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_COUNTERS: Final = struct.Struct("=8Q")  # the beginning of struct rtnl_link_stats64
_GETLINK, _NEWLINK, _DONE, _ERROR = 18, 16, 3, 2
_REQUEST_DUMP: Final = 0x1 | 0x300
_IFINFOMSG: Final = 16
_IFLA_IFNAME, _IFLA_STATS64 = 3, 23

log = logging.getLogger("cri.stats")


class Interface(NamedTuple):
    """Counters since the interface was made."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


async def read(pod: Pod, supervisor: Supervisor) -> tuple[Interface, ...]:
    """The pod's interfaces without loopback, the default one first; none for the host's network and for pods that are stopped.

    A namespace that cannot be asked is reported and has none: what is known of the other pods must not depend on it.
    """
    if not pod.facts.netns_path or not pod.ready:
        return ()
    try:
        inode = os.stat(pod.facts.netns_path).st_ino
        for pid in _pids(pod):
            found = of_process(pid, inode)
            if found is not None:
                return found
        return await _ask(pod, supervisor)
    except (OSError, Failure) as error:
        if not pod.stopping:  # else its namespace is going
            log.warning("sandbox %s: its interfaces cannot be read: %s", pod.id, error)
        return ()


def _pids(pod: Pod) -> Iterable[int]:
    """Processes that should be in the pod's namespace."""
    if pod.facts.pid:
        yield pod.facts.pid
    for container in pod.containers.values():
        if container.facts.pid and not container.facts.finished_at:
            yield container.facts.pid


def of_process(pid: int, inode: int) -> tuple[Interface, ...] | None:
    """What a process sees; None if it is gone or in another namespace than ``inode``."""
    try:
        # From here on the pid cannot become another process's.
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        fd = os.open("net/dev", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        try:
            # The file keeps the namespace it was opened in.
            if os.stat("ns/net", dir_fd=process).st_ino != inode:
                return None
            text = b""
            while chunk := os.read(fd, 65536):
                text += chunk
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return None
    finally:
        os.close(process)
    return ordered(parse(text.decode("utf-8", "replace")))


def parse(text: str) -> list[Interface]:
    """/proc/net/dev: two header lines, then ``name: `` and 16 numbers."""
    found = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.rpartition(":")
        numbers = rest.split()
        if len(numbers) >= 16:
            received, sent = map(int, numbers[0:4]), map(int, numbers[8:12])
            found.append(Interface(name.strip(), *received, *sent))
    return found


def ordered(interfaces: Iterable[Interface]) -> tuple[Interface, ...]:
    """Without loopback; ``eth0`` first, or whichever the kernel lists first."""
    return tuple(sorted((one for one in interfaces if one.name != "lo"), key=lambda one: one.name != DEFAULT))


async def _ask(pod: Pod, supervisor: Supervisor) -> tuple[Interface, ...]:
    fd = await supervisor.pod_netlink(pod.id)
    with socket.socket(fileno=fd) as inside:
        inside.setblocking(False)  # a dump is answered inside send(2) and recv(2)
        inside.send(_HEADER.pack(_HEADER.size + _IFINFOMSG, _GETLINK, _REQUEST_DUMP, 1, 0) + bytes(_IFINFOMSG))
        found: list[Interface] = []
        while True:
            done, some = links(inside.recv(1 << 16))
            found += some
            if done:
                return ordered(found)


def links(data: bytes) -> tuple[bool, list[Interface]]:
    """Interfaces in netlink messages, and whether these were the last ones. Raises OSError for an error message."""
    found: list[Interface] = []
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            break
        if kind == _DONE:
            return True, found
        if kind == _ERROR:
            number = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
            raise OSError(number, os.strerror(number), "RTM_GETLINK")
        if kind == _NEWLINK:
            found += _link(data[offset + _HEADER.size + _IFINFOMSG : offset + length])
        offset += (length + 3) & ~3
    return False, found


def _link(attributes: bytes) -> list[Interface]:
    """One link's attributes; a link without a name or counters is none."""
    name, counters, offset = "", None, 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if length < _ATTRIBUTE.size:
            break
        value = attributes[offset + _ATTRIBUTE.size : offset + length]
        if kind == _IFLA_IFNAME:
            name = value.rstrip(b"\0").decode("utf-8", "replace")
        elif kind == _IFLA_STATS64:
            counters = _COUNTERS.unpack_from(value)
        offset += (length + 3) & ~3
    if not name or counters is None:
        return []
    rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped = counters
    return [Interface(name, rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped)]
