"""Plugins that hang, fail and lie, and a daemon that dies between them (scenarios 27, 28, 59): nothing leaks, nobody else waits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import DEBIAN, NOTHING, Plugins, cni_daemon, ips, network_condition, remove, stop
from tests.daemon.harness import Daemon, Node, wait_for

pytestmark = pytest.mark.skipif("not __import__('os').path.exists('/usr/lib/cni/bridge')", reason=f"no plugins in {DEBIAN}")

ADD = ("intent", "bridge", "portmap", "result")
DELETE = ("portmap", "bridge", "record")


@pytest.fixture(scope="module")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Plugins]]:
    with cni_daemon(node, tmp_path_factory.mktemp("cni"), timeout="2s") as world:
        yield world


@pytest.fixture(scope="module")
def daemon(world: tuple[Daemon, Plugins]) -> Daemon:
    return world[0]


@pytest.fixture
def plugins(world: tuple[Daemon, Plugins]) -> Iterator[Plugins]:
    """Bridge, portmap and the scripted plugin; afterwards everything must be given back."""
    daemon, plugins = world
    plugins.behave()
    plugins.install(plugins.bridge(), plugins.portmap(), plugins.scripted())
    yield plugins
    plugins.behave()
    daemon.remove_pods()
    plugins.nothing_left(daemon)
    plugins.uninstall()


def processes(pod: str = "") -> list[int]:
    """Plugin processes, of one pod or of any of these tests."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        if b"CNI_COMMAND=" in environment and f"K8S_POD_UID=uid-pod-{os.getpid()}-".encode() in environment and pod.encode() in environment:
            found.append(int(name))
    return found


def test_an_add_that_hangs(daemon: Daemon, plugins: Plugins) -> None:
    """Scenario 27: ended in its time together with what it has started, undone; others are not kept waiting."""
    ready, _ = daemon.run_pod()
    plugins.order("ADD", "hang()")
    began = time.monotonic()
    call = daemon.runtime.RunPodSandbox.future(v1.RunPodSandboxRequest(config=daemon.pod_config()), timeout=30)
    wait_for("the plugin", processes)
    assert network_condition(daemon).status
    remove(daemon, ready)
    assert not call.done(), "another pod went meanwhile"
    assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 'plugin type="scripted" failed (add): killed, it had not ended after 2 s' in call.exception().details()
    assert time.monotonic() - began < 15
    assert not processes()
    assert plugins.held(daemon) == NOTHING
    plugins.behave()
    assert len(ips(daemon, daemon.run_pod()[0])) == 2


