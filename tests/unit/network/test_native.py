"""The native plugins' pure parts: what is understood, results in every version, the order of addresses, rules as text, rates."""

from __future__ import annotations

import json
import os
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.network.cni import conf
from cri.network.native import hostlocal, options, result, rules
from cri.network.native.bandwidth import bucket
from cri.network.native.options import HostLocal, NotNative, Range
from cri.network.native.result import Ip, Link, Result, Route

BRIDGE: dict[str, Any] = {"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.0.0/24"}}


def network(*plugins: dict[str, Any]) -> conf.NetworkConf:
    return conf.parse(json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": plugins}).encode())


@pytest.mark.parametrize(
    "plugins, why",
    [
        ([BRIDGE, {"type": "calico"}], "calico is not native"),
        ([{**BRIDGE, "portIsolation": True}], "bridge: Object contains unknown field `portIsolation`"),
        ([{**BRIDGE, "IsGateway": True}], "unknown field `IsGateway`"),  # Go would take it
        ([{**BRIDGE, "vlan": 5000}], "vlan or mtu is out of range"),
        ([{**BRIDGE, "bridge": "../x"}], "not the name of an interface"),
        ([{**BRIDGE, "ipMasqBackend": "nftables"}], "'nftables' is not native"),
        ([{**BRIDGE, "ipam": {**BRIDGE["ipam"], "routes": [{"dst": "0.0.0.0/0", "mtu": 1}]}}], "unknown field `mtu`"),
        ([{**BRIDGE, "ipam": {**BRIDGE["ipam"], "dataDir": "relative"}}], "dataDir is not absolute"),
        ([{**BRIDGE, "ipam": {"type": "dhcp"}}], "dhcp is not native"),
        ([{"type": "portmap"}], "cannot be the first plugin"),
        ([BRIDGE, BRIDGE], "two plugins make the interface"),
        ([BRIDGE, {"type": "host-local"}], "cannot be a plugin of its own"),
        ([BRIDGE, {"type": "portmap", "backend": "nftables"}], "is not native"),
        ([BRIDGE, {"type": "portmap", "conditionsV4": ["-d", "1.1.1.1\nCOMMIT"]}], "control character"),
        ([BRIDGE, {"type": "portmap", "externalSetMarkChain": "A B"}], "not the name of a chain"),
        ([BRIDGE, {"type": "bandwidth", "unshapedSubnets": []}], "unknown field `unshapedSubnets`"),
        ([BRIDGE, {"type": "firewall", "backend": "firewalld"}], "'firewalld' is not native"),
        ([BRIDGE, {"type": "tuning", "sysctl": {"net.core.somaxconn": 1}}], "Expected `str`, got `int`"),
    ],
)
def test_what_is_not_understood_is_executed(plugins: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(NotNative, match=why):
        options.understand(network(*plugins), options.NATIVE)


def test_switched_off() -> None:
    with pytest.raises(NotNative, match="native_plugins does not have host-local"):
        options.understand(network(BRIDGE), {"bridge"})
    assert options.versions(options.understand(network(BRIDGE), options.NATIVE)) == frozenset(options.VERSIONS)
    firewall = options.understand(network(BRIDGE, {"type": "firewall"}), options.NATIVE)
    assert options.versions(firewall) == {"0.4.0", "1.0.0", "1.1.0"}


FULL = Result(
    links=(Link("cni0", "aa:bb:cc:dd:ee:ff"), Link("eth0", "00:11:22:33:44:55", "/run/netns/x")),
    ips=(Ip(ip_interface("10.1.0.2/24"), ip_address("10.1.0.1"), 1), Ip(ip_interface("fd00::2/64"), None, 1)),
    routes=(Route(ip_network("0.0.0.0/0"), ip_address("10.1.0.1")), Route(ip_network("::/0"))),
    dns={"nameservers": ["192.0.2.53"]},
)


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_results_survive_every_version(version: str) -> None:
    raw = FULL.encode(version)
    assert raw["cniVersion"] == version and result.parse(raw) == FULL
    assert ("version" in raw["ips"][0]) == (version < "1.0.0")


def test_results_of_old_versions() -> None:
    assert FULL.encode("0.2.0") == {
        "cniVersion": "0.2.0",
        "ip4": {"ip": "10.1.0.2/24", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]},
        "ip6": {"ip": "fd00::2/64", "routes": [{"dst": "::/0"}]},
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    assert [i.address for i in result.parse(FULL.encode("0.1.0")).ips] == [i.address for i in FULL.ips]
    with pytest.raises(conf.ConfError, match="without addresses"):
        Result().encode("0.2.0")


@pytest.mark.parametrize("raw", [{"ips": [{}]}, {"ips": [{"address": "x"}]}, {"interfaces": [1]}, {"routes": [{"dst": 1.5}]}, {"ip4": 3}])
def test_results_that_are_none(raw: dict[str, Any]) -> None:
    with pytest.raises(conf.ConfError, match="not a result"):
        result.parse(raw)


# -- host-local


def spans(*ranges: dict[str, str]) -> hostlocal.Spans:
    return hostlocal.ranges(HostLocal(type="host-local", ranges=[[Range(**r) for r in ranges]]), {})[0]


def test_addresses_come_in_the_plugins_order() -> None:
    two = spans({"subnet": "10.0.0.0/29", "gateway": "10.0.0.3"}, {"subnet": "10.0.1.0/30"})
    everything = [str(a) for a, _ in hostlocal.candidates(two, None)]
    assert everything == ["10.0.0.1", "10.0.0.2", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.1.2"]
    assert [str(a) for a, _ in hostlocal.candidates(two, ip_address("10.0.0.5"))] == [everything[4], everything[5], *everything[:4]]
    assert [str(a) for a, _ in hostlocal.candidates(two, ip_address("10.0.1.2"))] == everything
    assert [str(a) for a, _ in hostlocal.candidates(two, ip_address("192.0.2.1"))] == everything, "of another range"


@given(st.integers(0, 255), st.integers(2, 6))
def test_every_address_once(last: int, bits: int) -> None:
    some = spans({"subnet": f"10.0.0.0/{32 - bits}"}, {"subnet": "10.9.0.0/30"})
    found = [a for a, _ in hostlocal.candidates(some, ip_address(f"10.0.0.{last}"))]
    assert len(found) == len(set(found)) == (1 << bits) - 3 + 1


@pytest.mark.parametrize(
    "fields, why",
    [
        ({}, "no IP ranges"),
        ({"subnet": "10.0.0.1/24"}, "host bits"),
        ({"subnet": "10.0.0.0/31"}, "too small"),
        ({"subnet": "10.0.0.0/24", "range_start": "10.0.1.1"}, "rangeStart 10.0.1.1 is not in network"),
        ({"subnet": "10.0.0.0/24", "ranges": [[Range(subnet="10.0.0.128/25")]]}, "overlaps"),
        ({"ranges": [[Range(subnet="10.0.0.0/24"), Range(subnet="fd00::/64")]]}, "both families"),
        ({"ranges": [[]]}, "empty"),
    ],
)
def test_ranges_that_are_none(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        hostlocal.ranges(HostLocal(type="host-local", **fields), {})


def test_reserve_all_or_none_and_release(tmp_path: Path) -> None:
    sets = hostlocal.ranges(
        HostLocal(type="host-local", ranges=[[Range(subnet="10.0.0.0/30")], [Range(subnet="fd00::/64")]]), {"ipRanges": []}
    )
    directory = os.open(tmp_path, os.O_RDONLY)
    first = hostlocal.reserve(directory, sets, ("one", "eth0"), [ip_address("fd00::77")])
    assert [str(ip.address) for ip in first] == ["10.0.0.2/30", "fd00::77/64"] and str(first[0].gateway) == "10.0.0.1"
    assert (tmp_path / "10.0.0.2").read_bytes() == b"one\r\neth0" and (tmp_path / "last_reserved_ip.1").read_text() == "fd00::77"
    with pytest.raises(ValueError, match=r"no IP addresses available in range set: 10.0.0.1-10.0.0.2"):
        hostlocal.reserve(directory, sets, ("two", "eth0"), [])
    with pytest.raises(ValueError, match=r"is not available"):
        hostlocal.reserve(directory, sets[1:], ("two", "eth0"), [ip_address("fd00::77")])
    with pytest.raises(ValueError, match=r"all requested IPs: 192.0.2.1"):
        hostlocal.reserve(directory, sets[1:], ("two", "eth0"), [ip_address("192.0.2.1")])
    assert sorted(p.name for p in tmp_path.iterdir() if p.read_bytes().startswith((b"one", b"two"))) == ["10.0.0.2", "fd00::77"]
    hostlocal.release(directory, ("one", "eth1"))
    (tmp_path / "10.0.0.9").write_text("one")  # as very old releases wrote it
    assert sorted(hostlocal.owned(directory, ("one", "eth0"), ["10.0.0.2", "fd00::77"])) == ["10.0.0.2", "fd00::77"]
    hostlocal.release(directory, ("one", "eth0"))
    assert sorted(os.listdir(tmp_path)) == ["last_reserved_ip.0", "last_reserved_ip.1"]
    hostlocal.reserve(directory, sets, ("three", "eth0"), [])
    assert sorted(hostlocal.collect(directory, {("four", "eth0")})) == ["10.0.0.2", "fd00::78"]
    os.close(directory)


# -- rules


def test_rules_are_found_whoever_wrote_them() -> None:
    plan = rules.Plan()
    plan.chain("nat", "CNI-own")
    plan.append("nat", "POSTROUTING", "-s", "10.0.0.2/32", "-j", "CNI-own", "-m", "comment", "--comment", 'name: "n" id: "x"')
    plan.append("filter", "CNI-FORWARD", "-s", "10.0.0.2/32", "-j", "ACCEPT")
    saved = """*nat
:POSTROUTING ACCEPT [0:0]
:CNI-own - [0:0]
:CNI-other - [0:0]
-A POSTROUTING -s 10.0.0.2/32 -m comment --comment "name: \\"n\\" id: \\"x\\"" -j CNI-own
-A POSTROUTING -s 10.0.0.0/24 -j CNI-own
-A POSTROUTING -s 10.0.0.3/32 -j CNI-other
-A CNI-own -j ACCEPT
*filter
-A CNI-FORWARD -s 10.0.0.2/32 -j ACCEPT
-A CNI-FORWARD -s 10.0.0.22/32 -j ACCEPT
"""
    assert plan.find_and_remove(saved).splitlines() == [
        "*nat",
        '-D POSTROUTING -s 10.0.0.2/32 -m comment --comment "name: \\"n\\" id: \\"x\\"" -j CNI-own',
        "-D POSTROUTING -s 10.0.0.0/24 -j CNI-own",
        "-F CNI-own",
        "-X CNI-own",
        "COMMIT",
        "*filter",
        "-D CNI-FORWARD -s 10.0.0.2/32 -j ACCEPT",
        "COMMIT",
    ]
    assert plan.find_and_remove("*nat\n") == ""


def test_rates_are_rounded_as_the_plugin_does() -> None:
    """10 Mbit/s with the burst that the runtime sends: 25 ms of it beside the burst, and a full bucket in microseconds, in ticks."""
    made = bucket(10_000_000, (1 << 32) - 1, 15.625)
    assert made is not None
    assert (made.rate, made.limit) == (1_250_000, 31_250 + 536_870_911) and made.buffer == int(429_496_728 * 15.625) & 0xFFFFFFFF
    assert bucket(0, 0, 15.625) is None
    for rate, burst in ((1000, 0), (0, 1000), (1000, 1 << 36)):
        with pytest.raises(ValueError, match="burst"):
            bucket(rate, burst, 15.625)
