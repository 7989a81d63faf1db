"""bridge: the pod's veth is a port of a bridge of the node, which may be its gateway."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_interface

from cri.network import rtnl
from cri.network.ipam import Interface, Subnet
from cri.network.native import interface, ipam, spoofcheck
from cri.network.native.call import Call, node_sysctl, own_routes
from cri.network.native.options import Bridge
from cri.network.native.result import Link, Result, Route
from cri.network.netlink import Socket
from cri.network.rtnl import LinkFacts
from cri.state import failpoints

_NO_MAC = "00:00:00:00:00:00"
_POD = 2  # where the pod's interface is in the result
_DEFAULT: Mapping[int, Subnet] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}
_FORWARD = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}


def _gateway(conf: Bridge) -> bool:
    return conf.is_gateway or conf.is_default_gateway


async def add(conf: Bridge, call: Call, previous: Result | None) -> Result:
    if conf.hairpin_mode and conf.promisc_mode:
        raise ValueError("hairpin mode and promiscuous mode exclude each other")
    leased = await ipam.add(conf.ipam, call, conf.args.cni.ips) if conf.ipam is not None else Result()
    planned = with_gateways(leased, conf)
    failpoints.hit("add network", "veth")
    mac = call.runtime.get("mac") or conf.args.cni.mac
    bridge, host, pod = await call.host.make(lambda sock: _connect(sock, call, conf, mac))
    links = [Link(bridge.name, bridge.mac), Link(host.name, host.mac), Link(call.if_name, pod.mac, call.netns)]
    if conf.macspoofchk:
        await spoofcheck.add(call, host.name, pod.mac)
    inside = await call.inside()
    if conf.ipam is not None:
        await interface.prepare(call, planned, detect_duplicates=conf.enabledad)
        failpoints.hit("add network", "configure")
        await call.host.make(lambda sock: interface.configure(inside, pod.index, planned))
        await interface.await_carrier(call, host.name)
        if _gateway(conf):
            links += await call.host.make(lambda sock: _become_gateway(sock, call, conf, bridge, planned))
        if conf.ip_masq:
            interface.masquerade(call, [ip.address for ip in planned.ips])
    else:
        inside.request(rtnl.set_link(pod.index, flags=rtnl.UP, change=rtnl.UP))
    links[0] = Link(bridge.name, (await call.host.make(lambda sock: rtnl.link(sock, bridge.name))).mac)  # it follows its ports'
    return replace(planned, links=tuple(links), dns=ipam.dns(conf.dns))


def with_gateways(leased: Result, conf: Bridge) -> Result:
    """Addresses belong to the pod's interface, a gateway is the first address of its subnet, and perhaps the default one."""
    routes, ips = list(leased.routes), []
    found = {4: False, 6: False}
    for ip in leased.ips:
        version = ip.address.version
        via = ip.gateway
        if via is None and _gateway(conf):
            via = ip.address.network.network_address + 1
        if conf.is_default_gateway and not found[version]:
            if not any(r.gw is not None and r.dst == _DEFAULT[version] for r in routes):
                routes.append(Route(_DEFAULT[version], via))
            found[version] = True
        ips.append(replace(ip, gateway=via, interface=_POD))
    return replace(leased, ips=tuple(ips), routes=tuple(routes))


def _connect(sock: Socket, call: Call, conf: Bridge, mac: str) -> tuple[LinkFacts, LinkFacts, LinkFacts]:
    bridge = _ensure_bridge(sock, conf)
    pod, host = interface.make_pair(sock, call, conf.mtu, mac)
    sock.request(*rtnl.bridge_port(host.index, bridge.index, hairpin=conf.hairpin_mode))
    if conf.vlan:
        sock.request(rtnl.bridge_vlan(host.index, conf.vlan))
    return bridge, host, pod


def _ensure_bridge(sock: Socket, conf: Bridge) -> LinkFacts:
    facts = rtnl.find_link(sock, conf.bridge)
    if facts is None:
        (error,) = sock.batch([rtnl.new_bridge(conf.bridge, conf.mtu, vlan_filtering=bool(conf.vlan))])
        if error is not None and error.errno != errno.EEXIST:
            raise error
        facts = rtnl.link(sock, conf.bridge)
    if facts.kind != "bridge":
        raise ValueError(f"{conf.bridge} is there and is not a bridge")
    own_routes(conf.bridge)
    wanted = rtnl.UP | (rtnl.PROMISC if conf.promisc_mode else 0)
    if facts.flags & wanted != wanted:
        sock.request(rtnl.set_link(facts.index, flags=wanted, change=wanted))
    return facts


