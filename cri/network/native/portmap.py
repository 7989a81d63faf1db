"""portmap: ports of the node lead to the pod."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from cri.network import conntrack, rtnl
from cri.network.ipam import Interface
from cri.network.native.call import Call, node_sysctl
from cri.network.native.options import Portmap
from cri.network.native.result import Result
from cri.network.native.rules import Plan, Rule
from cri.network.netlink import Socket

_DNAT, _SETMARK, _MASQ = "CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-MASQ"
_MARK_BIT = 13
_MULTIPORT = 15  # ports that one rule can name
_COMMENT_MAX = 255
_LOCAL = ("-m", "addrtype", "--dst-type", "LOCAL", "-j", _DNAT)

log = logging.getLogger("cri.network")


def _mappings(call: Call) -> list[Mapping[str, Any]]:
    """Checked. Raises ValueError."""
    mappings = list(call.runtime.get("portMappings", ()))
    for mapping in mappings:
        for key in ("hostPort", "containerPort"):
            if not 0 < mapping[key] < 65536:
                raise ValueError(f"invalid {key} number: {mapping[key]}")
    return mappings


async def add(conf: Portmap, call: Call, previous: Result | None) -> Result:
    if previous is None:
        raise ValueError("must be called as chained plugin")
    mappings = _mappings(call)
    for version in (4, 6):
        address = previous.of_pod(call.if_name, version)
        if address is not None and mappings:
            forward(call.plans[version], conf, call, address, mappings)
            if conf.snat and version == 4:
                await call.host.make(lambda sock, to=address: _route_localnet(sock, to))  # type: ignore[misc]
    return previous


def forward(plan: Plan, conf: Portmap, call: Call, address: Interface, mappings: list[Mapping[str, Any]]) -> None:
    """What one family has to have for these ports."""
    if conf.snat and conf.external_set_mark_chain is None:
        _masquerading(plan, 1 << (_MARK_BIT if conf.mark_masq_bit is None else conf.mark_masq_bit))
    plan.shared_chains.append(("nat", _DNAT))
    plan.shared += [Rule("nat", chain, _LOCAL) for chain in ("PREROUTING", "OUTPUT")]
    chain = call.hashed("CNI-DN-")
    plan.chain("nat", chain)
    for words in _rules(conf, address, mappings):
        plan.append("nat", chain, *words)
    _entries(plan, conf, call, address.version, mappings)


def _entries(plan: Plan, conf: Portmap, call: Call, version: int, mappings: list[Mapping[str, Any]]) -> None:
    """What leads to the pod's chain, which is what is taken away."""
    comment = f'dnat name: "{call.network}" id: "{call.container_id}"'
    if len(comment) > _COMMENT_MAX:
        comment = comment[: _COMMENT_MAX - 2] + "..."
    conditions = (conf.conditions_v4 if version == 4 else conf.conditions_v6) or ()
    by_protocol: dict[str, list[int]] = {}
    for mapping in mappings:
        by_protocol.setdefault(mapping["protocol"], []).append(mapping["hostPort"])
    for protocol, ports in sorted(by_protocol.items()):
        for start in range(0, len(ports), _MULTIPORT):
            listed = ",".join(str(port) for port in ports[start : start + _MULTIPORT])
            words = ("-m", "comment", "--comment", comment, "-m", "multiport", "-p", protocol, "--destination-ports", listed)
            plan.append("nat", _DNAT, *words, *conditions, "-j", call.hashed("CNI-DN-"))


def _masquerading(plan: Plan, mark: int) -> None:
    value = f"{mark:#x}/{mark:#x}"
    plan.shared_chains += [("nat", _SETMARK), ("nat", _MASQ)]
    set_mark = ("-m", "comment", "--comment", "CNI portfwd masquerade mark", "-j", "MARK", "--set-xmark", value)
    plan.shared.append(Rule("nat", _SETMARK, set_mark))
    plan.shared.append(Rule("nat", _MASQ, ("-m", "mark", "--mark", value, "-j", "MASQUERADE")))
    # in front: the rules that spare a pod's own subnet would end the walk before
    jump = ("-m", "comment", "--comment", "CNI portfwd requiring masquerade", "-j", _MASQ)
    plan.shared.append(Rule("nat", "POSTROUTING", jump, first=True))


def _rules(conf: Portmap, address: Interface, mappings: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Callers that the reply would not come back to the right way are marked for masquerading; then the translation."""
    mark = conf.external_set_mark_chain or _SETMARK
    target = f"[{address.ip}]" if address.version == 6 else str(address.ip)
    for mapping in mappings:
        base: tuple[str, ...] = ("-p", mapping["protocol"], "--dport", str(mapping["hostPort"]))
        if mapping.get("hostIP"):
            only = ip_address(mapping["hostIP"])
            if only.version != address.version:
                continue
            if not only.is_unspecified:
                base = (*base, "-d", f"{only}/{only.max_prefixlen}")
        if conf.snat:
            yield (*base, "-s", str(address.network), "-j", mark)
            if address.version == 4:
                yield (*base, "-s", "127.0.0.1/32", "-j", mark)
        yield (*base, "-j", "DNAT", "--to-destination", f"{target}:{mapping['containerPort']}")


def _route_localnet(sock: Socket, address: Interface) -> None:
    """127.0.0.1 as a host port: such packets may leave by the link that the pod is behind."""
    index = rtnl.outgoing(sock, address.ip)
    if index:
        node_sysctl(f"net/ipv4/conf/{rtnl.link(sock, index=index).name}/route_localnet", "1")


async def applied(call: Call) -> None:
    """After the rules: flows of UDP that lead elsewhere would go on to do so for as long as they are not idle."""
    ports = {m["hostPort"] for m in call.runtime.get("portMappings", ()) if m["protocol"] == "udp"}
    versions = [version for version, plan in call.plans.items() if plan]
    if ports:
        await call.host.make(lambda _: conntrack.forget(versions, "udp", ports))


async def delete(conf: Portmap, call: Call, previous: Result | None) -> None:
    mappings = _mappings(call)
    for version, plan in call.plans.items() if mappings else ():
        if previous is None or previous.of_pod(call.if_name, version) is not None:
            plan.chain("nat", call.hashed("CNI-DN-"))
            _entries(plan, conf, call, version, mappings)


async def check(conf: Portmap, call: Call, result: Result) -> None:
    mappings = _mappings(call)
    for version in (4, 6) if mappings else ():
        address = result.of_pod(call.if_name, version)
        if address is not None:
            forward(call.plans[version], conf, call, address, mappings)
