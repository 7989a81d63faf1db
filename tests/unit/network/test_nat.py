"""The nftables script as text; what it does is in tests/kernel/test_network_bridge.py."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from cri.errors import FailedPrecondition, InvalidArgument
from cri.network import nat
from cri.network.ipam import HostPort, Reservation
from protos.runtime.v1 import api_pb2 as v1

V4, V6 = ip_network("10.9.0.0/24"), ip_network("fd00::/64")


def reservation(pod_id: str, *ports: HostPort, addresses: tuple[str, ...] = ("10.9.0.2/24",)) -> Reservation:
    return Reservation(pod_id=pod_id, boot_id="b", addresses=addresses, link="csv" + pod_id, ports=ports)


def test_without_host_ports_there_is_only_masquerading() -> None:
    text = nat.render("br0", [V4], [reservation("a")])
    assert "delete table inet cri-shim" in text
    assert 'ip saddr { 10.9.0.0/24 } ip daddr != { 10.9.0.0/24, 224.0.0.0/4 } oifname != "br0" masquerade' in text
    assert "dnat" not in text and "ip6" not in text


def test_host_ports_by_family() -> None:
    pod = reservation(
        "a",
        HostPort("tcp", 80, 8080),
        HostPort("udp", 53, 53, "192.0.2.1"),
        HostPort("sctp", 99, 9, "2001:db8::1"),
        addresses=("10.9.0.2/24", "fd00::2/64"),
    )
    text = nat.render("br0", [V4, V6], [pod])
    assert "tcp . 80 : 10.9.0.2 . 8080" in text and "tcp . 80 : fd00::2 . 8080" in text
    assert "udp . 192.0.2.1 . 53 : 10.9.0.2 . 53" in text and "udp . 53 : fd00::2" not in text
    assert "sctp . 2001:db8::1 . 99 : fd00::2 . 9" in text


def test_overlapping_subnets_are_merged() -> None:
    text = nat.render("br0", [V4, ip_network("10.9.0.0/16")], [])
    assert "{ 10.9.0.0/16 }" in text and "10.9.0.0/24" not in text


def test_mappings_of_the_kubelet() -> None:
    mappings = [
        v1.PortMapping(container_port=8080),
        v1.PortMapping(container_port=8080, host_port=80, protocol=v1.UDP),
        v1.PortMapping(container_port=1, host_port=2, protocol=v1.SCTP, host_ip="0.0.0.0"),
        v1.PortMapping(container_port=1, host_port=3, host_ip="192.0.2.7"),
    ]
    ports = nat.host_ports(mappings, [4])
    assert ports == (HostPort("udp", 80, 8080), HostPort("sctp", 2, 1), HostPort("tcp", 3, 1, "192.0.2.7"))


@pytest.mark.parametrize(
    "mapping",
    [
        v1.PortMapping(container_port=0, host_port=80),
        v1.PortMapping(container_port=1, host_port=65536),
        v1.PortMapping(container_port=1, host_port=-1),
        v1.PortMapping(container_port=1, host_port=80, host_ip="example.org"),
        v1.PortMapping(container_port=1, host_port=80, host_ip="1.2.3.4; drop"),
        v1.PortMapping(container_port=1, host_port=80, host_ip="2001:db8::1"),
    ],
)
def test_mappings_that_cannot_be(mapping: v1.PortMapping) -> None:
    with pytest.raises(InvalidArgument, match=r"port_mappings\[0\]"):
        nat.host_ports([mapping], [4])


@pytest.mark.parametrize(("first", "second", "clash"), [("", "", True), ("192.0.2.1", "", True), ("192.0.2.1", "192.0.2.2", False)])
def test_conflicts(first: str, second: str, clash: bool) -> None:
    held = [reservation("a", HostPort("tcp", 80, 1, first))]
    wanted = [HostPort("tcp", 80, 2, second), HostPort("udp", 80, 2)]
    if clash:
        with pytest.raises(FailedPrecondition, match="80/tcp"):
            nat.check_conflicts(wanted, held)
    else:
        nat.check_conflicts(wanted, held)
