"""ptp: a veth pair between the pod and the node, whose end has the gateway's address; the pod sees no neighbour but it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_interface, ip_network

from cri.network import rtnl
from cri.network.native import interface, ipam
from cri.network.native.call import Call, node_sysctl, own_routes
from cri.network.native.options import Ptp
from cri.network.native.result import Ip, Link, Result
from cri.network.netlink import Socket
from cri.network.rtnl import LinkFacts
from cri.state import failpoints

_POD = 1  # where the pod's interface is in the result
_FORWARD = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}


async def add(conf: Ptp, call: Call, previous: Result | None) -> Result:
    leased = await ipam.add(conf.ipam, call, conf.args.cni.ips)
    planned = replace(leased, ips=tuple(replace(ip, interface=_POD) for ip in leased.ips))
    for version in {ip.address.version for ip in planned.ips}:
        node_sysctl(_FORWARD[version], "1")
    failpoints.hit("add network", "veth")
    pod, host = await call.host.make(lambda sock: _make(sock, call, conf.mtu))
    await interface.prepare(call, planned, detect_duplicates=None)
    inside = await call.inside()
    failpoints.hit("add network", "configure")
    await call.host.make(lambda sock: _configure(sock, inside, pod, host, planned))
    if conf.ip_masq:
        interface.masquerade(call, [ip.address for ip in planned.ips])
    links = (Link(host.name, host.mac), Link(call.if_name, pod.mac, call.netns))
    return replace(planned, links=links, dns=ipam.dns(conf.dns) or planned.dns)


def _make(sock: Socket, call: Call, mtu: int) -> tuple[LinkFacts, LinkFacts]:
    pod, host = interface.make_pair(sock, call, mtu)
    own_routes(host.name)
    sock.request(rtnl.set_link(host.index, flags=rtnl.UP, change=rtnl.UP))
    return pod, host


def _configure(sock: Socket, inside: Socket, pod: LinkFacts, host: LinkFacts, planned: Result) -> None:
    interface.configure(inside, pod.index, planned)
    for ip in planned.ips:
        _through_gateway(inside, pod.index, ip)
        alone = ip.address.max_prefixlen
        sock.request(rtnl.add_address(host.index, ip_interface(f"{ip.gateway}/{alone}")))
        sock.request(rtnl.add_route(host.index, ip_network(f"{ip.address.ip}/{alone}"), scope=rtnl.HOST_SCOPE))


def _through_gateway(inside: Socket, index: int, ip: Ip) -> None:
    """Neither a neighbour nor anybody else is reached but by the gateway, which alone is on the link."""
    assert ip.gateway is not None, "host-local always has one"
    own, alone = ip.address.ip, ip_network(f"{ip.gateway}/{ip.address.max_prefixlen}")
    inside.request(
        rtnl.delete_route(index, ip.address.network),
        rtnl.add_route(index, alone, source=own, scope=rtnl.LINK_SCOPE, exclusive=True),
        rtnl.add_route(index, ip.address.network, via=ip.gateway, source=own, exclusive=True),
    )


async def delete(conf: Ptp, call: Call, previous: Result | None) -> None:
    await ipam.delete(conf.ipam, call, previous)
    addresses = await interface.remove(call, previous)
    failpoints.hit("delete network", "veth")
    if conf.ip_masq and previous is None:
        interface.end_masquerade(call, addresses)


async def check(conf: Ptp, call: Call, result: Result) -> None:
    await ipam.check(conf.ipam, call)
    inside = await call.inside()
    await call.host.make(lambda sock: interface.check_interface(inside, call, result))
    if conf.ip_masq:
        interface.masquerade(call, [ip.address for ip in result.ips])
