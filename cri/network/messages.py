"""Messages of routing netlink that the built-in network sends and reads, in pyroute2's formats.

Its import takes 0.1 s and 13 MB, so it happens on the first use of the built-in network, in the network's own thread.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Interface
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cri.network.ipam import Address, Interface
from cri.network.netlink import CREATE, EXCL, REPLACE, Message, Socket, attributes_of

NEWLINK, DELLINK, GETLINK, NEWADDR, DELADDR, GETADDR, NEWROUTE, GETROUTE = 16, 17, 18, 20, 21, 22, 24, 26
_UP = 0x1  # IFF_UP
_NODAD = 0x2  # IFA_F_NODAD
_ADDR_GEN_NONE = 1


def _new(message: type[Message], kind: int, flags: int = 0) -> Message:
    fresh = message()
    fresh["header"]["type"], fresh["header"]["flags"] = kind, flags
    return fresh


def _link(kind: int, flags: int = 0, *, index: int = 0, up: bool = False, attrs: Sequence[tuple[str, Any]] = ()) -> Message:
    message = _new(ifinfmsg, kind, flags)
    message["family"], message["index"] = 0, index
    if up:
        message["flags"] = message["change"] = _UP
    message["attrs"] = list(attrs)
    return message


def new_bridge(name: str, mac: str, mtu: int) -> Message:
    """A bridge. Its MAC is set, because one that is not follows the lowest of its ports', and pods' ARP caches then go stale."""
    info = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
    attrs = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu), ("IFLA_LINKINFO", info)]
    return _link(NEWLINK, CREATE | EXCL, up=True, attrs=attrs)


def new_veth(name: str, bridge: int, mtu: int, peer: str, peer_mac: str, netns: int) -> Message:
    """A veth pair: ``name`` here, a port of the bridge; ``peer`` made directly in the namespace fd ``netns``.

    Both are down: an end cannot be brought up before it has a peer (ENOTCONN), so not by this message.
    """
    far = {"attrs": [("IFLA_IFNAME", peer), ("IFLA_ADDRESS", peer_mac), ("IFLA_MTU", mtu), ("IFLA_NET_NS_FD", netns)]}
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", far)]})]}
    attrs = [("IFLA_IFNAME", name), ("IFLA_MTU", mtu), ("IFLA_MASTER", bridge), ("IFLA_LINKINFO", info)]
    return _link(NEWLINK, CREATE | EXCL, attrs=attrs)


def port_up(name: str) -> Message:
    """Bring a bridge port up: hairpin, so that a pod reaches itself through its host port, and no IPv6 address of its own."""
    slave = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": [("IFLA_BRPORT_MODE", 1)]})]}
    family = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_NONE)]})]}
    return _link(NEWLINK, up=True, attrs=[("IFLA_IFNAME", name), ("IFLA_LINKINFO", slave), ("IFLA_AF_SPEC", family)])


def link_up(index: int) -> Message:
    return _link(NEWLINK, index=index, up=True)


def delete_link(name: str) -> Message:
    return _link(DELLINK, attrs=[("IFLA_IFNAME", name)])


def get_link(name: str = "", index: int = 0) -> Message:
    return _link(GETLINK, index=index, attrs=[("IFLA_IFNAME", name)] if name else [])


def _address(kind: int, flags: int, index: int, interface: Interface) -> Message:
    message = _new(ifaddrmsg, kind, flags)
    message["family"] = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    message["prefixlen"], message["index"] = interface.network.prefixlen, index
    attrs: list[tuple[str, Any]] = [("IFA_ADDRESS", str(interface.ip)), ("IFA_LOCAL", str(interface.ip))]
    if isinstance(interface, IPv4Interface):
        attrs.append(("IFA_BROADCAST", str(interface.network.broadcast_address)))
    else:
        message["flags"] = _NODAD  # the allocator has decided; a probe would keep the address tentative for a second
        attrs.append(("IFA_FLAGS", _NODAD))
    message["attrs"] = attrs
    return message


def add_address(index: int, interface: Interface) -> Message:
    return _address(NEWADDR, CREATE | REPLACE, index, interface)


def delete_address(index: int, interface: Interface) -> Message:
    return _address(DELADDR, 0, index, interface)


def default_route(via: Address, index: int) -> Message:
    message = _new(rtmsg, NEWROUTE, CREATE | REPLACE)
    message["family"] = socket.AF_INET if via.version == 4 else socket.AF_INET6
    message["table"], message["proto"], message["scope"], message["type"] = 254, 3, 0, 1  # main, boot, universe, unicast
    message["attrs"] = [("RTA_GATEWAY", str(via)), ("RTA_OIF", index)]
    return message


# -- answers


def link_index(sock: Socket, name: str) -> int:
    """Index of the link called ``name``; OSError ENODEV. Read from the fixed part: decoding all of a link takes 1 ms."""
    return int(struct.unpack_from("=i", sock.get(get_link(name)), 20)[0])


def _decoded(message: type[Message], data: bytes) -> Message:
    decoded = message(data)
    decoded.decode()
    return decoded


def describe_link(sock: Socket, name: str = "", index: int = 0) -> Message:
    return _decoded(ifinfmsg, sock.get(get_link(name, index)))


def ports(sock: Socket, bridge: int) -> list[str]:
    """Names of the links that are ports of a bridge."""
    names = []
    for data in sock.dump(get_link()):
        attributes = attributes_of(data, 32)
        if attributes.get(10) == struct.pack("=I", bridge):  # IFLA_MASTER
            names.append(attributes[3].rstrip(b"\0").decode())  # IFLA_IFNAME
    return names


def addresses(sock: Socket, index: int) -> list[str]:
    """``address/prefix`` of every global address of a link."""
    found = []
    for data in sock.dump(_new(ifaddrmsg, GETADDR)):
        if struct.unpack_from("=BBBBI", data, 16)[4] == index:
            message = _decoded(ifaddrmsg, data)
            if message["scope"] == 0:
                found.append(f"{message.get_attr('IFA_LOCAL') or message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}")
    return found


def uplink_mtu(sock: Socket) -> int:
    """MTU of the link that the IPv4 default route goes out of; 1500 without one."""
    request = _new(rtmsg, GETROUTE)
    request["family"] = socket.AF_INET
    for data in sock.dump(request):
        family, destination = struct.unpack_from("=BB", data, 16)
        if family == socket.AF_INET and destination == 0:
            route = _decoded(rtmsg, data)
            index = route.get_attr("RTA_OIF")
            if index and route.get_attr("RTA_TABLE", route["table"]) == 254:
                return int(describe_link(sock, index=index).get_attr("IFLA_MTU"))
    return 1500
