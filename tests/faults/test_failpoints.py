"""The daemon dies or fails at every stage of its verbs (scenarios 6-8, 23): nothing leaks, a retry works."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.builders import container_config
from tests.daemon.harness import Daemon, wait_for

RUN = ("state directory", "namespaces", "network", "record", "answer")
CREATE = ("mount sources", "root file system", "bundle", "process", "record", "answer")
STOP = ("containers", "network", "namespaces", "record")
REMOVE_POD = ("state directory", "record")
REMOVE = ("snapshot", "volumes", "bundle", "record")


class Leftovers:
    """What a daemon without pods has: compared before and after."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.before = self.now()

    def now(self) -> dict[str, object]:
        daemon = self._daemon
        listings = {
            str(top.relative_to(daemon.directory)): sorted(os.listdir(top))
            for top in (
                daemon.state / "pods",
                daemon.state / "containers",
                daemon.state / "netns",
                daemon.state / "userns",
                daemon.root / "pods",
                daemon.root / "containers",
                daemon.root / "volumes",
                daemon.root / "images" / "containers-rw",
            )
            if top.exists()
        }
        links = daemon.node.run("ip", "-o", "link").stdout
        return {**listings, "links": links.count(": veth") + links.count(": csv"), "mounts": _mounts(daemon)}

    def back(self) -> None:
        wait_for(f"{self.before} again", lambda: self.now() == self.before or self._print())

    def _print(self) -> bool:
        self.last = self.now()
        return False


def _mounts(daemon: Daemon) -> int:
    return sum(str(daemon.directory) in line for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.fixture
def armed(daemon: Daemon) -> Iterator[Daemon]:
    yield daemon
    daemon.env.pop("CRI_SHIM_FAILPOINTS", None)
    if daemon.process is None or daemon.process.poll() is not None:
        daemon.process = None
        daemon.start()
    else:
        daemon.restart()
    daemon.remove_pods()


def arm(daemon: Daemon, point: str, action: str) -> None:
    """Restart with a failpoint."""
    daemon.env["CRI_SHIM_FAILPOINTS"] = f"{point}={action}"
    daemon.restart()


def disarm(daemon: Daemon, action: str) -> None:
    """Restart without it; where it killed the daemon, once it is dead."""
    daemon.env.pop("CRI_SHIM_FAILPOINTS")
    if action == "exit":
        assert daemon.process is not None
        assert daemon.process.wait(10) == 86
        daemon.process = None
        daemon.disconnect()
        time.sleep(0.1)
        daemon.start()


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("host_network", [False, True])
def test_run_sandbox_with_a_user_namespace(armed: Daemon, host_network: bool, action: str) -> None:
    """Its pin and its PID 1 go, too."""
    left = Leftovers(armed)
    config = armed.pod_config(host_network=host_network, shared_pid=True)
    ids = [v1.IDMapping(host_id=200000, length=65536)]
    config.linux.security_context.namespace_options.userns_options.CopyFrom(v1.UserNamespace(uids=ids, gids=ids))
    status = armed.runtime.Status(v1.StatusRequest(), timeout=10)
    if not status.features.user_namespaces_host_network:
        pytest.skip("this kernel cannot idmap what a pod with a user namespace needs")
    arm(armed, "run sandbox/record", action)
    with pytest.raises(grpc.RpcError):
        armed.run_pod(config)
    disarm(armed, action)
    left.back()
    if action == "raise":
        armed.restart()
    armed.run_pod(config)
    armed.remove_pods()
    left.back()


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("stage", RUN)
def test_run_sandbox(armed: Daemon, stage: str, action: str) -> None:
    left = Leftovers(armed)
    config = armed.pod_config()
    arm(armed, f"run sandbox/{stage}", action)
    with pytest.raises(grpc.RpcError):
        armed.run_pod(config)
    disarm(armed, action)
    if stage != "answer":
        left.back()
    if action == "raise":
        armed.restart()
    pod = armed.run_pod(config)
    assert [p.id for p in armed.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items] == [pod[0]]
    armed.remove_pods()
    left.back()


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("stage", CREATE)
def test_create_container(armed: Daemon, busybox: str, stage: str, action: str) -> None:
    pod = armed.run_pod()
    left = Leftovers(armed)
    request = v1.CreateContainerRequest(
        pod_sandbox_id=pod[0], config=container_config(busybox, "sleep", "1000", name="c", pod=pod[1]), sandbox_config=pod[1]
    )
    arm(armed, f"create container/{stage}", action)
    with pytest.raises(grpc.RpcError):
        armed.runtime.CreateContainer(request, timeout=20)
    disarm(armed, action)
    if stage != "answer":
        left.back()
    if action == "raise":
        armed.restart()
    container = armed.runtime.CreateContainer(request, timeout=20).container_id
    armed.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=20)
    assert [c.id for c in armed.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers] == [container]
    armed.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=20)
    left.back()


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("point", [f"stop sandbox/{s}" for s in STOP] + [f"remove sandbox/{s}" for s in REMOVE_POD])
def test_end_of_a_sandbox(armed: Daemon, busybox: str, point: str, action: str) -> None:
    left = Leftovers(armed)
    pod = armed.run_pod()
    armed.run(pod, busybox, "sleep", "1000")
    arm(armed, point, action)
    with pytest.raises(grpc.RpcError):
        armed.remove_pods()
    disarm(armed, action)
    if action == "raise":
        armed.restart()
    armed.remove_pods()
    left.back()


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("stage", REMOVE)
def test_remove_container(armed: Daemon, busybox: str, stage: str, action: str) -> None:
    pod = armed.run_pod()
    left = Leftovers(armed)
    container = armed.run(pod, busybox, "sleep", "1000")
    arm(armed, f"remove container/{stage}", action)
    request = v1.RemoveContainerRequest(container_id=container)
    with pytest.raises(grpc.RpcError):
        armed.runtime.RemoveContainer(request, timeout=20)
    disarm(armed, action)
    if action == "raise":
        armed.restart()
    armed.runtime.RemoveContainer(request, timeout=20)
    left.back()