@pytest.mark.parametrize(
    "script, said",
    [
        ('refuse(7, "bad network", "too small")', r'plugin type="scripted" failed \(add\): bad network; too small \(code 7\)'),
        ('print("oops"); sys.stderr.write("why\\n"); sys.exit(3)', "exit status 3 without an error message; stderr: why; stdout: oops"),
        ('print("garbage"); sys.exit(0)', "its result is not JSON"),
        ("sys.exit(0)", "its result is not JSON"),
        ('print("[" * 100000); sys.exit(0)', "its result is not JSON: nested too deeply"),
        ('print(json.dumps({"cniVersion": "1.0.0", "ips": []})); sys.exit(0)', "gave interface eth0 no address"),
        ('print(json.dumps({"ips": [{"address": "10.0.0.1/24", "interface": 7}]})); sys.exit(0)', "no such interface"),
        ('print("x" * (2 << 20)); sys.exit(0)', "printed more than"),
        ("os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("sys.stdin.close(); os._exit(1)", "exit status 1 without an error message"),
    ],
)
def test_an_add_that_fails_is_undone_and_explained(daemon: Daemon, plugins: Plugins, script: str, said: str) -> None:
    plugins.order("ADD", script)
    with pytest.raises(grpc.RpcError, match=said):
        daemon.run_pod()
    assert len(plugins.calls("DEL")) == 1, "a DEL follows an ADD that failed"
    assert plugins.held(daemon) == NOTHING


def test_output_held_open_by_what_a_plugin_left_behind(daemon: Daemon, plugins: Plugins) -> None:
    plugins.order("ADD", "if os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)")
    began = time.monotonic()
    daemon.run_pod()
    assert time.monotonic() - began < 10
    for pid in processes():
        os.kill(pid, 9)


def test_a_del_that_fails_then_works(daemon: Daemon, plugins: Plugins) -> None:
    """Scenario 28, as the kubelet sees it: it repeats the call."""
    pod, _ = daemon.run_pod()
    plugins.order("DEL", 'refuse(11, "not now")')
    for _ in range(2):
        with pytest.raises(
            grpc.RpcError, match=r'plugin type="scripted" failed \(delete\): not now \(code 11\) \(hint: to give it up, remove '
        ):
            stop(daemon, pod)
    assert plugins.held(daemon)["addresses"], "still its own"
    plugins.behave()
    stop(daemon, pod)
    remove(daemon, pod)
    assert plugins.held(daemon) == NOTHING


def test_a_del_that_hangs_then_works(daemon: Daemon, plugins: Plugins) -> None:
    pod, _ = daemon.run_pod()
    plugins.order("DEL", "hang()")
    with pytest.raises(grpc.RpcError) as late:
        stop(daemon, pod)
    assert "failed (delete): killed" in late.value.details()
    plugins.behave()
    stop(daemon, pod)
    assert not processes(pod)


def test_a_del_that_nobody_asks_for_again(daemon: Daemon, plugins: Plugins) -> None:
    """After a creation that failed no kubelet asks: the daemon tries again by itself."""
    plugins.order("ADD", 'refuse(100, "no")')
    plugins.order("DEL", 'refuse(11, "not now")')
    with pytest.raises(grpc.RpcError, match="no"):
        daemon.run_pod()
    assert plugins.held(daemon)["results"]
    plugins.behave()
    wait_for("the next attempt", lambda: plugins.held(daemon) == NOTHING, 15)


def test_a_container_that_is_unknown_needs_no_del(daemon: Daemon, plugins: Plugins) -> None:
    pod, _ = daemon.run_pod()
    plugins.order("DEL", 'refuse(3, "unknown container")')
    stop(daemon, pod)


def test_a_record_removed_by_hand_gives_up(daemon: Daemon, plugins: Plugins) -> None:
    plugins.install({**plugins.bridge(), "ipMasq": False}, plugins.scripted())  # Debian's bridge needs the namespace for its rules
    pod, _ = daemon.run_pod()
    plugins.order("DEL", 'refuse(100, "never")')
    with pytest.raises(grpc.RpcError, match="never"):
        stop(daemon, pod)
    plugins.behave()
    results = daemon.root / "network" / "cni" / "results"
    (results / f"testnet-{pod}-eth0").rename(results / f"kept-{pod}-eth0")
    stop(daemon, pod)
    (results / f"kept-{pod}-eth0").rename(results / f"testnet-{pod}-eth0")
    remove(daemon, pod)
    daemon.restart()  # and a start finds it
    plugins.nothing_left(daemon)


def test_a_torn_record(daemon: Daemon, plugins: Plugins) -> None:
    """A power cut: the name is enough, with the configuration of now."""
    pod, _ = daemon.run_pod()
    (daemon.root / "network" / "cni" / "results" / f"testnet-{pod}-eth0").write_text('{"kind"')
    remove(daemon, pod)
    assert plugins.held(daemon) == NOTHING


# -- the daemon dies (scenario 59)


def die(daemon: Daemon, plugins: Plugins, point: str) -> None:
    """Restart with a failpoint that kills the daemon."""
    daemon.env["CRI_SHIM_FAILPOINTS"] = f"{point}=exit"
    daemon.restart()


def rise(daemon: Daemon) -> None:
    daemon.env.pop("CRI_SHIM_FAILPOINTS")
    assert daemon.process is not None
    assert daemon.process.wait(10) == 86
    daemon.process = None
    daemon.disconnect()
    daemon.start()


@pytest.mark.parametrize("stage", ADD)
def test_killed_while_a_pod_is_added(daemon: Daemon, plugins: Plugins, stage: str) -> None:
    config = daemon.pod_config(port_mappings=[v1.PortMapping(host_port=8081, container_port=80)])
    die(daemon, plugins, f"add network/{stage}")
    with pytest.raises(grpc.RpcError):
        daemon.run_pod(config)
    rise(daemon)
    plugins.nothing_left(daemon)
    assert len(ips(daemon, daemon.run_pod(config)[0])) == 2


@pytest.mark.parametrize("stage", DELETE)
def test_killed_while_a_pod_is_deleted(daemon: Daemon, plugins: Plugins, stage: str) -> None:
    pod, _ = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8081, container_port=80)])
    die(daemon, plugins, f"delete network/{stage}")
    with pytest.raises(grpc.RpcError):
        stop(daemon, pod)
    rise(daemon)
    plugins.nothing_left(daemon)
    remove(daemon, pod)


