"""Pods on CNI networks by native plugins, over the daemon's socket: as with plugins that are executed, and without any being there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import DEBIAN, Plugins, cni_daemon, ips, network_condition, remove
from tests.daemon.harness import Daemon, Node, wait_for
from tests.daemon.test_cni import (  # noqa: F401 - the same expectations, with this module's daemon
    test_pods_reach_each_other_the_node_and_a_host_port,
    test_the_result_is_in_the_verbose_status_and_cached_as_libcni_does,
)
from tests.daemon.test_userns import run_pod

pytestmark = pytest.mark.skipif("not __import__('os').path.exists('/usr/lib/cni/bridge')", reason=f"no plugins in {DEBIAN}")


@pytest.fixture(scope="module")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Plugins]]:
    with cni_daemon(node, tmp_path_factory.mktemp("cni"), native=True) as world:
        yield world


@pytest.fixture(scope="module")
def daemon(world: tuple[Daemon, Plugins]) -> Daemon:
    return world[0]


@pytest.fixture
def plugins(world: tuple[Daemon, Plugins]) -> Iterator[Plugins]:
    """Bridge and portmap, dual stack; afterwards everything must be given back."""
    daemon, plugins = world
    plugins.behave()
    plugins.install()
    yield plugins
    plugins.behave()
    daemon.remove_pods()
    plugins.nothing_left(daemon)
    plugins.uninstall()


def test_native_as_a_whole_or_not_at_all(daemon: Daemon, plugins: Plugins) -> None:
    """An option that we do not know is not ignored: the network's plugins are executed, and the log says why."""
    bridge = plugins.bridge()
    for network, said in (
        ([bridge, plugins.portmap(), plugins.scripted()], "scripted is not native"),
        ([{**bridge, "portIsolation": True}, plugins.portmap()], "bridge: Object contains unknown field `portIsolation`"),
        ([{**bridge, "mtu": "1500"}], "bridge: Expected `int`"),
        ([bridge, {**plugins.portmap(), "backend": "nftables"}], "portmap: backend 'nftables' is not native"),
        ([{**bridge, "ipam": {"type": "static", "addresses": [{"address": "10.231.7.7/16"}]}}], "static is not native"),
    ):
        plugins.install(*network)
        network_condition(daemon)
        assert f"the plugins of network testnet are executed: {said}" in daemon.tail(10)
    plugins.install()
    assert len(ips(daemon, daemon.run_pod()[0])) == 2
    assert "the plugins of network testnet are native" in daemon.tail(10)


def test_a_pod_with_a_user_namespace(daemon: Daemon, plugins: Plugins, busybox: str) -> None:
    """Its network namespace belongs to other users: links, parameters and DEL work all the same."""
    if not daemon.runtime.Status(v1.StatusRequest(), timeout=10).runtime_handlers[0].features.user_namespaces:
        pytest.skip("this kernel cannot idmap what a pod with a user namespace needs")
    plugins.install(plugins.bridge(), plugins.portmap(), {"type": "tuning", "sysctl": {"net.core.somaxconn": "321"}, "mtu": 1290})
    pod = run_pod(daemon)
    container = daemon.run(pod, busybox, "sleep", "1000")
    shown = daemon.exec(
        container, "sh", "-c", "ip addr show eth0; cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv6/conf/eth0/accept_dad"
    )
    text = shown.stdout.decode()
    assert all(f"{ip}/" in text for ip in ips(daemon, pod[0])) and "mtu 1290" in text and text.endswith("321\n0\n")
    remove(daemon, pod[0])
    plugins.nothing_left(daemon)


def test_garbage_and_a_broken_network_are_found_at_a_start(daemon: Daemon, plugins: Plugins) -> None:
    """GC gives back addresses that belong to no pod; CHECK says what a pod has lost."""
    plugins.install(plugins.bridge(), plugins.portmap(), version="1.1.0")
    pod, _ = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8094, container_port=80)])
    stray = plugins.addresses / "testnet" / "10.231.77.77"
    stray.write_text(f"{'c' * 64}\r\neth0")
    daemon.restart()
    wait_for("GC", lambda: not stray.exists())
    assert plugins.held(daemon)["addresses"] == sorted(ips(daemon, pod))
    daemon.node.run("iptables", "-t", "nat", "-F", "CNI-HOSTPORT-DNAT")
    daemon.restart()
    wait_for("CHECK", lambda: "failed (check): a rule is missing" in daemon.tail(60) and f"network of pod {pod}" in daemon.tail(60))


def test_plugins_that_are_native_need_not_be_installed(node: Node, tmp_path_factory: pytest.TempPathFactory) -> None:
    with cni_daemon(node, tmp_path_factory.mktemp("cni"), native=True) as (daemon, plugins):
        daemon.kill()
        daemon.env["CRI_SHIM_NETWORK_CNI_BIN_DIRS"] = "/nonexistent"
        daemon.start()
        bridge = {**plugins.bridge(), "bridge": "cnitest2"}
        plugins.install(bridge, plugins.portmap(), version="1.1.0")
        assert network_condition(daemon).status
        pod, _ = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8098, container_port=80)])
        assert len(ips(daemon, pod)) == 2
        assert any("8098" in line for line in plugins.held(daemon)["rules"]) or plugins.held(daemon)["rules"]
        plugins.install({**bridge, "newer": 1}, plugins.portmap(), version="1.1.0")
        assert 'failed to find plugin "bridge" in path' in network_condition(daemon).message
        remove(daemon, pod)
        plugins.nothing_left(daemon)
