"""host-local: addresses reserved by files, one per address, named after it. On disk as the plugin does it, and side by side with it.

``DATADIR/NETWORK/ADDRESS`` has the container's id, CR LF and the interface; ``last_reserved_ip.N`` the newest address of range set N, from
where the search goes on; ``lock`` is held with flock(2) meanwhile. Whoever creates the file exclusively has the address.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from cri.network.ipam import Address, Subnet
from cri.network.native.options import HostLocal, Range
from cri.network.native.result import Ip, Result, parse_route

DEFAULT = "/var/lib/cni/networks"
_LOCK, _LAST = "lock", "last_reserved_ip."
_BREAK = "\r\n"
_PAUSE = 0.003  # seconds between two looks at a lock that somebody else holds: they hold it for as long


@dataclass(frozen=True, slots=True)
class Span:
    """One range: addresses of ``subnet`` from ``first`` to ``last``, but for the gateway."""

    subnet: Subnet
    first: Address
    last: Address
    gateway: Address

    def __contains__(self, address: object) -> bool:
        version = getattr(address, "version", 0)
        return version == self.subnet.version and int(self.first) <= int(address) <= int(self.last)  # type: ignore[call-overload]

    def overlaps(self, other: Span) -> bool:
        return self.subnet.version == other.subnet.version and int(self.first) <= int(other.last) and int(other.first) <= int(self.last)


Spans = tuple[Span, ...]


def ranges(conf: HostLocal, runtime: Mapping[str, Any]) -> tuple[Spans, ...]:
    """The range sets, those of the capability ``ipRanges`` first. An address is taken from each. Raises ValueError."""
    sets: list[Sequence[Range]] = [[Range(**_fields(r)) for r in one] for one in runtime.get("ipRanges", ())]
    if conf.subnet:
        sets.append([Range(subnet=conf.subnet, range_start=conf.range_start, range_end=conf.range_end, gateway=conf.gateway)])
    sets += conf.ranges
    if not sets:
        raise ValueError("no IP ranges specified")
    found = [tuple(_span(one) for one in each) for each in sets]
    for number, spans in enumerate(found):
        if not spans:
            raise ValueError(f"range set {number} is empty")
        if len({s.subnet.version for s in spans}) != 1:
            raise ValueError(f"range set {number} has addresses of both families")
    flat = [(n, s) for n, spans in enumerate(found) for s in spans]
    for index, (number, span) in enumerate(flat):
        for other, later in flat[index + 1 :]:
            if span.overlaps(later):
                raise ValueError(f"range set {number} overlaps with {other}: {span.subnet}, {later.subnet}")
    return tuple(found)


def _fields(raw: Mapping[str, str]) -> dict[str, str]:
    names = {"subnet": "subnet", "rangeStart": "range_start", "rangeEnd": "range_end", "gateway": "gateway"}
    return {names[key]: value for key, value in raw.items()}


def _span(conf: Range) -> Span:
    subnet = ip_network(conf.subnet)  # refuses host bits
    if subnet.num_addresses < 4:
        raise ValueError(f"network {subnet} is too small to allocate from")
    first = ip_address(conf.range_start) if conf.range_start else subnet.network_address + 1
    last = ip_address(conf.range_end) if conf.range_end else subnet.broadcast_address - (subnet.version == 4)
    for name, address in (("rangeStart", first), ("rangeEnd", last)):
        if address not in subnet:
            raise ValueError(f"{name} {address} is not in network {subnet}")
    gateway = ip_address(conf.gateway) if conf.gateway else subnet.network_address + 1
    return Span(subnet, first, last, gateway)


def candidates(spans: Spans, last: Address | None) -> Iterator[tuple[Address, Span]]:
    """Every address of a range set once, gateways left out: from the one after ``last``, through the ranges, round to it again."""
    start = next((n for n, span in enumerate(spans) if last is not None and last in span), None)
    for turn in range(len(spans) + 1):
        span = spans[((start or 0) + turn) % len(spans)]
        first, end = int(span.first), int(span.last)
        if start is not None and last is not None:
            if turn == 0:
                first = int(last) + 1
            elif turn == len(spans):
                end = int(last)
        elif turn == len(spans):
            return
        kind = type(span.first)
        for number in range(first, end + 1):
            if number != int(span.gateway):
                yield kind(number), span


def resolv_conf(path: str) -> dict[str, Any]:
    """``dns`` of a result, from a file in resolv.conf's format."""
    found: dict[str, Any] = {}
    names = {"nameserver": "nameservers", "search": "search", "options": "options"}
    with open(path) as file:
        for line in file:
            words = line.split()
            if len(words) < 2 or words[0][0] in "#;":
                continue
            if words[0] == "domain":
                found["domain"] = words[1]
            elif words[0] in names:
                found.setdefault(names[words[0]], []).extend(words[1:2] if words[0] == "nameserver" else words[1:])
    return found


