"""Native plugins in a daemon that dies between any two of their steps (scenario 59, dual stack), and namespaces that are gone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import DEBIAN, NOTHING, Plugins, cni_daemon, ips, remove, sandbox, stop
from tests.daemon.harness import Daemon, Node, wait_for
from tests.faults.test_cni import die, rise

pytestmark = pytest.mark.skipif("not __import__('os').path.exists('/usr/lib/cni/bridge')", reason=f"no plugins in {DEBIAN}")

ADD = ("address", "veth", "configure", "bandwidth", "rules", "result")
DELETE = ("bandwidth", "bridge", "veth", "address", "record")
BANDWIDTH = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "10M"}


@pytest.fixture(scope="module")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Plugins]]:
    with cni_daemon(node, tmp_path_factory.mktemp("cni"), native=True) as world:
        yield world


@pytest.fixture(scope="module")
def daemon(world: tuple[Daemon, Plugins]) -> Daemon:
    return world[0]


@pytest.fixture
def plugins(world: tuple[Daemon, Plugins]) -> Iterator[Plugins]:
    """Bridge, portmap and bandwidth; afterwards everything must be given back."""
    daemon, plugins = world
    plugins.install(plugins.bridge(), plugins.portmap(), {"type": "bandwidth", "capabilities": {"bandwidth": True}})
    yield plugins
    daemon.remove_pods()
    plugins.nothing_left(daemon)
    plugins.uninstall()


def config(daemon: Daemon) -> v1.PodSandboxConfig:
    return daemon.pod_config(port_mappings=[v1.PortMapping(host_port=8081, container_port=80)], annotations=BANDWIDTH)


def test_killed_while_a_pod_is_added(daemon: Daemon, plugins: Plugins) -> None:
    asked = config(daemon)
    for stage in ADD:  # each start recovers from the death before and dies of the next
        die(daemon, plugins, f"add network/{stage}")
        plugins.nothing_left(daemon)
        with pytest.raises(grpc.RpcError):
            daemon.run_pod(asked)
        assert daemon.process is not None and daemon.process.wait(10) == 86
    rise(daemon)
    plugins.nothing_left(daemon)
    assert len(ips(daemon, daemon.run_pod(asked)[0])) == 2


@pytest.mark.parametrize("stage", DELETE)
def test_killed_while_a_pod_is_deleted(daemon: Daemon, plugins: Plugins, stage: str) -> None:
    pod, _ = daemon.run_pod(config(daemon))
    die(daemon, plugins, f"delete network/{stage}")
    with pytest.raises(grpc.RpcError):
        stop(daemon, pod)
    rise(daemon)
    plugins.nothing_left(daemon)
    remove(daemon, pod)


def test_a_namespace_that_is_gone(daemon: Daemon, plugins: Plugins) -> None:
    """Everything goes, also the masquerading that Debian's bridge leaves then."""
    pod, _ = daemon.run_pod(config(daemon))
    assert plugins.held(daemon)["rules"]
    daemon.node.run("umount", "-l", str(daemon.state / "netns" / pod))
    stop(daemon, pod)
    held = plugins.held(daemon)
    assert {**held, "pins": []} == NOTHING
    remove(daemon, pod)


def test_after_a_reboot(daemon: Daemon, plugins: Plugins) -> None:
    pod, _ = daemon.run_pod(config(daemon))
    daemon.kill_everything()
    record = daemon.root / "pods" / pod
    files = (
        [record] if record.is_file() else sorted(record.rglob("*.json")) if record.exists() else sorted(daemon.root.glob(f"pods/{pod}*"))
    )
    for file in files:
        document = json.loads(file.read_text())
        (document.get("facts") or document)["boot_id"] = "another"
        file.write_text(json.dumps(document))
    daemon.node.run("umount", "-l", str(daemon.state / "netns" / pod))
    daemon.start()
    wait_for("the release", lambda: not plugins.held(daemon)["results"])
    assert sandbox(daemon, pod).state == v1.SANDBOX_NOTREADY
    remove(daemon, pod)


def test_each_side_deletes_what_the_other_added(daemon: Daemon, plugins: Plugins) -> None:
    """The setting is changed while pods run."""
    key = "CRI_SHIM_NETWORK_CNI_NATIVE_PLUGINS"
    try:
        native, _ = daemon.run_pod(config(daemon))
        daemon.env[key] = ""
        daemon.restart()
        remove(daemon, native)
        assert plugins.held(daemon) == NOTHING
        executed, _ = daemon.run_pod(config(daemon))
    finally:
        daemon.env.pop(key, None)
        daemon.restart()
    remove(daemon, executed)
    assert plugins.held(daemon) == NOTHING
