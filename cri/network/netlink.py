"""Routing netlink: messages by pyroute2, the exchange by us.

pyroute2 knows the kernel's message formats, and this module is the only place that uses it (its import takes 0.1 s and 13 MB, so it
happens on the first use of the built-in network, in the network's own thread). Its ``IPRoute`` is not used: the synchronous one runs an
event loop of its own per call, and both send one request at a time, where a pod needs three messages on one side and five on the other.
Here a batch is one send, and the kernel works it off inside that system call.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Interface
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cri.network.ipam import Address, Interface

NEWLINK, DELLINK, GETLINK, NEWADDR, DELADDR, GETADDR, NEWROUTE, GETROUTE = 16, 17, 18, 20, 21, 22, 24, 26
REQUEST, ACK, EXCL, REPLACE, CREATE, DUMP = 0x1, 0x4, 0x200, 0x100, 0x400, 0x300
_UP = 0x1  # IFF_UP
_NODAD = 0x2  # IFA_F_NODAD
_ERROR, _DONE, _ACK_TLVS = 2, 3, 0x200
_ADDR_GEN_NONE = 1
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_HEADER = struct.Struct("=IHHII")
_TIMEOUT = 10.0  # seconds; requests are answered inside send(2), so this only bounds a broken kernel

Message = Any  # a pyroute2 nlmsg, which has no types


class Socket:
    """A NETLINK_ROUTE socket. With ``fileno`` it takes over one that was opened in another network namespace."""

    def __init__(self, fileno: int | None = None) -> None:
        if fileno is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        else:
            self._socket = socket.socket(fileno=fileno)
        self._socket.settimeout(_TIMEOUT)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def batch(self, messages: Sequence[Message]) -> list[OSError | None]:
        """Send requests in one go; each one's outcome in order. All are tried, also after a failure."""
        first = self._sequence + 1
        self._send(messages, ACK)
        outcome: dict[int, OSError | None] = {}
        while len(outcome) < len(messages):
            for kind, flags, sequence, body in self._receive():
                if kind == _ERROR and first <= sequence:
                    outcome[sequence] = _error(flags, body)
        return [outcome[s] for s in sorted(outcome)]

    def request(self, *messages: Message) -> None:
        """Send requests; raises the first one's OSError that failed."""
        for error in self.batch(messages):
            if error is not None:
                raise error

    def get(self, message: Message) -> bytes:
        """The answer to a request for one object; OSError (ENODEV…) if there is none."""
        self._send([message], 0)
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence == self._sequence:
                    error = _error(flags, body) if kind == _ERROR else None
                    if error is not None:
                        raise error
                    return body

    def dump(self, message: Message) -> list[bytes]:
        """All answers to a dump request."""
        self._send([message], DUMP)
        answers: list[bytes] = []
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == _DONE:
                    return answers
                error = _error(flags, body) if kind == _ERROR else None
                if error is not None:
                    raise error
                answers.append(body)

    def _send(self, messages: Sequence[Message], flags: int) -> None:
        data = bytearray()
        for message in messages:
            self._sequence += 1
            message["header"]["flags"] |= REQUEST | flags
            message["header"]["sequence_number"] = self._sequence
            message["header"]["pid"] = 0
            message.reset()
            message.encode()
            data += message.data
            data += bytes(-len(data) % 4)
        self._socket.send(data)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(1 << 18)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset : offset + length]
            offset += (length + 3) & ~3


def _error(flags: int, body: bytes) -> OSError | None:
    """The OSError of an NLMSG_ERROR, with the kernel's extended message where there is one; None for an acknowledgement."""
    (number,) = struct.unpack_from("=i", body, 16)
    if number == 0:
        return None
    text = os.strerror(-number)
    if flags & _ACK_TLVS:
        # error code, then the header of the request (its body is capped), then attributes
        offset = 16 + 4 + 16
        while offset + 4 <= len(body):
            length, kind = struct.unpack_from("=HH", body, offset)
            if length < 4:
                break
            if kind == 1:  # NLMSGERR_ATTR_MSG
                text = f"{text}: {body[offset + 4 : offset + length].rstrip(bytes(1)).decode(errors='replace')}"
            offset += (length + 3) & ~3
    return OSError(-number, text)


# -- messages


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


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    found = {}
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def ports(sock: Socket, bridge: int) -> list[str]:
    """Names of the links that are ports of a bridge."""
    names = []
    for data in sock.dump(get_link()):
        attributes = _attributes(data, 32)
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
