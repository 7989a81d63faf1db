"""Stopping what does not want to stop, or cannot (scenarios 29-34): bounded, said by name, and nobody else waits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hack.node import cgroup_directories, cgroup_pids
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for
from tests.faults.fuse import Hanging

STUCK = r"[0-9]+ \(cat, state D in \w+\)"


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    with Hanging(tmp_path / "hanging") as fuse:
        yield fuse


def stop(daemon: Daemon, container: str, timeout: int = 0) -> float:
    began = time.monotonic()
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=timeout), timeout=40)
    return time.monotonic() - began


def remove(daemon: Daemon, container: str) -> None:
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=40)


def stop_pod(daemon: Daemon, pod: str) -> None:
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=40)


def attempt(call: Callable[..., object], *arguments: object) -> tuple[grpc.RpcError | None, float]:
    """The error, if any, and the seconds it took."""
    began = time.monotonic()
    try:
        call(*arguments)
    except grpc.RpcError as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


@pytest.mark.parametrize("where", ["first", "child", "shared"])
def test_a_process_in_state_d_is_named_and_not_waited_for(daemon: Daemon, busybox: str, hanging: Hanging, where: str) -> None:
    """Scenario 31: the container's first process, another one of its PID namespace, one of a shared PID namespace."""
    pod = daemon.run_pod(shared_pid=where == "shared")
    mounts = (v1.Mount(container_path="/x", host_path=str(hanging.directory)),)
    script = "exec cat /x/file" if where == "first" else "cat /x/file & wait"
    container = daemon.run(pod, busybox, "sh", "-c", script, mounts=mounts)
    assert hanging.waiting.wait(10)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(attempt, stop, daemon, container, 1)] if where != "shared" else []
        calls.append(pool.submit(attempt, stop_pod, daemon, pod[0]))
        other = daemon.run(daemon.run_pod(), busybox, "sleep", "1000")  # nobody else waits
        assert stop(daemon, other) < 3
        for error, took in [call.result(40) for call in calls]:
            assert error is not None and re.search(STUCK, error.details() or ""), error and error.details()
            assert took < 15
            if where != "shared":
                assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert container in (error.details() or "")
                assert daemon.container(container).state == v1.CONTAINER_RUNNING
    hanging.release()
    wait_for("its end", lambda: daemon.container(container).state == v1.CONTAINER_EXITED)
    assert stop(daemon, container) < 2
    remove(daemon, container)
    daemon.remove_pods()


@pytest.mark.parametrize("grace", [0, 1])
def test_a_frozen_container_is_thawed_to_die(daemon: Daemon, busybox: str, grace: int) -> None:
    """Scenario 32: somebody has frozen its cgroup."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", "sleep 1000 & sleep 1000")
    freeze(daemon, pod[1], container)
    assert stop(daemon, container, grace) < 4 + grace
    assert daemon.container(container).exit_code == 137
    container = daemon.run(pod, busybox, "sleep", "1000")
    freeze(daemon, pod[1], container)
    remove(daemon, container)
    container = daemon.run(pod, busybox, "sleep", "1000")
    freeze(daemon, pod[1], container)
    began = time.monotonic()
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod[0]), timeout=30)
    assert time.monotonic() - began < 5


def freeze(daemon: Daemon, config: v1.PodSandboxConfig, container: str) -> None:
    for directory in cgroup_directories(f"{config.linux.cgroup_parent}/{container}"):
        if (directory / "cgroup.freeze").exists():
            (directory / "cgroup.freeze").write_text("1")
            wait_for("the freezer", lambda d=directory: "frozen 1" in (d / "cgroup.events").read_text())
            return
        if (directory / "freezer.state").exists():
            (directory / "freezer.state").write_text("FROZEN")
            wait_for("the freezer", lambda d=directory: (d / "freezer.state").read_text().strip() == "FROZEN")
            return
    pytest.fail("no freezer")


def test_the_first_process_of_a_host_pid_container_is_gone(daemon: Daemon, busybox: str) -> None:
    """Scenario 33: nothing in the kernel kills the others then."""
    pod = daemon.run_pod(host_pid=True)
    container = daemon.run(pod, busybox, "sh", "-c", "setsid sleep 1000 & (setsid sleep 1000 &); exit 7")
    assert daemon.wait_exit(container).exit_code == 7
    where = f"{pod[1].linux.cgroup_parent}/{container}"
    wait_for("the end of what it started", lambda: not cgroup_pids(where))
    wait_for("the end of its cgroup", lambda: not cgroup_directories(where))
    assert stop(daemon, container, 10) < 2
    remove(daemon, container)
    daemon.remove_pods()


def test_many_processes_in_a_shared_pid_namespace(daemon: Daemon, busybox: str) -> None:
    """Scenario 34: all of one container's go with it, also while they fork, and none of another's."""
    pod = daemon.run_pod(shared_pid=True)
    other = daemon.run(pod, busybox, "sh", "-c", "for i in $(seq 50); do sleep 1000 & done; wait")
    many = "for i in $(seq 300); do sleep 1000 & done; echo ready; while :; do (setsid sleep 1000 &); sleep 0.01; done"
    container = daemon.run(pod, busybox, "sh", "-c", many)
    wait_for("300 processes", lambda: "ready" in daemon.log_text(container), 20)
    parent = pod[1].linux.cgroup_parent
    wait_for("50 processes", lambda: len(cgroup_pids(f"{parent}/{other}")) >= 51)
    before = len(cgroup_pids(f"{parent}/{other}"))
    assert stop(daemon, container) < 8
    wait_for("the end of its processes", lambda: not cgroup_pids(f"{parent}/{container}"))
    assert len(cgroup_pids(f"{parent}/{other}")) == before
    began = time.monotonic()
    daemon.remove_pods()
    assert time.monotonic() - began < 10
    assert not cgroup_pids(parent)


def test_a_slow_unmount_delays_nobody_else(daemon: Daemon, busybox: str, tmp_path: Path) -> None:
    """Scenario 29: the container has the last mount of a file system that takes seconds to be unmounted, which its end waits for."""
    with Hanging(tmp_path / "slow", slow_end=3.0) as fuse:
        pod = daemon.run_pod()
        container = daemon.run(
            pod, busybox, "sleep", "1000", mounts=(v1.Mount(container_path="/x", host_path=str(fuse.directory)),)
        )  # fmt: skip
        fuse.unmount()
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(stop, daemon, container)
            time.sleep(0.3)
            began = time.monotonic()
            other = daemon.run(daemon.run_pod(), busybox, "true")
            daemon.wait_exit(other)
            assert daemon.runtime.Status(v1.StatusRequest(), timeout=5).status.conditions
            assert time.monotonic() - began < 2
            took = stopping.result(20)
        assert 2 < took < 9
        assert daemon.container(container).exit_code == 137
        daemon.remove_pods()
