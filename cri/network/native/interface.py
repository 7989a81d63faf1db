"""The pod's interface as bridge and ptp make it: a veth pair, its addresses and routes, masquerading, and the end of it all."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterable

from cri.network import rtnl
from cri.network.ipam import Interface
from cri.network.native.call import Call, own_routes
from cri.network.native.result import Result
from cri.network.native.rules import with_comment
from cri.network.netlink import Socket
from cri.network.rtnl import LinkFacts

_TRIES = 10
_MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
_SETTLE = 10.0  # seconds for duplicate address detection
_LINK_WAITS = (0.0, 0.001, 0.004, 0.015, 0.05, 0.2, 0.5, 1.0, 1.0)  # seconds between looks at a link that is coming up


def make_pair(sock: Socket, call: Call, mtu: int, mac: str = "") -> tuple[LinkFacts, LinkFacts]:
    """The pod's interface and its other end on the node, both down. Raises OSError, ValueError."""
    netns = call.namespace()
    if netns < 0:
        raise ValueError("the pod has no network namespace")
    try:
        for attempt in range(_TRIES):
            name = f"veth{os.urandom(4).hex()}"
            (error,) = sock.batch([rtnl.new_veth(name, call.if_name, mtu, peer_mac=mac, netns=netns)])
            if error is None:
                break
            if error.errno != errno.EEXIST or rtnl.find_link(sock, name) is None or attempt == _TRIES - 1:
                raise error
        target = rtnl.namespace_id(sock, netns)
        host = rtnl.link(sock, name)
        own_routes(name)
        return rtnl.link(sock, call.if_name, target=target), host
    finally:
        os.close(netns)


async def prepare(call: Call, result: Result, *, detect_duplicates: bool | None) -> None:
    """Parameters of the pod's interface before it gets addresses. None for ``detect_duplicates``: as it is."""
    conf6 = f"net/ipv6/conf/{call.if_name}"
    write: dict[str, str | None] = {}
    if detect_duplicates is not None:
        write |= {f"{conf6}/enhanced_dad": "1"} if detect_duplicates else {}
        write |= {f"{conf6}/accept_dad": "1" if detect_duplicates else "0", f"net/ipv4/conf/{call.if_name}/arp_notify": "1"}
    six = any(ip.address.version == 6 for ip in result.ips)
    if six:
        write |= {f"net/ipv6/conf/{name}/disable_ipv6": "0" for name in ("lo", call.if_name)}
    if not write:
        return
    _, failed = await call.parameters(write)
    # Where there is no IPv6 at all its parameters are missing, and only a pod that wants an IPv6 address cares.
    for name, number in failed.items():
        if number != errno.ENOENT or (six and name.endswith("disable_ipv6")):
            raise OSError(number, f"{os.strerror(number)}: {name}")


def configure(sock: Socket, index: int, result: Result) -> None:
    """Addresses, up, routes; in the pod's namespace."""
    sock.request(*[rtnl.add_address(index, ip.address) for ip in result.ips], rtnl.set_link(index, flags=rtnl.UP, change=rtnl.UP))
    gateways = {v: next((ip.gateway for ip in result.ips if ip.gateway is not None and ip.gateway.version == v), None) for v in (4, 6)}
    if gateways[6] is not None:
        settle(sock, index)
    sock.request(*[rtnl.add_route(index, r.dst, via=r.gw or gateways[r.dst.version]) for r in result.routes])


def settle(sock: Socket, index: int) -> None:
    """Wait until no address is tentative; as long as the plugins do, who go on then, too."""
    deadline = time.monotonic() + _SETTLE
    while any(a.flags & rtnl.TENTATIVE for a in rtnl.addresses(sock, index)) and time.monotonic() < deadline:
        time.sleep(0.05)


async def await_carrier(call: Call, name: str) -> None:
    """A bridge forwards nothing of a port that the kernel has not noticed to be up."""
    for pause in _LINK_WAITS:
        await asyncio.sleep(pause)
        facts = await call.host.make(lambda sock: rtnl.link(sock, name))
        if facts.state == rtnl.OPER_UP:
            return
    raise OSError(errno.ENETDOWN, f"{name} is not up")