class Store:
    """The directory of one network."""

    def __init__(self, network: str, data_dir: str) -> None:
        self._directory = os.path.join(data_dir or DEFAULT, network)

    @contextlib.asynccontextmanager
    async def locked(self, patience: float) -> AsyncIterator[int]:
        """A descriptor of the directory while nobody else changes it. Raises TimeoutError: a holder that hangs must not hang us."""
        os.makedirs(self._directory, mode=0o755, exist_ok=True)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o750, dir_fd=directory)
            try:
                async with asyncio.timeout(patience):
                    while not _try(lock):
                        await asyncio.sleep(_PAUSE)
                yield directory
            finally:
                os.close(lock)
        finally:
            os.close(directory)


def _try(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def reserve(directory: int, sets: Sequence[Spans], owner: tuple[str, str], wanted: Iterable[Address]) -> tuple[Ip, ...]:
    """An address of every range set. All or none. Raises ValueError, FileExistsError."""
    asked = list(dict.fromkeys(wanted))
    taken: list[Address] = []
    found = []
    try:
        for number, spans in enumerate(sets):
            one = next((a for a in asked if any(a in span for span in spans)), None)
            if one is not None:
                asked.remove(one)
                address, span = _particular(directory, spans, owner, one, number)
            else:
                address, span = _any(directory, spans, owner, number)
            taken.append(address)
            found.append(Ip(ip_interface(f"{address}/{span.subnet.prefixlen}"), span.gateway))
        if asked:
            raise ValueError(f"failed to allocate all requested IPs: {' '.join(map(str, asked))}")
    except BaseException:
        for address in taken:
            os.unlink(str(address), dir_fd=directory)
        raise
    return tuple(found)


def _particular(directory: int, spans: Spans, owner: tuple[str, str], address: Address, number: int) -> tuple[Address, Span]:
    span = next(span for span in spans if address in span)
    if address == span.gateway:
        raise ValueError(f"requested ip {address} is subnet's gateway")
    if not _take(directory, address, owner, number):
        raise ValueError(f"requested IP address {address} is not available in range set {_text(spans)}")
    return address, span


def _any(directory: int, spans: Spans, owner: tuple[str, str], number: int) -> tuple[Address, Span]:
    for address, span in candidates(spans, _last(directory, number)):
        if _take(directory, address, owner, number):
            return address, span
    raise ValueError(f"no IP addresses available in range set: {_text(spans)}")


def _text(spans: Spans) -> str:
    return ",".join(f"{s.first}-{s.last}" for s in spans)


def _last(directory: int, number: int) -> Address | None:
    try:
        return ip_address(_read(directory, f"{_LAST}{number}"))
    except (FileNotFoundError, ValueError):
        return None


def _take(directory: int, address: Address, owner: tuple[str, str], number: int) -> bool:
    flags = os.O_RDWR | os.O_EXCL | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(str(address), flags, 0o644, dir_fd=directory)
    except FileExistsError:
        return False
    try:
        os.write(fd, _BREAK.join(owner).encode())
    finally:
        os.close(fd)
    last = os.open(f"{_LAST}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        os.write(last, str(address).encode())
    finally:
        os.close(last)
    return True


def _read(directory: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 4096).decode(errors="replace").strip()
    finally:
        os.close(fd)


def owned(directory: int, owner: tuple[str, str], known: Collection[str] = ()) -> list[str]:
    """Names of the files that a container's interface has. Those of ``known`` are enough if they are its own: else all are read."""
    marks = (_BREAK.join(owner), owner[0])  # the second as very old releases wrote it
    found = [name for name in known if _says(directory, name) in marks]
    if not found or len(found) < len(known):
        found = [name for name in os.listdir(directory) if _says(directory, name) in marks]
    return found


def _says(directory: int, name: str) -> str | None:
    try:
        return _read(directory, name)
    except OSError:  # released meanwhile, or a directory
        return None


def release(directory: int, owner: tuple[str, str], known: Collection[str] = ()) -> None:
    for name in owned(directory, owner, known):
        os.unlink(name, dir_fd=directory)


def collect(directory: int, valid: Collection[tuple[str, str]]) -> list[str]:
    """Release what belongs to nobody of ``valid``; the names."""
    gone = []
    for name in os.listdir(directory):
        try:
            ip_address(name)
        except ValueError:
            continue
        says = _says(directory, name)
        if says is not None and tuple(says.split(_BREAK)) not in valid:
            os.unlink(name, dir_fd=directory)
            gone.append(name)
    return gone


def result(conf: HostLocal, ips: tuple[Ip, ...]) -> Result:
    dns = resolv_conf(conf.resolv_conf) if conf.resolv_conf else {}
    routes = tuple(parse_route({"dst": r.dst, "gw": r.gw}) for r in conf.routes)
    return Result(ips=ips, routes=routes, dns=dns)
