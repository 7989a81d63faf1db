"""The built-in network as pods see it, over the daemon's socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, running, wait_for


@pytest.fixture(scope="module")
def daemon(node: Node) -> Iterator[Daemon]:
    """Dual stack."""
    with running(node, subnets=("10.217.0.0/24", "fd00:217::/64")) as daemon:
        yield daemon


def sandbox(daemon: Daemon, pod: str) -> v1.PodSandboxStatus:
    return daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=10).status


def output(daemon: Daemon, container: str, *command: str) -> str:
    reply = daemon.exec(container, *command)
    assert reply.exit_code == 0, reply.stderr
    return reply.stdout.decode()


def test_node_says_that_the_network_is_ready(daemon: Daemon) -> None:
    def ready() -> bool:
        conditions = daemon.runtime.Status(v1.StatusRequest(), timeout=10).status.conditions
        return {c.type: c.status for c in conditions}["NetworkReady"]

    wait_for("NetworkReady", ready)


def test_addresses_are_in_the_status_and_in_the_pod(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    network = sandbox(daemon, pod[0]).network
    ips = [network.ip, *(a.ip for a in network.additional_ips)]
    assert ips[0].startswith("10.217.0.") and ips[1].startswith("fd00:217::")
    shown = output(daemon, container, "ip", "addr", "show", "eth0")
    assert f"inet {ips[0]}/24" in shown and f"inet6 {ips[1]}/64" in shown
    assert "default via 10.217.0.1" in output(daemon, container, "ip", "route")
    assert "UP" in output(daemon, container, "ip", "link", "show", "lo")
    assert ips[0] in output(daemon, container, "cat", "/etc/hosts")


def test_router_advertisements_are_ignored(daemon: Daemon, busybox: str) -> None:
    """CVE-2020-10749: a pod that advertises itself must not become the others' IPv6 router, nor the node's."""
    container = daemon.run(daemon.run_pod(), busybox, "sleep", "1000")
    for link in ("all", "default", "eth0"):
        assert output(daemon, container, "cat", f"/proc/sys/net/ipv6/conf/{link}/accept_ra").strip() == "0", link
    assert daemon.node.run("cat", "/proc/sys/net/ipv6/conf/crishim0/accept_ra").stdout.strip() == "0"


def test_two_pods_talk_and_containers_of_one_share_loopback(daemon: Daemon, busybox: str) -> None:
    serving, other = daemon.run_pod(), daemon.run_pod()
    page = "mkdir -p /www && echo here > /www/index.html && exec httpd -f -p 80 -h /www"
    daemon.run(serving, busybox, "sh", "-c", page)
    beside = daemon.run(serving, busybox, "sleep", "1000")
    far = daemon.run(other, busybox, "sleep", "1000")
    address = sandbox(daemon, serving[0]).network.ip
    wait_for("the server", lambda: daemon.exec(beside, "wget", "-qO-", "http://127.0.0.1/").exit_code == 0)
    assert output(daemon, beside, "wget", "-qO-", "http://127.0.0.1/") == "here\n"
    assert output(daemon, far, "wget", "-qO-", f"http://{address}/") == "here\n"


def test_host_port(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8088, container_port=80)])
    daemon.run(pod, busybox, "sh", "-c", "mkdir /www && echo port > /www/index.html && exec httpd -f -p 80 -h /www")

    def fetched() -> str:
        shell = "exec 3<>/dev/tcp/192.0.2.1/8088 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"
        return daemon.node.run("bash", "-c", shell).stdout

    assert "port" in wait_for("the host port", lambda: _quiet(fetched))
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod[0]), timeout=30)
    assert _quiet(fetched) == ""


def _quiet(call: object) -> str:
    try:
        return call()  # type: ignore[operator, no-any-return]
    except Exception:
        return ""


def test_a_stopped_pod_gives_its_address_back(daemon: Daemon) -> None:
    before = set((daemon.root / "network" / "pods").iterdir())
    pod = daemon.run_pod()
    (record,) = set((daemon.root / "network" / "pods").iterdir()) - before
    assert record == Path(daemon.root / "network" / "pods" / f"{pod[0]}.json")
    for _ in range(2):
        daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod[0]), timeout=30)
    assert not record.exists()
    assert f"csv{pod[0][:12]}" not in daemon.node.run("ip", "link").stdout


def test_host_network_pods_are_in_the_nodes_namespace(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(host_network=True)
    container = daemon.run(pod, busybox, "sleep", "1000")
    assert "up0" in output(daemon, container, "ip", "link")
    assert sandbox(daemon, pod[0]).network.ip == ""


def test_pods_keep_their_network_over_a_restart(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    daemon.run(pod, busybox, "sh", "-c", "mkdir /www && echo still > /www/index.html && exec httpd -f -p 80 -h /www")
    address = sandbox(daemon, pod[0]).network.ip
    daemon.restart()
    assert sandbox(daemon, pod[0]).network.ip == address
    client_pod = daemon.run_pod()
    client = daemon.run(client_pod, busybox, "sleep", "1000")
    assert sandbox(daemon, client_pod[0]).network.ip != address
    assert output(daemon, client, "wget", "-qO-", f"http://{address}/") == "still\n"
