"""What a pod means to plugins: CNI_ARGS for all of them, capability arguments for those that ask (CONVENTIONS.md). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import ip_interface
from typing import Any, Final

from cri.errors import InvalidArgument
from cri.network.base import PodNetwork
from cri.network.cni.conf import Plugin
from protos.runtime.v1 import api_pb2 as v1

INGRESS: Final = "kubernetes.io/ingress-bandwidth"
EGRESS: Final = "kubernetes.io/egress-bandwidth"
#: Annotations of ours. They reach a plugin only if the network's configuration declares the capability, which is the administrator's word.
MAC: Final = "network.cri-shim.io/mac"
IPS: Final = "network.cri-shim.io/ips"
ALIASES: Final = "network.cri-shim.io/aliases"
INFINIBAND: Final = "network.cri-shim.io/infiniband-guid"
POD_ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"

_BURST: Final = (1 << 32) - 1  # bits; what containerd and CRI-O send, so that the rate alone limits
_SLOWEST, _FASTEST = 1000, 10**15  # bits per second, as Kubernetes' own check has it
_QUANTITY = re.compile(r"\+?(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:([eE][+-]?\d{1,2})|(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?)")
_SUFFIXES = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("0.001")}
_SUFFIXES |= {s: Decimal(1000) ** (i + 1) for i, s in enumerate("kMGTPE")}
_SUFFIXES |= {f"{s}i": Decimal(1024) ** (i + 1) for i, s in enumerate("KMGTPE")}
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_GUID = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){7}")
_PROTOCOLS: Mapping[int, str] = {v1.TCP: "tcp", v1.UDP: "udp", v1.SCTP: "sctp"}


def arguments(pod: PodNetwork) -> tuple[tuple[str, str], ...]:
    """CNI_ARGS as pairs. A value that would add a pair of its own (``a;IP=10.0.0.1``) is refused."""
    pairs = (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", pod.namespace),
        ("K8S_POD_NAME", pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.pod_id),
        ("K8S_POD_UID", pod.uid),
    )
    for key, value in pairs:
        if ";" in value or "=" in value or not (value.isprintable() or not value):
            raise InvalidArgument(f"cannot be passed to a network plugin as {key}: it contains ';', '=' or a control character")
    return pairs


def capabilities(pod: PodNetwork, pod_cidrs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every capability argument that there is something to say for. Raises InvalidArgument."""
    found: dict[str, Any] = {
        "portMappings": _port_mappings(pod),
        "bandwidth": _bandwidth(pod.annotations),
        "dns": _dns(pod.dns),
        "ipRanges": [[{"subnet": cidr}] for cidr in pod_cidrs],
        "mac": _mac(pod.annotations.get(MAC, "")),
        "ips": _ips(pod.annotations.get(IPS, "")),
        "aliases": [a.strip() for a in pod.annotations.get(ALIASES, "").split(",") if a.strip()],
        "cgroupPath": pod.cgroup_parent,
        "infinibandGUID": _guid(pod.annotations.get(INFINIBAND, "")),
        POD_ANNOTATIONS: dict(pod.annotations),
    }
    return {key: value for key, value in found.items() if value}


def runtime_config(plugin: Plugin, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``runtimeConfig`` of one plugin: what it declares and we have."""
    return {key: arguments[key] for key in sorted(plugin.capabilities) if key in arguments}


def _port_mappings(pod: PodNetwork) -> list[dict[str, Any]]:
    mappings = []
    for mapping in pod.port_mappings:
        if mapping.host_port <= 0:
            continue
        protocol = _PROTOCOLS.get(mapping.protocol)
        if protocol is None:
            raise InvalidArgument(f"unknown protocol {mapping.protocol}", field="config.port_mappings")
        one = {"hostPort": mapping.host_port, "containerPort": mapping.container_port, "protocol": protocol, "hostIP": mapping.host_ip}
        mappings.append({key: value for key, value in one.items() if value != ""})
    return mappings


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for name, direction in ((INGRESS, "ingress"), (EGRESS, "egress")):
        if name in annotations:
            found[f"{direction}Rate"] = _rate(name, annotations[name])
            found[f"{direction}Burst"] = _BURST
    return found


def _rate(name: str, text: str) -> int:
    try:
        rate = quantity(text)
    except ValueError as error:
        raise InvalidArgument(f"{error}", field=f"config.annotations[{name}]") from None
    if not _SLOWEST <= rate <= _FASTEST:
        raise InvalidArgument("must be between 1k and 1P bits per second", field=f"config.annotations[{name}]")
    return rate


def quantity(text: str) -> int:
    """A Kubernetes quantity (``10M``, ``1.5Gi``, ``2e6``) as a whole number, rounded up. Raises ValueError."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a quantity")
    number, exponent, suffix = match.groups()
    value = Decimal(number) * (Decimal(f"1{exponent}") if exponent else _SUFFIXES.get(suffix or "", Decimal(1)))
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def _dns(dns: v1.DNSConfig | None) -> dict[str, list[str]]:
    if dns is None:
        return {}
    fields = {"servers": list(dns.servers), "searches": list(dns.searches), "options": list(dns.options)}
    return fields if any(fields.values()) else {}


def _mac(text: str) -> str:
    if text and not _MAC.fullmatch(text):
        raise InvalidArgument("not a MAC address", field=f"config.annotations[{MAC}]")
    return text


def _guid(text: str) -> str:
    if text and not _GUID.fullmatch(text):
        raise InvalidArgument("not a GUID of InfiniBand", field=f"config.annotations[{INFINIBAND}]")
    return text


def _ips(text: str) -> list[str]:
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for one in wanted:
        try:
            ip_interface(one)
        except ValueError:
            raise InvalidArgument(f"{one[:60]!r} is not an address", field=f"config.annotations[{IPS}]") from None
    return wanted
