"""What one pod's trouble does to the others, over a restart and over many pods (scenarios 5, 10, 49, 60)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hack.node import cgroup_directories
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for
from tests.faults.fuse import Hanging

MIB = 1 << 20


def remove(daemon: Daemon, container: str) -> None:
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=30)


def test_a_wedged_pod_delays_nobody(daemon: Daemon, busybox: str, tmp_path: Path) -> None:
    """Scenario 5: its process waits in the kernel for a file system that does not answer, and everything of ours is started anew."""
    with Hanging(tmp_path / "hanging") as fuse:
        mounts = (v1.Mount(container_path="/x", host_path=str(fuse.directory)),)
        wedged = daemon.run(daemon.run_pod(), busybox, "cat", "/x/file", mounts=mounts)
        fine = daemon.run(daemon.run_pod(), busybox, "sleep", "1000")
        assert fuse.waiting.wait(10)
        daemon.kill_everything()
        daemon.start(20)
        assert daemon.exec(fine, "echo", "fine").stdout == b"fine\n"
        assert daemon.container(wedged).state == v1.CONTAINER_RUNNING
        remove(daemon, fine)
        daemon.wait_exit(daemon.run(daemon.run_pod(), busybox, "true"))
        fuse.release()
        daemon.wait_exit(wedged)
    daemon.remove_pods()


def test_a_missing_bundle_costs_only_its_container(daemon: Daemon, busybox: str) -> None:
    """Scenario 10."""
    pod = daemon.run_pod()
    lost, fine = (daemon.run(pod, busybox, "sleep", "1000") for _ in range(2))
    group = Path(cgroup_directories(daemon.cgroup_parent)[0])
    [left] = [directory for directory in group.rglob(f"*{lost}*") if directory.is_dir()]
    assert (left / "cgroup.procs").read_text()
    daemon.kill_everything()
    shutil.rmtree(daemon.state / "containers" / lost)
    daemon.start()
    assert daemon.exec(fine, "echo", "fine").stdout == b"fine\n"
    remove(daemon, lost)
    assert not left.exists(), "its processes, of which nobody knew any more, have gone with it"
    assert lost not in [c.id for c in daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers]
    daemon.remove_pods()


def test_the_oom_kill_of_a_child_is_counted(daemon: Daemon, busybox: str) -> None:
    """Scenario 49: the first process goes on, and the node's log says what happened."""
    limit = v1.LinuxContainerResources(memory_limit_in_bytes=24 * MIB, memory_swap_limit_in_bytes=24 * MIB)
    container = daemon.run(daemon.run_pod(), busybox, "sh", "-c", "tail /dev/zero; echo survived; sleep 1000", resources=limit)
    wait_for("the kill", lambda: "survived" in daemon.log_text(container), 20)
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    daemon.remove_pods()  # at the latest: on cgroup v1 the counter moves after its event, and is read again at the end
    wait_for("the count", lambda: f"container {container}: the kernel killed a process of it" in daemon.log.read_text())


def test_churn_returns_to_the_baseline(daemon: Daemon, busybox: str) -> None:
    """Scenario 60, minutes of it in seconds: what pods leave behind does not depend on how many there were."""

    def held() -> dict[str, int]:
        pids = daemon.pids()
        fds = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in (("supervisor", pids.supervisor), ("stdio", pids.stdio))}
        mounts = sum(str(daemon.directory) in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
        groups = sum(1 for top in cgroup_directories(daemon.cgroup_parent) for _ in os.walk(top))
        namespaces = len(os.listdir(daemon.state / "netns"))
        files = sum(len(names) for _, _, names in os.walk(daemon.state))
        return {**fds, "mounts": mounts, "groups": groups, "namespaces": namespaces, "files": files}

    def churn(count: int) -> None:
        for number in range(count):
            pod = daemon.run_pod(shared_pid=number % 2 == 0)
            container = daemon.run(pod, busybox, "sh", "-c", "echo here; sleep 1000")
            daemon.exec(container, "true")
            daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod[0]), timeout=30)
            daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod[0]), timeout=30)

    churn(4)
    before = held()
    churn(16)
    # Pods' cgroups themselves are the kubelet's to remove: one for each, in each hierarchy.
    pods = 16 * len(cgroup_directories(daemon.cgroup_parent))

    def back() -> bool:
        now = held()
        return all(now[name] <= before[name] + (pods if name == "groups" else 2) for name in before)

    wait_for(f"{before} again", back)
