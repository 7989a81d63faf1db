"""Which address a pod gets, and the record that it has it.

``next_free`` is pure. ``Reservations`` keeps one JSON file per pod under ``root/network/pods``, written before anything is acquired, so
that after a crash at any instruction the address, the veth and the host ports of a dead pod can be found and released. A file of an
earlier boot reserves nothing: the namespaces it speaks of are gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address, ip_interface, ip_network
from pathlib import Path

import msgspec

from cri.errors import ConfigError, Internal, ResourceExhausted
from shim.linux import path as paths

Address = IPv4Address | IPv6Address
Subnet = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface

FORMAT = 1
_SUFFIX, _CORRUPT = ".json", ".corrupt"

log = logging.getLogger("cri.network")


class HostPort(msgspec.Struct, frozen=True, omit_defaults=True):
    """A port of the node that leads to a port of the pod. ``address`` empty: every address of the node."""

    protocol: str  # "tcp" | "udp" | "sctp"
    port: int
    target: int
    address: str = ""


class Reservation(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a pod holds: addresses with prefix length, primary first; the host's end of its veth; its host ports."""

    pod_id: str
    boot_id: str
    addresses: tuple[str, ...]
    link: str
    ports: tuple[HostPort, ...] = ()
    serial: int = 0  # order of allocation: the search for a free address goes on after the newest one
    format: int = FORMAT

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        return tuple(ip_interface(a) for a in self.addresses)


def parse_subnets(texts: Iterable[str]) -> tuple[Subnet, ...]:
    """Subnets of the configuration or of a pod CIDR: at most one per family, large enough for a gateway and a pod."""
    subnets: list[Subnet] = []
    for text in texts:
        try:
            subnet = ip_network(text.strip())
        except ValueError as error:
            raise ConfigError(f"network.subnets: {error}") from None
        if subnet.num_addresses < 4:
            raise ConfigError(f"network.subnets: {subnet} is too small for a gateway and a pod")
        if any(s.version == subnet.version for s in subnets):
            raise ConfigError(f"network.subnets: {subnet} is a second IPv{subnet.version} subnet")
        subnets.append(subnet)
    if not subnets:
        raise ConfigError("network.subnets: at least one subnet is needed")
    return tuple(subnets)


def gateway(subnet: Subnet) -> Address:
    """The bridge's own address: the first one of the subnet."""
    return subnet.network_address + 1


def next_free(subnet: Subnet, used: Iterable[Address], after: Address | None = None) -> Address:
    """The first free address after ``after``, wrapping round, so that an address rests as long as possible before it is used again.

    Never the network address (in IPv6 the subnet-router anycast address), the gateway or the IPv4 broadcast address. Takes at most
    ``len(used) + 1`` steps. Raises ResourceExhausted.
    """
    first = int(gateway(subnet)) + 1
    last = int(subnet.broadcast_address) - (subnet.version == 4)
    taken = {int(a) for a in used if a.version == subnet.version and a in subnet}
    size = last - first + 1
    start = int(after) + 1 - first if after is not None and after.version == subnet.version and after in subnet else 0
    for step in range(min(size, len(taken) + 1)):
        candidate = first + (start + step) % size
        if candidate not in taken:
            return ip_address(candidate) if subnet.version == 4 else IPv6Address(candidate)
    raise ResourceExhausted(f"no free address in {subnet}: {len(taken)} pods hold one", hint="a larger network.subnets, or fewer pods")


class Reservations:
    """Everything that is reserved. What is in memory belongs to the event loop; ``record`` and ``erase`` may run in another thread."""

    def __init__(self, directory: Path, boot_id: str) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._directory = directory
        self._boot_id = boot_id
        self._held: dict[str, Reservation] = {}
        self._serial = 0
        self._load()

    def close(self) -> None:
        os.close(self._fd)

    @property
    def held(self) -> Mapping[str, Reservation]:
        """By pod id."""
        return self._held

    def _load(self) -> None:
        decoder = msgspec.json.Decoder(Reservation)
        for name in os.listdir(self._fd):
            if name.endswith(_CORRUPT):
                continue
            if not name.endswith(_SUFFIX):
                os.unlink(name, dir_fd=self._fd)  # the temporary file of a writer that died
                continue
            data = (self._directory / name).read_bytes()
            try:
                reservation = decoder.decode(data)
                reservation.interfaces  # noqa: B018 - parsed here so that a bad address is found here
                if reservation.format > FORMAT:
                    raise ValueError(f"format {reservation.format} is newer than this program's {FORMAT}")
                if reservation.pod_id + _SUFFIX != name:
                    raise ValueError(f"says it belongs to {reservation.pod_id}")
            except (ValueError, msgspec.MsgspecError) as error:
                # a power cut may leave a torn file; then the boot is another one too, and nothing is held any more
                os.rename(name, name + _CORRUPT, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                log.error("network reservation %s cannot be used: %s", self._directory / name, error)
                continue
            if reservation.boot_id != self._boot_id:
                os.unlink(name, dir_fd=self._fd)
                continue
            self._held[reservation.pod_id] = reservation
            self._serial = max(self._serial, reservation.serial)

    def allocate(self, pod_id: str, subnets: Iterable[Subnet], link: str, ports: tuple[HostPort, ...] = ()) -> Reservation:
        """Choose addresses for a pod and hold them in memory; ``record`` makes that survive us."""
        if pod_id in self._held:
            raise Internal(f"pod {pod_id} already holds addresses")
        used = [i.ip for r in self._held.values() for i in r.interfaces]
        newest = max(self._held.values(), key=lambda r: r.serial, default=None)
        addresses = []
        for subnet in subnets:
            after = next((i.ip for i in newest.interfaces if i.version == subnet.version), None) if newest is not None else None
            addresses.append(f"{next_free(subnet, used, after)}/{subnet.prefixlen}")
        self._serial += 1
        reservation = Reservation(
            pod_id=pod_id, boot_id=self._boot_id, addresses=tuple(addresses), link=link, ports=ports, serial=self._serial
        )
        self._held[pod_id] = reservation
        return reservation

    def record(self, reservation: Reservation) -> None:
        """Write the reservation; must come before what it names is acquired."""
        data = msgspec.json.format(msgspec.json.encode(reservation), indent=1) + b"\n"
        paths.write_atomic(self._fd, reservation.pod_id + _SUFFIX, data)

    def erase(self, pod_id: str) -> None:
        """Remove the file, once what the reservation names is gone. Erasing nothing is fine."""
        try:
            os.unlink(pod_id + _SUFFIX, dir_fd=self._fd)
        except FileNotFoundError:
            pass

    def forget(self, pod_id: str) -> None:
        """Give the addresses to others, once the file is gone."""
        self._held.pop(pod_id, None)
