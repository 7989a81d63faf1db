"""loopback: lo is up."""

from __future__ import annotations

from cri.network import rtnl
from cri.network.native.call import Call
from cri.network.native.options import Loopback
from cri.network.native.result import Ip, Link, Result

_NAME = "lo"


async def add(conf: Loopback, call: Call, previous: Result | None) -> Result:
    inside = await call.inside()
    facts = rtnl.link(inside, _NAME)
    inside.request(rtnl.set_link(facts.index, flags=rtnl.UP, change=rtnl.UP))
    addresses = [a.interface for a in rtnl.addresses(inside, facts.index)]
    for address in addresses:
        if not address.ip.is_loopback:
            raise ValueError(f"loopback interface found with non-loopback address {address.ip}")
    if previous is not None:
        return previous
    first = [next((a for a in addresses if a.version == version), None) for version in (4, 6)]
    ips = tuple(Ip(address, interface=0) for address in first if address is not None)
    return Result(links=(Link(_NAME, "00:00:00:00:00:00", call.netns),), ips=ips)


async def delete(conf: Loopback, call: Call, previous: Result | None) -> None:
    """Nothing: containers of the pod may still run, and the namespace goes with them."""


async def check(conf: Loopback, call: Call, result: Result) -> None:
    if not rtnl.link(await call.inside(), _NAME).flags & rtnl.UP:
        raise ValueError("loopback interface is down")
