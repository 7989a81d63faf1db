"""What plugins are told about a pod."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.errors import InvalidArgument
from cri.network.base import PodNetwork
from cri.network.cni import arguments
from cri.network.cni.conf import Plugin
from protos.runtime.v1 import api_pb2 as v1


def pod(**fields: Any) -> PodNetwork:
    return PodNetwork(pod_id="a" * 64, netns_path="/run/x", **{"namespace": "ns", "name": "p", "uid": "u", **fields})


def test_cni_args() -> None:
    assert dict(arguments.arguments(pod())) == {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": "ns",
        "K8S_POD_NAME": "p",
        "K8S_POD_INFRA_CONTAINER_ID": "a" * 64,
        "K8S_POD_UID": "u",
    }


@pytest.mark.parametrize("name", ["p;IP=10.0.0.1", "a=b", "a\nb", "a\0"])
def test_a_name_adds_no_argument(name: str) -> None:
    for field in ("namespace", "name", "uid"):
        with pytest.raises(InvalidArgument):
            arguments.arguments(pod(**{field: name}))


def test_capabilities_of_a_pod_with_everything() -> None:
    annotations = {
        arguments.INGRESS: "10M",
        arguments.EGRESS: "1.5Mi",
        arguments.MAC: "0a:58:0a:00:00:02",
        arguments.IPS: "10.0.0.9/24, fd00::9",
        arguments.ALIASES: "db, cache",
        arguments.INFINIBAND: "c2:11:22:33:44:55:66:77",
    }
    ports = (
        v1.PortMapping(host_port=80, container_port=8080, host_ip="192.0.2.1"),
        v1.PortMapping(protocol=v1.SCTP, host_port=9, container_port=9),
        v1.PortMapping(container_port=1),
    )
    dns = v1.DNSConfig(servers=["10.0.0.10"], searches=["x.local"], options=["ndots:5"])
    found = arguments.capabilities(
        pod(annotations=annotations, port_mappings=ports, dns=dns, cgroup_parent="/kubepods/p"), ("10.1.0.0/24", "fd01::/64")
    )
    burst = (1 << 32) - 1
    assert found == {
        "portMappings": [
            {"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": "192.0.2.1"},
            {"hostPort": 9, "containerPort": 9, "protocol": "sctp"},
        ],
        "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": burst, "egressRate": 1_572_864, "egressBurst": burst},
        "dns": {"servers": ["10.0.0.10"], "searches": ["x.local"], "options": ["ndots:5"]},
        "ipRanges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd01::/64"}]],
        "mac": "0a:58:0a:00:00:02",
        "ips": ["10.0.0.9/24", "fd00::9"],
        "aliases": ["db", "cache"],
        "cgroupPath": "/kubepods/p",
        "infinibandGUID": "c2:11:22:33:44:55:66:77",
        "io.kubernetes.cri.pod-annotations": annotations,
    }
    plugin = Plugin("x", frozenset({"mac", "portMappings", "unknown"}), {})
    assert set(arguments.runtime_config(plugin, found)) == {"mac", "portMappings"}


def test_a_plain_pod_has_nothing_to_say() -> None:
    assert arguments.capabilities(pod(dns=v1.DNSConfig())) == {}


@pytest.mark.parametrize(
    "name, text",
    [
        (arguments.INGRESS, "lots"),
        (arguments.EGRESS, "10"),
        (arguments.INGRESS, "2P"),
        (arguments.MAC, "0a:58"),
        (arguments.IPS, "10.0.0"),
        (arguments.INFINIBAND, "c2:1"),
    ],
)
def test_annotations_that_cannot_be_meant(name: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match="config.annotations"):
        arguments.capabilities(pod(annotations={name: text}))


@pytest.mark.parametrize(
    "text, value",
    [
        ("10M", 10**7),
        ("1Ki", 1024),
        ("0.5k", 500),
        ("2e6", 2_000_000),
        ("1500m", 2),
        (".5G", 500_000_000),
        ("1E", 10**18),
        ("+7", 7),
        ("1n", 1),
    ],
)
def test_quantities(text: str, value: int) -> None:
    assert arguments.quantity(text) == value


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="0123456789.eE+-kKMGTPimun "))
def test_a_quantity_is_a_number_or_refused(text: str) -> None:
    try:
        assert arguments.quantity(text) >= 0
    except ValueError:
        pass
