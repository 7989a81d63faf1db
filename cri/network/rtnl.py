"""Messages that the native plugins send and read, as bytes: links, addresses, routes, shaping, namespace ids, conntrack.

pyroute2's message classes lack what half of them need (target namespaces, 64-bit rates, filters with two actions), and take ten times as
long to encode. Numbers are those of the kernel's uapi headers: if_link.h, if_addr.h, rtnetlink.h, pkt_sched.h, pkt_cls.h, net_namespace.h,
nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cri.network.ipam import Address, Interface, Subnet
from cri.network.netlink import CREATE, EXCL, Raw, Socket, attributes_of

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR, _NEWROUTE, _DELROUTE, _GETROUTE = 20, 21, 22, 24, 25, 26
_NEWQDISC, _GETQDISC, _NEWTFILTER, _NEWNSID, _GETNSID = 36, 38, 44, 88, 90
_NESTED = 0x8000
UP, PROMISC, ALLMULTI = 0x1, 0x100, 0x200
_ADDRESS, _IFNAME, _MTU, _LINK, _MASTER, _TXQLEN, _OPERSTATE, _LINKINFO, _IFALIAS = 1, 3, 4, 5, 10, 13, 16, 18, 20
_AF_SPEC, _NET_NS_FD, _PROMISCUITY, _TARGET = 26, 28, 30, 46
OPER_UP = 6
TENTATIVE, _DADFAILED = 0x40, 0x08
HOST_SCOPE, LINK_SCOPE, NOWHERE = 254, 253, 255


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


# -- links


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """``peer`` is IFLA_LINK: the index of a veth's other end, in that one's namespace."""

    index: int
    flags: int
    name: str
    mac: str
    mtu: int
    master: int
    peer: int
    queue: int
    promiscuity: int
    state: int
    kind: str
    alias: str


def _link(kind: int, flags: int, *attributes: bytes, index: int = 0, set_flags: int = 0, change: int = 0, family: int = 0) -> Raw:
    return Raw(kind, flags, struct.pack("=BxHiII", family, 0, index, set_flags, change) + b"".join(attributes))


def new_bridge(name: str, mtu: int, *, vlan_filtering: bool) -> Raw:
    data = nested(2, attribute(7, b"\1")) if vlan_filtering else b""
    attributes = [_text(_IFNAME, name), nested(_LINKINFO, _text(1, "bridge"), data)]
    if mtu:
        attributes.append(_u32(_MTU, mtu))
    return _link(_NEWLINK, CREATE | EXCL, *attributes)


def new_veth(name: str, peer: str, mtu: int, *, peer_mac: str = "", netns: int = -1) -> Raw:
    """``name`` here, ``peer`` in the namespace fd ``netns`` (-1: here, too). Without queues, as CNI's plugins make them."""
    common = [_u32(_TXQLEN, 0), *([_u32(_MTU, mtu)] if mtu else [])]
    far = [_text(_IFNAME, peer), *common]
    if netns >= 0:
        far.append(_u32(_NET_NS_FD, netns))
    if peer_mac:
        far.append(attribute(_ADDRESS, mac_bytes(peer_mac)))
    info = nested(_LINKINFO, _text(1, "veth"), nested(2, nested(1, struct.pack("=BxHiII", 0, 0, 0, 0, 0), *far)))
    return _link(_NEWLINK, CREATE | EXCL, _text(_IFNAME, name), *common, info)


def new_ifb(name: str, mtu: int) -> Raw:
    attributes = (_text(_IFNAME, name), _u32(_TXQLEN, 0), _u32(_MTU, mtu), nested(_LINKINFO, _text(1, "ifb")))
    return _link(_NEWLINK, CREATE | EXCL, *attributes, set_flags=UP, change=UP)