def _become_gateway(sock: Socket, call: Call, conf: Bridge, bridge: LinkFacts, planned: Result) -> list[Link]:
    """The gateways' addresses on the bridge, or on its end of a pair in the VLAN, which is then another interface of the result."""
    where = _vlan_link(sock, call, bridge, conf) if conf.vlan else bridge
    for ip in planned.ips:
        assert ip.gateway is not None, "it has been calculated"
        _ensure_address(sock, where, ip_interface(f"{ip.gateway}/{ip.address.network.prefixlen}"), force=conf.force_address)
    for version in {ip.address.version for ip in planned.ips}:
        node_sysctl(_FORWARD[version], "1")
    return [Link(where.name, where.mac)] if conf.vlan else []


def _vlan_link(sock: Socket, call: Call, bridge: LinkFacts, conf: Bridge) -> LinkFacts:
    name = f"{bridge.name}.{conf.vlan}"
    facts = rtnl.find_link(sock, name)
    if facts is not None:
        return facts
    port = f"veth{call.container_id[:8]}"
    sock.request(rtnl.new_veth(port, name, bridge.mtu))
    facts, other = rtnl.link(sock, name), rtnl.link(sock, port)
    own_routes(port)
    sock.request(*rtnl.bridge_port(other.index, bridge.index, hairpin=False), rtnl.bridge_vlan(other.index, conf.vlan))
    sock.request(rtnl.set_link(facts.index, flags=rtnl.UP, change=rtnl.UP))
    return facts


def _ensure_address(sock: Socket, link: LinkFacts, wanted: Interface, *, force: bool) -> None:
    for address in rtnl.addresses(sock, link.index):
        there = address.interface
        if there.version != wanted.version:
            continue
        if there == wanted:
            return
        # several IPv6 subnets may share a bridge
        if wanted.version == 4 or wanted.ip in there.network or there.ip in wanted.network:
            if not force:
                raise ValueError(f'"{link.name}" already has an IP address different from {wanted}')
            sock.request(rtnl.delete_address(link.index, there))
    (error,) = sock.batch([rtnl.add_address(link.index, wanted)])
    if error is not None and error.errno != errno.EEXIST:
        raise error
    # Its own, or it would follow the lowest of its ports'. It has none after one that never got an address has lost its last port.
    mac = link.mac if link.mac != _NO_MAC else rtnl.link(sock, index=link.index).mac
    sock.request(rtnl.set_link(link.index, mac=mac))


async def delete(conf: Bridge, call: Call, previous: Result | None) -> None:
    addresses = await interface.remove(call, previous)
    failpoints.hit("delete network", "veth")
    if conf.ipam is not None:
        await ipam.delete(conf.ipam, call, previous)
    if conf.macspoofchk:
        await spoofcheck.delete(call)
    if conf.ipam is not None and conf.ip_masq and previous is None:
        interface.end_masquerade(call, addresses)


async def check(conf: Bridge, call: Call, result: Result) -> None:
    if conf.ipam is not None:
        await ipam.check(conf.ipam, call)
    inside = await call.inside()
    pod = await call.host.make(lambda sock: interface.check_interface(inside, call, result))
    await call.host.make(lambda sock: _check_node(sock, conf, result, pod))
    if conf.ip_masq:
        interface.masquerade(call, [ip.address for ip in result.ips])


def _check_node(sock: Socket, conf: Bridge, result: Result, pod: LinkFacts) -> None:
    bridge = rtnl.find_link(sock, conf.bridge)
    if bridge is None or bridge.kind != "bridge":
        raise ValueError(f"bridge {conf.bridge} is missing")
    expected = next((link.mac for link in result.links if link.name == conf.bridge and not link.sandbox), "")
    if expected and expected.lower() != bridge.mac:
        raise ValueError(f"bridge {conf.bridge} has MAC {bridge.mac}, not {expected}")
    if bool(bridge.promiscuity) != conf.promisc_mode:
        raise ValueError(f"bridge {conf.bridge}: promiscuous mode is not {conf.promisc_mode}")
    host = rtnl.find_link(sock, index=pod.peer)
    if host is None or host.master != bridge.index or host.name not in {link.name for link in result.links}:
        raise ValueError(f"the pod's veth is not a port of bridge {conf.bridge}")
