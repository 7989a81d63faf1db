"""Masquerading and host ports as one nftables table, which is replaced as a whole in one transaction.

The rules are a pure function of the subnets and the reservations, so nothing has to be remembered or compared: a daemon that died
half-way, or somebody's `nft flush ruleset`, is repaired by writing the table again. The `nft` program writes it (one exec of about 10 ms,
at start and for pods with host ports only): the rules stay readable here and in `nft list table inet cri-shim`, and expressing verdict
maps over the raw netlink messages would be ours to keep up with the kernel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address

from cri.errors import FailedPrecondition, InvalidArgument, Unavailable
from cri.network.ipam import HostPort, Reservation, Subnet
from protos.runtime.v1 import api_pb2 as v1

TABLE = "cri-shim"
_PROTOCOLS = {v1.TCP: "tcp", v1.UDP: "udp", v1.SCTP: "sctp"}
_TIMEOUT = 20.0


def host_ports(mappings: Iterable[v1.PortMapping], versions: Iterable[int]) -> tuple[HostPort, ...]:
    """The host ports among a pod's port mappings (the kubelet sends every container port, most without a host port)."""
    known = set(versions)
    ports = []
    for number, mapping in enumerate(mappings):
        field = f"config.port_mappings[{number}]"
        if mapping.host_port == 0:
            continue
        if not 0 < mapping.host_port < 65536 or not 0 < mapping.container_port < 65536:
            raise InvalidArgument(f"{mapping.host_port}:{mapping.container_port} is not a pair of ports", field=field)
        if mapping.protocol not in _PROTOCOLS:
            raise InvalidArgument(f"unknown protocol {mapping.protocol}", field=f"{field}.protocol")
        address = ""
        if mapping.host_ip not in ("", "0.0.0.0", "::"):
            try:
                parsed = ip_address(mapping.host_ip)
            except ValueError:
                raise InvalidArgument(f"{mapping.host_ip!r} is not an address", field=f"{field}.host_ip") from None
            if parsed.version not in known:
                raise InvalidArgument(f"the pod network has no IPv{parsed.version}", field=f"{field}.host_ip")
            address = str(parsed)
        ports.append(HostPort(_PROTOCOLS[mapping.protocol], mapping.host_port, mapping.container_port, address))
    return tuple(dict.fromkeys(ports))


def check_conflicts(ports: Iterable[HostPort], held: Iterable[Reservation]) -> None:
    """Raise FailedPrecondition if a host port already leads to another pod."""
    taken: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for reservation in held:
        for port in reservation.ports:
            taken.setdefault((port.protocol, port.port), []).append((port.address, reservation.pod_id))
    for port in ports:
        for address, pod_id in taken.get((port.protocol, port.port), ()):
            if not address or not port.address or address == port.address:
                raise FailedPrecondition(f"host port {port.port}/{port.protocol} belongs to pod {pod_id}")


def _elements(entries: Sequence[str]) -> str:
    return f" elements = {{ {', '.join(entries)} }};" if entries else ""


def _collapse(version: int, subnets: Iterable[Subnet]) -> list[Subnet]:
    """Subnets of one family without overlaps, which nft refuses in a set."""
    if version == 4:
        return list(collapse_addresses(s for s in subnets if isinstance(s, IPv4Network)))
    return list(collapse_addresses(s for s in subnets if isinstance(s, IPv6Network)))


def _set(items: Iterable[object]) -> str:
    return f"{{ {', '.join(str(i) for i in items)} }}"


