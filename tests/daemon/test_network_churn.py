"""500 pods, dual stack and with host ports, ten at a time: afterwards the node is as it was. (150 on the built-in network.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import NOTHING, Plugins, cni_daemon, remove, sandbox
from tests.daemon.harness import Daemon, Node, running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
AT_ONCE = 10


@pytest.fixture(params=["built in", "native"])
def world(request: pytest.FixtureRequest, node: Node, tmp_path: Path) -> Iterator[tuple[Daemon, Plugins | None]]:
    if request.param == "built in":
        with running(node, subnets=("10.219.0.0/16", "fd00:219::/64")) as daemon:
            yield daemon, None
    else:
        with cni_daemon(node, tmp_path, native=True) as (daemon, plugins):
            plugins.install(plugins.bridge(), plugins.portmap(), {"type": "firewall", "backend": "iptables"})
            yield daemon, plugins


def left(daemon: Daemon, plugins: Plugins | None) -> dict[str, Any]:
    """What pods may have left, without what a node keeps for the next one."""
    rules = [line for line in daemon.node.run("nft", "list", "ruleset").stdout.splitlines() if "dport" in line or "10.2" in line]
    links = [line.split(": ")[1].split("@")[0] for line in daemon.node.run("ip", "-o", "link").stdout.splitlines()]
    pods = daemon.root / "network" / "pods"
    assert daemon.process is not None
    found: dict[str, Any] = {
        "links": sorted(links),
        "rules": len(rules),
        "records": sorted(os.listdir(pods)) if pods.exists() else [],
        "pins": sorted(os.listdir(daemon.state / "netns")),
        "pods": sorted(os.listdir(daemon.state / "pods")),
        "mounts": sum(str(daemon.state) in line for line in Path("/proc/mounts").read_text().splitlines()),
        "namespaces": _namespaces(daemon),
        "descriptors": {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in _processes(daemon)},
    }
    return found if plugins is None else {**found, **plugins.held(daemon)}


def _processes(daemon: Daemon) -> list[tuple[str, int]]:
    pids = daemon.pids()
    assert pids.daemon and pids.supervisor
    return [("daemon", pids.daemon), ("supervisor", pids.supervisor)]


def _namespaces(daemon: Daemon) -> int:
    """Network namespaces that the daemon or the supervisor keep open."""
    found = set()
    for _, pid in _processes(daemon):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if target.startswith("net:"):
                found.add(target)
    return len(found)


def test_nothing_is_left(world: tuple[Daemon, Plugins | None]) -> None:
    daemon, plugins = world

    def live(number: int) -> str:
        mapping = v1.PortMapping(host_port=10000 + number, container_port=80, protocol=v1.UDP if number % 2 else v1.TCP)
        pod, _ = daemon.run_pod(port_mappings=[mapping])
        network = sandbox(daemon, pod).network
        remove(daemon, pod)
        return str(network.ip)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(live, range(AT_ONCE)))  # threads, connections and what pods share are there from now on
        before = left(daemon, plugins)
        addresses = list(threads.map(live, range(150 if plugins is None else 500)))
    assert all(addresses)
    tolerance = 4  # descriptors that a connection or a helper has just opened

    def same() -> bool:
        after = left(daemon, plugins)
        descriptors = {name: after["descriptors"][name] - number for name, number in before["descriptors"].items()}
        return all(n <= tolerance for n in descriptors.values()) and {**after, "descriptors": 0} == {**before, "descriptors": 0}

    wait_for("the node to be as before", same, 20)
    if plugins is not None:
        assert {k: v for k, v in plugins.held(daemon).items() if k in NOTHING} == NOTHING
