"""CVE-2020-10749: a pod advertises itself as the IPv6 router. CVE-2020-8558: a pod reaches what listens on the node's loopback only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import cni_daemon
from tests.daemon.harness import Daemon, Node, running, wait_for

#: A router advertisement (RFC 4861, 4.2) with a lifetime and a prefix to make an address of, sent to all nodes for a second.
_ADVERTISE = """
import socket, struct, time
sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
prefix = struct.pack(">BBBBIII16s", 3, 4, 64, 0xC0, 3600, 3600, 0, socket.inet_pton(socket.AF_INET6, "2001:db8:bad::"))
for _ in range(10):
    sock.sendto(struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix, ("ff02::1%eth0", 0))
    time.sleep(0.1)
"""


@pytest.fixture(scope="module", params=["built in", "native"])
def daemon(request: pytest.FixtureRequest, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if request.param == "built in":
        with running(node, subnets=("10.218.0.0/24", "fd00:218::/64")) as daemon:
            yield daemon
    else:
        with cni_daemon(node, tmp_path_factory.mktemp("cni"), native=True) as (daemon, plugins):
            plugins.install()
            yield daemon


def inside(daemon: Daemon, pod: str, *argv: str) -> str:
    """As root of the pod's network namespace, which a pod with CAP_NET_ADMIN is."""
    command = ["nsenter", f"--net={daemon.state}/netns/{pod}", "--", *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def test_a_pod_that_advertises_itself_is_nobodys_router(daemon: Daemon) -> None:
    attacker, victim, credulous = (daemon.run_pod()[0] for _ in range(3))
    inside(daemon, credulous, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=2")
    wait_for(
        "its link-local address", lambda: "fe80::" in inside(daemon, attacker, "ip", "-6", "addr", "show", "dev", "eth0", "-tentative")
    )
    before = inside(daemon, victim, "ip", "-6", "route")
    inside(daemon, attacker, sys.executable, "-c", _ADVERTISE)
    assert "proto ra" in inside(daemon, credulous, "ip", "-6", "route"), "the attack works on those who want it"
    for shown in (inside(daemon, victim, "ip", "-6", "route"), daemon.node.run("ip", "-6", "route").stdout):
        assert "proto ra" not in shown
    assert inside(daemon, victim, "ip", "-6", "route") == before
    for shown in (inside(daemon, victim, "ip", "-6", "addr"), daemon.node.run("ip", "-6", "addr").stdout):
        assert "2001:db8:bad:" not in shown
    daemon.remove_pods()


def test_the_nodes_loopback_is_out_of_reach(daemon: Daemon, request: pytest.FixtureRequest) -> None:
    if "built in" not in request.node.name:
        pytest.skip("portmap makes the node route its loopback, and the kubelet's own rule drops what comes from pods")
    pod, _ = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8096, container_port=80)])
    script = "import socket; s = socket.create_server(('127.0.0.1', 8095)); s.settimeout(8); s.accept(); print('reached')"
    server = subprocess.Popen(
        daemon.node.command(sys.executable, "-c", script), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        wait_for("the server", lambda: "8095" in daemon.node.run("ss", "-ltn").stdout)
        inside(daemon, pod, "sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1")
        inside(daemon, pod, "ip", "addr", "delete", "127.0.0.1/8", "dev", "lo")
        inside(daemon, pod, "ip", "route", "add", "127.0.0.1", "via", "10.218.0.1", "dev", "eth0")
        connect = "import socket; socket.create_connection(('127.0.0.1', 8095), 1)"
        with pytest.raises(subprocess.CalledProcessError):
            inside(daemon, pod, sys.executable, "-c", connect)
        assert server.poll() is None, "nobody has reached it"
    finally:
        server.kill()
        server.wait()
    daemon.remove_pods()