def bridge_port(index: int, bridge: int, *, hairpin: bool) -> list[Raw]:
    """Up, then a port of a bridge."""
    slave = nested(_LINKINFO, _text(4, "bridge"), nested(5, attribute(4, bytes([hairpin]))))
    join = _link(_NEWLINK, 0, _u32(_MASTER, bridge), index=index)
    return [set_link(index, change=UP, flags=UP), join, _link(_NEWLINK, 0, slave, index=index)]


def bridge_vlan(index: int, vlan: int) -> Raw:
    """Frames without a tag belong to ``vlan``, in and out."""
    master, pvid, untagged = 1, 2, 4
    spec = nested(_AF_SPEC, attribute(0, struct.pack("=H", master)), attribute(2, struct.pack("=HH", pvid | untagged, vlan)))
    return _link(_SETLINK, 0, spec, index=index, family=socket.AF_BRIDGE if hasattr(socket, "AF_BRIDGE") else 7)


def set_link(index: int, *, flags: int = 0, change: int = 0, mac: str = "", mtu: int = 0, queue: int | None = None) -> Raw:
    attributes = []
    if mac:
        attributes.append(attribute(_ADDRESS, mac_bytes(mac)))
    if mtu:
        attributes.append(_u32(_MTU, mtu))
    if queue is not None:
        attributes.append(_u32(_TXQLEN, queue))
    return _link(_NEWLINK, 0, *attributes, index=index, set_flags=flags, change=change)


def move_link(index: int, name: str, netns: int) -> Raw:
    """Into the namespace fd ``netns``, as ``name`` there. It is down afterwards and has lost its addresses."""
    return _link(_NEWLINK, 0, _text(_IFNAME, name), _u32(_NET_NS_FD, netns), index=index)


def set_alias(index: int, alias: str) -> Raw:
    return _link(_NEWLINK, 0, _text(_IFALIAS, alias), index=index)


def delete_link(name: str, target: int | None = None) -> Raw:
    """``target``: the id (``nsid``) of the namespace that it is in."""
    return _link(_DELLINK, 0, _text(_IFNAME, name), *([_u32(_TARGET, target)] if target is not None else []))


def link(sock: Socket, name: str = "", index: int = 0, target: int | None = None) -> LinkFacts:
    """OSError ENODEV if there is none."""
    attributes = [_text(_IFNAME, name)] if name else []
    if target is not None:
        attributes.append(_u32(_TARGET, target))
    return _facts(sock.get(_link(_GETLINK, 0, *attributes, index=index)))


def find_link(sock: Socket, name: str = "", index: int = 0, target: int | None = None) -> LinkFacts | None:
    try:
        return link(sock, name, index, target)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None