def _family(version: int, bridge: str, subnets: Sequence[Subnet], reservations: Sequence[Reservation]) -> dict[str, list[str]]:
    """Lines of the table for one address family, by section."""
    ip, kind, multicast = ("ip", "ipv4_addr", "224.0.0.0/4") if version == 4 else ("ip6", "ipv6_addr", "ff00::/8")
    exact, every = [], []
    numbers: dict[str, set[int]] = {}
    for reservation in reservations:
        target = next((i.ip for i in reservation.interfaces if i.version == version), None)
        for port in reservation.ports if target is not None else ():
            if not port.address:
                every.append(f"{port.protocol} . {port.port} : {target} . {port.target}")
            elif ip_address(port.address).version == version:
                exact.append(f"{port.protocol} . {port.address} . {port.port} : {target} . {port.target}")
            else:
                continue
            numbers.setdefault(port.protocol, set()).add(port.port)
    pods = _set(subnets)
    sections: dict[str, list[str]] = {
        "sets": [],
        "dnat": [],
        "masquerade": [f'{ip} saddr {pods} {ip} daddr != {_set([*subnets, multicast])} oifname != "{bridge}" masquerade'],
    }
    if numbers:
        sections["sets"] = [
            f"map exact{version} {{ type inet_proto . {kind} . inet_service : {kind} . inet_service;{_elements(exact)} }}",
            f"map every{version} {{ type inet_proto . inet_service : {kind} . inet_service;{_elements(every)} }}",
        ]
        sections["dnat"] = [
            f"dnat {ip} to meta l4proto . {ip} daddr . th dport map @exact{version}",
            f"fib daddr type local dnat {ip} to meta l4proto . th dport map @every{version}",
        ]
        # A reply to a pod of the same bridge, or to this node's loopback, would go past the translation or be dropped as a martian; such
        # callers appear as the bridge. Asked by original port, so that the node's Services (also dnat) keep their callers' addresses.
        near = _set([*subnets, "127.0.0.0/8" if version == 4 else "::1"])
        sections["masquerade"] += [
            f'oifname "{bridge}" {ip} saddr {near} ct status dnat meta l4proto {protocol} '
            f"ct original proto-dst {_set(sorted(numbers[protocol]))} masquerade"
            for protocol in sorted(numbers)
        ]
    return sections


def render(bridge: str, subnets: Sequence[Subnet], reservations: Iterable[Reservation]) -> str:
    """The nft script that makes the table what it should be, whatever it was."""
    reservations = sorted(reservations, key=lambda r: r.serial)
    versions = sorted({s.version for s in subnets})
    families = [_family(v, bridge, _collapse(v, subnets), reservations) for v in versions]

    def lines(section: str) -> str:
        return "".join(f"    {line}\n" for family in families for line in family[section])

    sets = "".join(f"  {line}\n" for family in families for line in family["sets"])
    text = f"table inet {TABLE} {{}}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{sets}"
    # CVE-2020-8558: host ports on 127.0.0.1 need route_localnet on the bridge, which would also let pods reach the node's loopback
    text += f'  chain guard {{\n    type filter hook prerouting priority raw;\n    iifname "{bridge}" ip daddr 127.0.0.0/8 drop\n  }}\n'
    if sets:
        text += f"  chain prerouting {{\n    type nat hook prerouting priority dstnat;\n{lines('dnat')}  }}\n"
        text += f"  chain output {{\n    type nat hook output priority -100;\n{lines('dnat')}  }}\n"
    text += f"  chain postrouting {{\n    type nat hook postrouting priority srcnat;\n{lines('masquerade')}  }}\n}}\n"
    return text


async def apply(script: str) -> None:
    """Run an nft script as one transaction. Raises Unavailable with what nft said."""
    try:
        process = await asyncio.create_subprocess_exec(
            "nft", "-f", "-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except FileNotFoundError:
        raise Unavailable("pod network: nft is not installed", hint="apt install nftables") from None
    try:
        _, errors = await asyncio.wait_for(process.communicate(script.encode()), _TIMEOUT)
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        text = " ".join(errors.decode(errors="replace").split())
        raise Unavailable(f"pod network: nft failed: {text[:500]}", hint="the kernel needs nf_tables, nft_nat, nft_masq and nft_fib")
