"""bandwidth: what goes into the pod is slowed down where it enters the veth; what comes out, on a device that it is redirected to."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path

from cri.network import rtnl
from cri.network.native.call import Call
from cri.network.native.options import Bandwidth
from cri.network.native.result import Link, Result
from cri.network.netlink import Socket
from cri.network.rtnl import LinkFacts

_LATENCY = 0.025  # seconds that a packet may wait
_SECOND = 1_000_000  # microseconds
_BURST_MAX = (1 << 32) - 1  # bytes
_NAME_MAX = 15


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket in the kernel's units: bytes per second, bytes, ticks."""

    rate: int
    limit: int
    buffer: int


def bucket(rate: int, burst: int, ticks: float) -> Bucket | None:
    """From bits per second and bits, with so many ticks to a microsecond, rounded as the plugin does it; None for no limit.
    Raises ValueError."""
    if not rate and not burst:
        return None
    if rate <= 0 or burst <= 0:
        raise ValueError("a rate needs a burst, and a burst a rate")
    if burst // 8 >= _BURST_MAX:
        raise ValueError("burst cannot be more than 4 GB")
    bytes_per_second, size = rate // 8, burst // 8
    fill = int(float(size) * _SECOND / float(bytes_per_second)) & 0xFFFFFFFF
    limit = (int(float(bytes_per_second) * (_SECOND * _LATENCY) / _SECOND) & 0xFFFFFFFF) + size & 0xFFFFFFFF
    return Bucket(bytes_per_second, limit, int(float(fill) * ticks) & 0xFFFFFFFF)


def ticks() -> float:
    """Of the packet scheduler's clock in a microsecond."""
    numbers = [int(word, 16) for word in Path("/proc/net/psched").read_text().split()]
    per_tick = numbers[1] if numbers[2] == 1_000_000_000 else numbers[0]
    return per_tick / numbers[1] * (numbers[2] / _SECOND)


def _buckets(conf: Bandwidth, call: Call) -> tuple[Bucket | None, Bucket | None]:
    """Into the pod and out of it. What the configuration says goes before what the pod's annotations do."""
    rates = (conf.ingress_rate, conf.ingress_burst, conf.egress_rate, conf.egress_burst)
    if not any(rates):
        asked = call.runtime.get("bandwidth", {})
        rates = tuple(asked.get(key, 0) for key in ("ingressRate", "ingressBurst", "egressRate", "egressBurst"))
    if not any(rates):
        return None, None
    speed = ticks()
    return bucket(rates[0], rates[1], speed), bucket(rates[2], rates[3], speed)


async def add(conf: Bandwidth, call: Call, previous: Result | None) -> Result:
    if previous is None:
        raise ValueError("must be called as chained plugin")
    into, out = _buckets(conf, call)
    if into is None and out is None:
        return previous
    inside = await call.inside()
    device = await call.host.make(lambda sock: _shape(sock, inside, call, previous, into, out))
    if device is None:
        return previous
    return replace(previous, links=(*previous.links, Link(device.name, device.mac)))


def _shape(sock: Socket, inside: Socket, call: Call, result: Result, into: Bucket | None, out: Bucket | None) -> LinkFacts | None:
    host = _node_end(sock, inside, call, result)
    if into is not None:
        sock.request(rtnl.token_bucket(host.index, rate=into.rate, limit=into.limit, buffer=into.buffer))
    if out is None:
        return None
    name = _device(call)
    sock.request(rtnl.new_ifb(name, host.mtu))
    device = rtnl.link(sock, name)
    sock.request(*rtnl.redirect_ingress(host.index, device.index))
    sock.request(rtnl.token_bucket(device.index, rate=out.rate, limit=out.limit, buffer=out.buffer))
    return device


def _device(call: Call) -> str:
    return call.hashed("bwp", _NAME_MAX)


def _node_end(sock: Socket, inside: Socket, call: Call, result: Result) -> LinkFacts:
    """The other end of the pod's veth, as far as the plugins before have made it."""
    peer = rtnl.link(inside, call.if_name).peer
    facts = rtnl.find_link(sock, index=peer) if peer else None
    if facts is None or facts.name not in {link.name for link in result.links if not link.sandbox}:
        raise ValueError(f"no veth peer of {call.if_name} found on the node")
    return facts


async def delete(conf: Bandwidth, call: Call, previous: Result | None) -> None:
    """The device; the rest goes with the veth."""

    def remove(sock: Socket) -> None:
        if rtnl.find_link(sock, _device(call)) is None:
            return
        (error,) = sock.batch([rtnl.delete_link(_device(call))])
        if error is not None and error.errno != errno.ENODEV:
            raise error

    await call.host.delete(remove)


async def check(conf: Bandwidth, call: Call, result: Result) -> None:
    into, out = _buckets(conf, call)
    if into is None and out is None:
        return
    inside = await call.inside()

    def look(sock: Socket) -> None:
        host = _node_end(sock, inside, call, result)
        device = rtnl.find_link(sock, _device(call)) if out is not None else None
        if out is not None and device is None:
            raise ValueError(f"device {_device(call)} is missing")
        for wanted, link in ((into, host), (out, device)):
            if wanted is not None and link is not None:
                found = rtnl.token_buckets(sock, link.index)
                if (wanted.rate, wanted.limit, wanted.buffer) not in found:
                    raise ValueError(f"{link.name} is not limited as configured")

    await call.host.make(look)