# -- masquerading


def masquerade(call: Call, addresses: Iterable[Interface]) -> None:
    """Into the plans: what a pod sends leaves the node with the node's address."""
    chain, comment = call.hashed("CNI-"), f'name: "{call.network}" id: "{call.container_id}"'
    for address in addresses:
        plan, version = call.plans[address.version], address.version
        plan.chain("nat", chain)
        # the plugins give an address with its prefix, and iptables stores the network
        plan.append("nat", chain, *with_comment("-d", str(address.network), "-j", "ACCEPT", comment=comment))
        plan.append("nat", chain, *with_comment("!", "-d", _MULTICAST[version], "-j", "MASQUERADE", comment=comment))
        plan.append("nat", "POSTROUTING", *with_comment("-s", f"{address.ip}/{address.max_prefixlen}", "-j", chain, comment=comment))


def end_masquerade(call: Call, addresses: Iterable[Interface]) -> None:
    """For DEL of an ADD that has no result: the chain is looked for in both families."""
    masquerade(call, addresses)
    for plan in call.plans.values():
        plan.chain("nat", call.hashed("CNI-"))


# -- the end


async def remove(call: Call, previous: Result | None) -> list[Interface]:
    """Delete the pod's interface, if it is there; the global addresses that it had or was given."""
    given = [ip.address for ip in previous.ips] if previous is not None else []
    names = [link.name for link in previous.links if not link.sandbox] if previous is not None else []
    return await call.host.delete(lambda sock: _remove(sock, call, given, names))


def _remove(sock: Socket, call: Call, given: list[Interface], names: list[str]) -> list[Interface]:
    netns = call.namespace()
    if netns < 0:
        # Its veth went with the namespace, or is about to: whoever still holds it open must not keep the address in use.
        for name in names:
            facts = rtnl.find_link(sock, name)
            if facts is not None and facts.kind == "veth" and name.startswith("veth"):
                _delete(sock, name)
        return given
    try:
        target = rtnl.namespace_id(sock, netns)
    finally:
        os.close(netns)
    facts = rtnl.find_link(sock, call.if_name, target=target)
    if facts is None:
        return given
    had = [a.interface for a in rtnl.addresses(sock, facts.index, target) if a.scope == 0]
    _delete(sock, call.if_name, target)
    return list(dict.fromkeys([*given, *had]))


def _delete(sock: Socket, name: str, target: int | None = None) -> None:
    (error,) = sock.batch([rtnl.delete_link(name, target)])
    if error is not None and error.errno != errno.ENODEV:
        raise error


# -- CHECK


def check_interface(sock: Socket, call: Call, result: Result) -> LinkFacts:
    """The pod's interface is the veth of the result, with its addresses and routes. Raises ValueError, OSError."""
    expected = next((link for link in result.links if link.name == call.if_name and link.sandbox), None)
    if expected is None or expected.sandbox != call.netns:
        raise ValueError(f"the namespace of {call.if_name} is not {call.netns}")
    facts = rtnl.find_link(sock, call.if_name)
    if facts is None:
        raise ValueError(f"interface {call.if_name} is missing")
    if facts.kind != "veth":
        raise ValueError(f"interface {call.if_name} is not a veth")
    if expected.mac and expected.mac.lower() != facts.mac:
        raise ValueError(f"interface {call.if_name} has MAC {facts.mac}, not {expected.mac}")
    there = {a.interface for a in rtnl.addresses(sock, facts.index)}
    for ip in result.ips:
        if ip.address not in there:
            raise ValueError(f"interface {call.if_name} lacks address {ip.address}")
    for version in {r.dst.version for r in result.routes}:
        table = {(dst or bytes(4 if version == 4 else 16), length, via) for dst, length, via in rtnl.routes(sock, version)}
        for route in result.routes:
            if route.dst.version == version and not any(
                dst == route.dst.network_address.packed
                and length == route.dst.prefixlen
                and (route.gw is None or route.dst.prefixlen == 0 or via == route.gw.packed)
                for dst, length, via in table
            ):
                raise ValueError(f"route {route.dst} is missing")
    return facts
