"""firewall, with iptables: what is forwarded to and from the pod is accepted, where a node's firewall would drop it."""

from __future__ import annotations

from pathlib import Path

from cri.network.native.call import Call
from cri.network.native.options import Firewall
from cri.network.native.result import Result
from cri.network.native.rules import Plan, Rule, with_comment

_OURS, _ADMIN = "CNI-FORWARD", "CNI-ADMIN"
_STAGES = ("CNI-ISOLATION-STAGE-1", "CNI-ISOLATION-STAGE-2")
_ISOLATED = "CNI firewall plugin rules (ingressPolicy: same-bridge)"
_PID_FILE = Path("/run/firewalld.pid")


def firewalld_runs() -> bool:
    """The plugin then talks to firewalld unless it is told not to, so it has to be executed."""
    try:
        return Path("/proc", _PID_FILE.read_text().strip(), "stat").exists()
    except FileNotFoundError:
        return False


async def add(conf: Firewall, call: Call, previous: Result | None) -> Result:
    if previous is None:
        raise ValueError("missing prevResult from earlier plugin")
    accept(conf, call, previous)
    for version in sorted({ip.address.version for ip in previous.ips}):
        if conf.ingress_policy == "same-bridge":
            if not previous.links:
                raise ValueError('ingressPolicy "same-bridge" needs a bridge')
            _isolate(call.plans[version], previous.links[0].name)
    return previous


def accept(conf: Firewall, call: Call, result: Result) -> None:
    for version, plan in call.plans.items():
        addresses = [ip.address for ip in result.ips if ip.address.version == version]
        if addresses:
            _prepare(plan, conf.iptables_admin_chain_name or _ADMIN)
        _rules(plan, [f"{a.ip}/{a.max_prefixlen}" for a in addresses])


def _rules(plan: Plan, addresses: list[str]) -> None:
    for address in addresses:
        plan.append("filter", _OURS, "-d", address, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
        plan.append("filter", _OURS, "-s", address, "-j", "ACCEPT")


def _prepare(plan: Plan, admin: str) -> None:
    plan.shared_chains += [("filter", _OURS), ("filter", admin)]
    ours = ("-m", "comment", "--comment", "CNI firewall plugin rules", "-j", _OURS)
    overrides = ("-m", "comment", "--comment", "CNI firewall plugin admin overrides", "-j", admin)
    plan.shared += [Rule("filter", "FORWARD", ours, first=True), Rule("filter", _OURS, overrides, first=True)]


def _isolate(plan: Plan, bridge: str) -> None:
    """Nothing comes into this bridge from another one that is isolated as well."""
    first, second = _STAGES
    plan.shared_chains += [("filter", first), ("filter", second)]

    def rule(chain: str, *words: str, in_front: bool = False) -> Rule:
        return Rule("filter", chain, with_comment(*words, comment=_ISOLATED), first=in_front)

    plan.shared += [
        rule("FORWARD", "-j", first, in_front=True),
        rule(first, "-i", bridge, "!", "-o", bridge, "-j", second, in_front=True),
        rule(first, "-j", "RETURN"),
        rule(second, "-o", bridge, "-j", "DROP", in_front=True),
        rule(second, "-j", "RETURN"),
    ]


async def delete(conf: Firewall, call: Call, previous: Result | None) -> None:
    """What all pods share stays."""
    for version, plan in call.plans.items():
        addresses = [ip.address for ip in previous.ips if ip.address.version == version] if previous is not None else []
        _rules(plan, [f"{a.ip}/{a.max_prefixlen}" for a in addresses])


async def check(conf: Firewall, call: Call, result: Result) -> None:
    accept(conf, call, result)