def test_a_plugin_that_outlives_the_daemon_adds_nothing_behind_its_back(daemon: Daemon, plugins: Plugins) -> None:
    plugins.order("ADD", "hang()")
    call = daemon.runtime.RunPodSandbox.future(v1.RunPodSandboxRequest(config=daemon.pod_config()), timeout=30)
    wait_for("the plugin", processes)
    daemon.kill()
    assert call.exception() is not None
    assert processes(), "it does not die with the daemon"
    plugins.behave()
    daemon.start()
    plugins.nothing_left(daemon)
    assert not processes()
    assert plugins.calls("DEL")


# -- GC and STATUS


def test_garbage_is_collected_at_a_start(daemon: Daemon, plugins: Plugins) -> None:
    plugins.install(plugins.scripted(), version="1.1.0")
    wait_for("NetworkReady", lambda: network_condition(daemon).status)
    pod, _ = daemon.run_pod()
    daemon.restart()
    call = wait_for("GC", lambda: plugins.calls("GC"))[0]
    assert call["configuration"]["cni.dev/valid-attachments"] == [{"containerID": pod, "ifname": "eth0"}]
    assert "CNI_CONTAINERID" not in call["environment"] and "prevResult" not in call["configuration"]
    check = wait_for("CHECK", lambda: plugins.calls("CHECK"))[0]
    assert check["configuration"]["prevResult"]["ips"] and check["environment"]["CNI_CONTAINERID"] == pod
    plugins.behave()
    plugins.install(plugins.scripted(), version="1.1.0", disableGC=True, disableCheck=True)
    other, _ = daemon.run_pod()
    daemon.restart()
    time.sleep(1)
    assert not plugins.calls("GC") and {c["environment"]["CNI_CONTAINERID"] for c in plugins.calls("CHECK")} == {pod}
    assert other


def test_status_is_shown(daemon: Daemon, plugins: Plugins) -> None:
    plugins.order("STATUS", 'refuse(50, "agent is not running")')
    plugins.install(plugins.scripted(), version="1.1.0")

    def said() -> str:
        condition = network_condition(daemon)
        return "" if condition.status else condition.message

    wait_for("what STATUS says", lambda: "agent is not running (code 50)" in said())
    assert network_condition(daemon).reason == "NetworkPluginNotReady"
    plugins.behave()
    wait_for("NetworkReady", lambda: network_condition(daemon).status)
    plugins.order("STATUS", "hang()")
    wait_for("a STATUS that hangs", lambda: "killed, it had not ended" in said(), 15)
    assert json.dumps(plugins.calls("STATUS")[0]["configuration"]["cniVersion"]) == '"1.1.0"'
