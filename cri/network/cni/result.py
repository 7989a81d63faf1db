"""What plugins answer (SPEC.md section 5), in every version of the protocol. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from cri.network.cni.conf import ConfError, Object, decode

INCOMPATIBLE = 1  # a version that the plugin does not speak
CONTAINER_UNKNOWN = 3  # the runtime need not clean up
_TEXT_MAX = 1000


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error object. ``code`` below 100 is one of the specification's."""

    code: int
    message: str
    details: str = ""

    def __str__(self) -> str:
        text = "; ".join(_line(t) for t in (self.message, self.details) if t) or "no message"
        return f"{text} (code {self.code})"


def _line(text: str) -> str:
    """One line of an error, bounded: it ends up in events of the cluster."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _TEXT_MAX else f"{flat[:_TEXT_MAX]}…"


def refusal(output: bytes) -> Refusal | None:
    """The error object that a plugin printed; None for anything else."""
    try:
        raw = decode(output)
    except ConfError:
        return None
    code, message, details = raw.get("code"), raw.get("msg", ""), raw.get("details", "")
    if type(code) is not int or not isinstance(message, str):
        return None
    return Refusal(code, message, details if isinstance(details, str) else "")


def parse(output: bytes, version: str) -> Object:
    """The result of ADD as the next plugin gets it. Raises ConfError.

    A result without a version is one of the configuration's (containernetworking/cni#895), not of 0.1.0.
    """
    raw = decode(output)
    if not raw.get("cniVersion"):
        raw["cniVersion"] = version
    return raw


def addresses(raw: Mapping[str, Any], interface: str) -> tuple[str, ...]:
    """Addresses of the pod's interface, in the plugins' order: the first one is the primary one. Raises ConfError."""
    if "ips" not in raw and ("ip4" in raw or "ip6" in raw):  # before 0.3.0
        old = [raw[k] for k in ("ip4", "ip6") if raw.get(k)]
        return tuple(_address(o.get("ip") if isinstance(o, dict) else None, "ip4 or ip6") for o in old)
    ips, interfaces = raw.get("ips") or [], raw.get("interfaces") or []
    if not isinstance(ips, list) or not isinstance(interfaces, list) or not all(isinstance(i, dict) for i in interfaces):
        raise ConfError("ips or interfaces: not a list of objects")
    found: dict[str, bool] = {}
    for number, ip in enumerate(ips):
        if not isinstance(ip, dict):
            raise ConfError(f"ips[{number}]: not an object")
        address, index = _address(ip.get("address"), f"ips[{number}].address"), ip.get("interface")
        if index is not None and (type(index) is not int or not 0 <= index < len(interfaces)):
            raise ConfError(f"ips[{number}].interface: no such interface")
        # addresses of the node's side may be listed, too
        if index is None or interfaces[index].get("name") == interface:
            found[address] = True
    return tuple(found)


def _address(value: object, where: str) -> str:
    try:
        if not isinstance(value, str):
            raise ValueError
        return str(ip_interface(value).ip)
    except ValueError:
        raise ConfError(f"{where}: not an address") from None


def spoken(output: bytes) -> frozenset[str]:
    """``supportedVersions`` of a VERSION answer. Raises ConfError."""
    versions = decode(output).get("supportedVersions")
    if not isinstance(versions, list) or not all(isinstance(v, str) for v in versions):
        raise ConfError("supportedVersions: not a list of strings")
    return frozenset(versions)
