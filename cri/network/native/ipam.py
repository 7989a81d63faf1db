"""Addresses for the plugins that make interfaces: host-local, under its lock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import ip_interface
from typing import Any

from cri.network.native import hostlocal
from cri.network.native.call import Call, to_its_end
from cri.network.native.hostlocal import Store
from cri.network.native.options import Dns, HostLocal
from cri.network.native.result import Result
from cri.state import failpoints


async def add(conf: HostLocal, call: Call, asked: Sequence[str] = ()) -> Result:
    """Reserve addresses, ``asked`` ones by preference. What an earlier attempt held, ``setup`` has released: nobody has any for this
    container."""
    sets = hostlocal.ranges(conf, call.runtime)
    wanted = [ip_interface(text).ip for text in (*asked, *call.runtime.get("ips", ()))]
    async with Store(call.network, conf.data_dir).locked(call.patience) as directory:
        ips = await to_its_end(lambda: hostlocal.reserve(directory, sets, call.owner, wanted))
    failpoints.hit("add network", "address")
    return hostlocal.result(conf, ips)


async def delete(conf: HostLocal, call: Call, previous: Result | None) -> None:
    await call.withdrawn()
    known = [str(ip.address.ip) for ip in previous.ips] if previous is not None else []
    async with Store(call.network, conf.data_dir).locked(call.patience) as directory:
        await to_its_end(lambda: hostlocal.release(directory, call.owner, known))
    failpoints.hit("delete network", "address")


async def check(conf: HostLocal, call: Call) -> None:
    async with Store(call.network, conf.data_dir).locked(call.patience) as directory:
        if not await to_its_end(lambda: hostlocal.owned(directory, call.owner)):
            raise ValueError(f"no address is reserved for {call.container_id}")


async def collect(conf: HostLocal, network: str, valid: Collection[tuple[str, str]], patience: float) -> list[str]:
    async with Store(network, conf.data_dir).locked(patience) as directory:
        return await to_its_end(lambda: hostlocal.collect(directory, valid))


def dns(conf: Dns) -> dict[str, Any]:
    fields = {"nameservers": conf.nameservers, "domain": conf.domain, "search": conf.search, "options": conf.options}
    return {key: value for key, value in fields.items() if value}