def _facts(body: bytes) -> LinkFacts:
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", body, 16)
    found = attributes_of(body, 32)

    def number(kind: int) -> int:
        data = found.get(kind, b"")
        return int.from_bytes(data, "little") if data else 0

    info = attributes_of(found.get(_LINKINFO, b""), 0)
    return LinkFacts(
        index=index,
        flags=flags,
        name=found[_IFNAME].rstrip(b"\0").decode(),
        mac=found.get(_ADDRESS, b"").hex(":"),
        mtu=number(_MTU),
        master=number(_MASTER),
        peer=number(_LINK),
        queue=number(_TXQLEN),
        promiscuity=number(_PROMISCUITY),
        state=number(_OPERSTATE),
        kind=info.get(1, b"").rstrip(b"\0").decode(),
        alias=found.get(_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
    )


# -- namespaces


def namespace_id(sock: Socket, netns: int) -> int:
    """The id by which the socket's namespace knows the one of the fd ``netns``; it gets one if it has none."""
    for attempt in (0, 1):
        body = sock.get(Raw(_GETNSID, 0, bytes(4) + _u32(3, netns)))
        (found,) = struct.unpack("=i", attributes_of(body, 20)[1])
        if found >= 0 or attempt:
            break
        (error,) = sock.batch([Raw(_NEWNSID, 0, bytes(4) + attribute(1, struct.pack("=i", -1)) + _u32(3, netns))])
        if error is not None and error.errno != errno.EEXIST:
            raise error
    return int(found)


# -- addresses and routes


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _address(kind: int, flags: int, index: int, interface: Interface) -> Raw:
    ip, network = interface.ip, interface.network
    body = struct.pack("=BBBBI", _family(ip.version), network.prefixlen, 0, 0, index)
    body += attribute(2, ip.packed) + attribute(1, ip.packed)
    if ip.version == 4 and network.prefixlen < 31:
        body += attribute(4, network.broadcast_address.packed)
    return Raw(kind, flags, body)


def add_address(index: int, interface: Interface) -> Raw:
    return _address(_NEWADDR, CREATE | EXCL, index, interface)


def delete_address(index: int, interface: Interface) -> Raw:
    return _address(_DELADDR, 0, index, interface)


@dataclass(frozen=True, slots=True)
class AddressFacts:
    interface: Interface
    scope: int
    flags: int


def addresses(sock: Socket, index: int, target: int | None = None) -> list[AddressFacts]:
    """Of one link."""
    from ipaddress import ip_address, ip_interface

    request = Raw(_GETADDR, 0, bytes(8) + (_u32(10, target) if target is not None else b""))
    found = []
    for body in sock.dump(request):
        _, prefix, flags, scope, where = struct.unpack_from("=BBBBI", body, 16)
        if where == index:
            attributes = attributes_of(body, 24)
            if 8 in attributes:
                (flags,) = struct.unpack("=I", attributes[8])
            address = ip_address(attributes.get(2, attributes.get(1, b"")))
            found.append(AddressFacts(ip_interface(f"{address}/{prefix}"), scope, flags))
    return found


def _route(
    kind: int, flags: int, index: int, dst: Subnet, *, via: Address | None = None, source: Address | None = None, scope: int = 0
) -> Raw:
    known = (254, 3, scope, 1) if kind == _NEWROUTE else (254, 0, scope, 0)  # main table, "boot", …, unicast
    body = struct.pack("=BBBBBBBBI", _family(dst.version), dst.prefixlen, 0, 0, *known, 0)
    body += attribute(1, dst.network_address.packed) + _u32(4, index)
    if via is not None:
        body += attribute(5, via.packed)
    if source is not None:
        body += attribute(7, source.packed)
    return Raw(kind, flags, body)


def add_route(
    index: int, dst: Subnet, *, via: Address | None = None, source: Address | None = None, scope: int = 0, exclusive: bool = False
) -> Raw:
    return _route(_NEWROUTE, CREATE | (EXCL if exclusive else 0), index, dst, via=via, source=source, scope=scope)


def delete_route(index: int, dst: Subnet) -> Raw:
    return _route(_DELROUTE, 0, index, dst, scope=NOWHERE)


def routes(sock: Socket, version: int) -> set[tuple[bytes, int, bytes]]:
    """``(destination, prefix length, gateway)`` of the main table, packed; both empty where there is none."""
    found = set()
    for body in sock.dump(Raw(_GETROUTE, 0, struct.pack("=BBBBBBBBI", _family(version), *([0] * 8)))):
        length, table = struct.unpack_from("=xBxxB", body, 16)
        attributes = attributes_of(body, 28)
        if table in (0, 254):
            found.add((attributes.get(1, b""), length, attributes.get(5, b"")))
    return found


def outgoing(sock: Socket, address: Address) -> int:
    """Index of the link that packets to an address leave by; 0 without a route."""
    body = struct.pack("=BBBBBBBBI", _family(address.version), address.max_prefixlen, *([0] * 7)) + attribute(1, address.packed)
    try:
        answer = sock.get(Raw(_GETROUTE, 0, body))
    except OSError as error:
        if error.errno != errno.ENETUNREACH:
            raise
        return 0
    return int.from_bytes(attributes_of(answer, 28).get(4, b""), "little")


# -- shaping


def _tc(kind: int, index: int, handle: int, parent: int, info: int, *attributes: bytes) -> Raw:
    return Raw(kind, CREATE | EXCL, struct.pack("=BxxxiIII", 0, index, handle, parent, info) + b"".join(attributes))


def token_bucket(index: int, *, rate: int, limit: int, buffer: int) -> Raw:
    """A tbf as root, 1:. ``rate`` and ``limit`` in bytes, ``buffer`` in the packet scheduler's ticks."""
    spec = struct.pack("=BBHhHI", 0, 0, 0, 0, 0, rate & 0xFFFFFFFF)
    options = attribute(1, spec + bytes(12) + struct.pack("=III", limit, buffer, 0))
    if rate >= 1 << 32:
        options += attribute(4, struct.pack("=Q", rate))
    return _tc(_NEWQDISC, index, 0x10000, 0xFFFFFFFF, 0, _text(1, "tbf"), nested(2, options))


def redirect_ingress(index: int, to: int) -> list[Raw]:
    """Everything that comes in by a link leaves by another. Two actions, of which the first one steals: so the plugin makes it."""

    def mirred(number: int, action: int) -> bytes:
        parameters = struct.pack("=IIiiiiI", 0, 0, action, 0, 0, 1, to)
        return nested(number, _text(1, "mirred"), nested(2, attribute(2, parameters)))

    stolen, terminal = 4, 1
    selector = struct.pack("=BBBxHHhhI", terminal, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
    options = nested(2, attribute(5, selector), _u32(1, 0x10001), nested(7, mirred(1, stolen), mirred(2, 0)))
    everything = 1 << 16 | socket.htons(3)  # priority 1, ETH_P_ALL
    return [
        _tc(_NEWQDISC, index, 0xFFFF0000, 0xFFFFFFF1, 0, _text(1, "ingress")),
        _tc(_NEWTFILTER, index, 0, 0xFFFF0000, everything, _text(1, "u32"), options),
    ]


def token_buckets(sock: Socket, index: int) -> list[tuple[int, int, int]]:
    """``(rate, limit, buffer)`` of every tbf of a link."""
    found = []
    for body in sock.dump(Raw(_GETQDISC, 0, struct.pack("=BxxxiIII", 0, index, 0, 0, 0))):
        attributes = attributes_of(body, 36)
        if struct.unpack_from("=i", body, 20)[0] == index and attributes.get(1) == b"tbf\0":
            options = attributes_of(attributes[2], 0)
            rate = struct.unpack_from("=I", options[1], 8)[0]
            limit, buffer = struct.unpack_from("=II", options[1], 24)
            found.append((struct.unpack("=Q", options[4])[0] if 4 in options else rate, limit, buffer))
    return found


# -- connection tracking

_CT_GET, _CT_DELETE = 1 << 8 | 1, 1 << 8 | 2


def flows(sock: Socket, version: int, protocol: int, port: int) -> Iterator[bytes]:
    """What names each flow whose first packet went to a port: attributes for ``forget_flow``. The kernel does the looking (5.8)."""
    number, to_port = 1 << 3, 1 << 5
    proto = nested(2, attribute(1, bytes([protocol])), attribute(3, struct.pack(">H", port)))
    condition = nested(25, _u32(1, number | to_port), _u32(2, 0))
    header = struct.pack("=BBH", _family(version), 0, 0)
    for body in sock.dump(Raw(_CT_GET, 0, header + nested(1, proto) + condition)):
        found = attributes_of(body, 20)
        original = attributes_of(found[1], 0)
        if attributes_of(original[2], 0).get(3) == struct.pack(">H", port):
            yield header + b"".join(attribute(kind | (_NESTED if kind == 1 else 0), found[kind]) for kind in (1, 12, 18) if kind in found)


def forget_flow(name: bytes) -> Raw:
    return Raw(_CT_DELETE, 0, name)
