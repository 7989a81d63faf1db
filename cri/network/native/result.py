"""Results of CNI as the native plugins work with them, read from and written in every version of the protocol. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from cri.network.cni.conf import ConfError, Object, at_least
from cri.network.ipam import Address, Interface, Subnet


@dataclass(frozen=True, slots=True)
class Link:
    """An interface; ``sandbox`` is empty for one of the node."""

    name: str
    mac: str
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Ip:
    """``interface`` is an index into the links of the result."""

    address: Interface
    gateway: Address | None = None
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    dst: Subnet
    gw: Address | None = None


@dataclass(frozen=True, slots=True)
class Result:
    links: tuple[Link, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Mapping[str, Any] = field(default_factory=dict)

    def with_mac(self, name: str, mac: str) -> Result:
        return replace(self, links=tuple(replace(link, mac=mac) if link.name == name else link for link in self.links))

    def of_pod(self, if_name: str, version: int) -> Interface | None:
        """The first address of a family that the pod's interface has."""
        for ip in self.ips:
            if ip.address.version == version and self._is_pods(ip, if_name):
                return ip.address
        return None

    def _is_pods(self, ip: Ip, if_name: str) -> bool:
        if ip.interface is None or not 0 <= ip.interface < len(self.links):
            return True
        link = self.links[ip.interface]
        return link.name == if_name and bool(link.sandbox)

    # -- as JSON

    def encode(self, version: str) -> Object:
        """As a plugin prints it. Raises ConfError for what an old version has no words for."""
        if not at_least(version, "0.3.0"):
            return self._encode_02(version)
        found: Object = {"cniVersion": version}
        if self.links:
            found["interfaces"] = [_present(name=link.name, mac=link.mac, sandbox=link.sandbox) for link in self.links]
        if self.ips:
            found["ips"] = [_ip(ip, named=not at_least(version, "1.0.0")) for ip in self.ips]
        if self.routes:
            found["routes"] = [_route(route) for route in self.routes]
        return {**found, "dns": dict(self.dns)}

    def _encode_02(self, version: str) -> Object:
        """0.1.0 and 0.2.0 have one address of each family, with its routes."""
        found: Object = {"cniVersion": version}
        for family, key in ((4, "ip4"), (6, "ip6")):
            ip = next((i for i in self.ips if i.address.version == family), None)
            if ip is not None:
                one = _present(ip=str(ip.address), gateway=str(ip.gateway or ""))
                routes = [_route(route) for route in self.routes if route.dst.version == family]
                found[key] = {**one, "routes": routes} if routes else one
        if len(found) == 1:
            raise ConfError(f"CNI {version} cannot express a result without addresses")
        return {**found, "dns": dict(self.dns)}


def _present(**fields: str) -> Object:
    return {key: value for key, value in fields.items() if value}


def _ip(ip: Ip, *, named: bool) -> Object:
    one: Object = {"version": str(ip.address.version)} if named else {}
    if ip.interface is not None:
        one["interface"] = ip.interface
    one["address"] = str(ip.address)
    return one if ip.gateway is None else {**one, "gateway": str(ip.gateway)}


def _route(route: Route) -> Object:
    return _present(dst=str(route.dst), gw=str(route.gw or ""))


def parse(raw: Mapping[str, Any]) -> Result:
    """A result of any version. Raises ConfError."""
    try:
        if "ip4" in raw or "ip6" in raw:
            old = [raw[key] for key in ("ip4", "ip6") if raw.get(key)]
            ips = tuple(Ip(ip_interface(o["ip"]), _optional(o.get("gateway"))) for o in old)
            routes = tuple(parse_route(r) for o in old for r in o.get("routes") or ())
            return Result(ips=ips, routes=routes, dns=raw.get("dns") or {})
        return Result(
            links=tuple(Link(i["name"], i.get("mac", ""), i.get("sandbox", "")) for i in raw.get("interfaces") or ()),
            ips=tuple(Ip(ip_interface(i["address"]), _optional(i.get("gateway")), i.get("interface")) for i in raw.get("ips") or ()),
            routes=tuple(parse_route(r) for r in raw.get("routes") or ()),
            dns=raw.get("dns") or {},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfError(f"not a result of CNI: {error}") from None


def parse_route(raw: Mapping[str, Any]) -> Route:
    return Route(ip_network(raw["dst"], strict=False), _optional(raw.get("gw")))


def _optional(text: str | None) -> Address | None:
    return ip_address(text) if text else None
