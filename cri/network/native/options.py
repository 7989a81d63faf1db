"""What native plugins understand of their configuration: everything, or the network's plugins are executed. Pure.

A field that is not listed here, or has another type, is one that our plugin would ignore and the real one would not, or would refuse in
words of its own. Fields and defaults are those of the plugins' releases up to the one that Debian has (1.1.1), ``txQLen`` is newer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec

from cri.network.cni.conf import NetworkConf, Plugin

#: The plugins that there are, and the oldest version of the protocol that each speaks.
NATIVE: Mapping[str, str] = {
    "loopback": "0.1.0",
    "bridge": "0.1.0",
    "ptp": "0.1.0",
    "host-local": "0.1.0",
    "portmap": "0.1.0",
    "tuning": "0.1.0",
    "bandwidth": "0.3.0",
    "firewall": "0.4.0",
}
VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_CHAIN = re.compile(r"[A-Za-z0-9_.:\-]{1,28}")
_LINK = re.compile(r"[^\s/:]{1,15}")


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    pass


class Dns(Struct, frozen=True):
    nameservers: list[str] = []
    domain: str = ""
    search: list[str] = []
    options: list[str] = []


class Any_(Struct, frozen=True):
    """What every plugin may carry."""

    type: str
    name: str = ""
    cni_version: str = ""
    capabilities: dict[str, bool] = {}
    dns: Dns = Dns()


class RouteConf(Struct, frozen=True):
    dst: str
    gw: str = ""

    def __post_init__(self) -> None:
        ip_network(self.dst, strict=False)
        if self.gw:
            ip_address(self.gw)


class Range(Struct, frozen=True):
    subnet: str
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""


class HostLocal(Struct, frozen=True):
    type: str
    subnet: str = ""
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""
    ranges: list[list[Range]] = []
    routes: list[RouteConf] = []
    data_dir: str = ""
    resolv_conf: str = ""

    def __post_init__(self) -> None:
        if self.type != "host-local":
            raise ValueError(f"ipam.type {self.type[:40]!r} is not native")
        if self.data_dir and not self.data_dir.startswith("/"):
            raise ValueError("ipam.dataDir is not absolute")


class IpsArgs(Struct, frozen=True):
    mac: str = ""
    ips: list[str] = []


class BridgeArgs(Struct, frozen=True):
    cni: IpsArgs = IpsArgs()


class Bridge(Any_, frozen=True):
    bridge: str = "cni0"
    is_gateway: bool = False
    is_default_gateway: bool = False
    force_address: bool = False
    ip_masq: bool = False
    ip_masq_backend: str = ""
    mtu: int = 0
    hairpin_mode: bool = False
    promisc_mode: bool = False
    vlan: int = 0
    macspoofchk: bool = False
    enabledad: bool = False
    ipam: HostLocal | None = None
    args: BridgeArgs = BridgeArgs()

    def __post_init__(self) -> None:
        if not _LINK.fullmatch(self.bridge):
            raise ValueError("bridge is not the name of an interface")
        if not 0 <= self.vlan <= 4094 or not 0 <= self.mtu <= 65535:
            raise ValueError("vlan or mtu is out of range")
        _iptables(self.ip_masq_backend, "ipMasqBackend")


class Ptp(Any_, frozen=True, kw_only=True):
    ip_masq: bool = False
    ip_masq_backend: str = ""
    mtu: int = 0
    ipam: HostLocal
    args: BridgeArgs = BridgeArgs()

    def __post_init__(self) -> None:
        if not 0 <= self.mtu <= 65535:
            raise ValueError("mtu is out of range")
        _iptables(self.ip_masq_backend, "ipMasqBackend")


class Loopback(Any_, frozen=True):
    pass


class Portmap(Any_, frozen=True):
    snat: bool = True
    masq_all: bool = False
    mark_masq_bit: int | None = None
    external_set_mark_chain: str | None = None
    conditions_v4: list[str] | None = msgspec.field(name="conditionsV4", default=None)
    conditions_v6: list[str] | None = msgspec.field(name="conditionsV6", default=None)
    backend: str = ""

    def __post_init__(self) -> None:
        if self.mark_masq_bit is not None and self.external_set_mark_chain is not None:
            raise ValueError("both markMasqBit and externalSetMarkChain are there")
        if not 0 <= (self.mark_masq_bit or 0) <= 31:
            raise ValueError("markMasqBit is not between 0 and 31")
        if self.external_set_mark_chain is not None and not _CHAIN.fullmatch(self.external_set_mark_chain):
            raise ValueError("externalSetMarkChain is not the name of a chain")
        if self.masq_all:
            raise ValueError("masqAll is not native")
        if any(not word.isprintable() for word in (*(self.conditions_v4 or ()), *(self.conditions_v6 or ()))):
            raise ValueError("a condition has a control character")
        _iptables(self.backend, "backend")


class Bandwidth(Any_, frozen=True):
    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


class Firewall(Any_, frozen=True):
    backend: str = ""
    iptables_admin_chain_name: str = ""
    firewalld_zone: str = ""
    ingress_policy: str = ""

    def __post_init__(self) -> None:
        _iptables(self.backend, "backend")
        if self.ingress_policy not in ("", "open", "same-bridge"):
            raise ValueError("ingressPolicy is not native")
        if self.iptables_admin_chain_name and not _CHAIN.fullmatch(self.iptables_admin_chain_name):
            raise ValueError("iptablesAdminChainName is not the name of a chain")


class TuningArgs(Struct, frozen=True):
    sysctl: dict[str, str] = {}
    mac: str | None = None
    promisc: bool | None = None
    mtu: int | None = None
    allmulti: bool | None = None
    tx_q_len: int | None = None


class TuningCni(Struct, frozen=True):
    cni: TuningArgs = TuningArgs()


class Tuning(Any_, frozen=True):
    data_dir: str = "/run/cni/tuning"
    sysctl: dict[str, str] = {}
    mac: str = ""
    promisc: bool = False
    mtu: int = 0
    allmulti: bool | None = None
    tx_q_len: int | None = None
    args: TuningCni = TuningCni()

    def __post_init__(self) -> None:
        if not self.data_dir.startswith("/"):
            raise ValueError("dataDir is not absolute")


Options = Bridge | Ptp | Loopback | Portmap | Bandwidth | Firewall | Tuning
_KINDS: Mapping[str, type[Any_]] = {
    "loopback": Loopback,
    "bridge": Bridge,
    "ptp": Ptp,
    "portmap": Portmap,
    "bandwidth": Bandwidth,
    "firewall": Firewall,
    "tuning": Tuning,
}
#: What the runtime adds.
_OURS = frozenset({"prevResult", "runtimeConfig"})


class NotNative(Exception):
    """Why the plugins of a network are executed."""


def _iptables(backend: str, name: str) -> None:
    if backend not in ("", "iptables"):
        raise ValueError(f"{name} {backend[:40]!r} is not native")


def understand(conf: NetworkConf, enabled: Collection[str]) -> tuple[Options, ...]:
    """The options of every plugin of a network. Raises NotNative, which says why it has to be executed."""
    found = tuple(_options(plugin, enabled) for plugin in conf.plugins)
    if not isinstance(found[0], Bridge | Ptp | Loopback):
        raise NotNative(f"{conf.plugins[0].type} cannot be the first plugin")
    if any(isinstance(o, Bridge | Ptp) for o in found[1:]):
        raise NotNative("two plugins make the interface")
    return found


def _options(plugin: Plugin, enabled: Collection[str]) -> Options:
    for kind in plugin.types:
        if kind not in NATIVE:
            raise NotNative(f"{kind} is not native")
        if kind not in enabled:
            raise NotNative(f"native_plugins does not have {kind}")
    if plugin.type not in _KINDS:
        raise NotNative(f"{plugin.type} cannot be a plugin of its own")
    raw: dict[str, Any] = {k: v for k, v in plugin.raw.items() if k not in _OURS and not k.startswith("cni.dev/")}
    if raw.get("ipam") == {}:  # no addresses
        del raw["ipam"]
    try:
        return msgspec.convert(raw, type=_KINDS[plugin.type])  # type: ignore[return-value]
    except (msgspec.ValidationError, ValueError) as error:
        raise NotNative(f"{plugin.type}: {error}") from None


def versions(options: tuple[Options, ...]) -> frozenset[str]:
    """The versions of the protocol that these plugins speak."""
    oldest = max(VERSIONS.index(NATIVE[o.type]) for o in options)
    return frozenset(VERSIONS[oldest:])
