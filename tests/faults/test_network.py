"""The built-in network in a daemon that dies between any two of its steps (scenario 59, dual stack)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import ips, remove, stop
from tests.daemon.harness import Daemon, Node, running, wait_for
from tests.faults.test_cni import rise

ADD = ("address", "veth", "rules", "result")
DELETE = ("veth", "address")
NOTHING: dict[str, Any] = {"links": [], "rules": [], "reservations": [], "pins": []}


@pytest.fixture(scope="module")
def daemon(node: Node) -> Iterator[Daemon]:
    with running(node, subnets=("10.220.0.0/24", "fd00:220::/64")) as daemon:
        yield daemon


def held(daemon: Daemon) -> dict[str, Any]:
    links = [line.split(": ")[1].split("@")[0] for line in daemon.node.run("ip", "-o", "link").stdout.splitlines()]
    return {
        "links": [name for name in links if name.startswith("csv")],
        "rules": [line for line in daemon.node.run("nft", "list", "ruleset").stdout.splitlines() if "8083" in line],
        "reservations": os.listdir(daemon.root / "network" / "pods"),
        "pins": os.listdir(daemon.state / "netns"),
    }


def config(daemon: Daemon) -> v1.PodSandboxConfig:
    return daemon.pod_config(port_mappings=[v1.PortMapping(host_port=8083, container_port=80, protocol=v1.UDP)])


def die(daemon: Daemon, point: str) -> None:
    daemon.env["CRI_SHIM_FAILPOINTS"] = f"{point}=exit"
    daemon.restart()


def test_killed_while_a_pod_is_added(daemon: Daemon) -> None:
    asked = config(daemon)
    for stage in ADD:  # each start recovers from the death before and dies of the next
        die(daemon, f"add network/{stage}")
        wait_for("the release", lambda: held(daemon) == NOTHING)
        with pytest.raises(grpc.RpcError):
            daemon.run_pod(asked)
        assert daemon.process is not None and daemon.process.wait(10) == 86
    rise(daemon)
    wait_for("the release", lambda: held(daemon) == NOTHING)
    pod, _ = daemon.run_pod(asked)
    assert ips(daemon, pod) == ["10.220.0.2", "fd00:220::2"], "the first ones are free again"
    assert all(held(daemon).values())
    remove(daemon, pod)
    assert held(daemon) == NOTHING


@pytest.mark.parametrize("stage", DELETE)
def test_killed_while_a_pod_is_deleted(daemon: Daemon, stage: str) -> None:
    pod, _ = daemon.run_pod(config(daemon))
    die(daemon, f"delete network/{stage}")
    with pytest.raises(grpc.RpcError):
        stop(daemon, pod)
    rise(daemon)
    stop(daemon, pod)
    remove(daemon, pod)
    wait_for("the release", lambda: held(daemon) == NOTHING)
