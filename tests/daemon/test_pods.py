"""Pod sandboxes over the socket: life, idempotence, namespaces, files."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]


def status(daemon: Daemon, pod: str, verbose: bool = False) -> v1.PodSandboxStatusResponse:
    return daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=verbose), timeout=10)


def stop(daemon: Daemon, pod: str) -> None:
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=30)


def remove(daemon: Daemon, pod: str) -> None:
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=30)


def listed(daemon: Daemon, **question: object) -> list[v1.PodSandbox]:
    request = v1.ListPodSandboxRequest(filter=v1.PodSandboxFilter(**question))  # type: ignore[arg-type]
    return list(daemon.runtime.ListPodSandbox(request, timeout=10).items)


def info(daemon: Daemon, pod: str) -> dict[str, object]:
    found = json.loads(status(daemon, pod, verbose=True).info["info"])
    assert isinstance(found, dict)
    return found


def test_life_of_a_pod(daemon: Daemon) -> None:
    pod, config = daemon.run_pod(labels={"app": "web"}, annotations={"note": "ü"})
    assert len(pod) == 64
    reply = status(daemon, pod)
    found = reply.status
    assert found.state == v1.SANDBOX_READY
    assert found.metadata == config.metadata
    assert (dict(found.labels), dict(found.annotations)) == ({"app": "web"}, {"note": "ü"})
    assert found.network.ip.startswith("10.213.")
    assert found.linux.namespaces.options == config.linux.security_context.namespace_options
    assert found.created_at > 10**18
    assert reply.timestamp >= found.created_at
    assert [p.id for p in listed(daemon, id=pod)] == [pod]
    assert [p.id for p in listed(daemon, id=pod[:13])] == [pod]
    stop(daemon, pod)
    found = status(daemon, pod).status
    assert (found.state, found.network.ip) == (v1.SANDBOX_NOTREADY, "")
    assert [p.state for p in listed(daemon, id=pod)] == [v1.SANDBOX_NOTREADY]
    remove(daemon, pod)
    assert listed(daemon, id=pod) == []
    with pytest.raises(grpc.RpcError) as failed:
        status(daemon, pod)
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_stop_and_remove_are_idempotent(daemon: Daemon) -> None:
    pod, _ = daemon.run_pod()
    for _ in range(2):
        stop(daemon, pod)
    for _ in range(2):
        remove(daemon, pod)
    for verb in (stop, remove):
        verb(daemon, pod)
        verb(daemon, "f" * 64)


def test_remove_stops_what_runs(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    pid = json.loads(daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container, verbose=True)).info["info"])["pid"]
    remove(daemon, pod[0])
    assert listed(daemon, id=pod[0]) == []
    assert not daemon.runtime.ListContainers(v1.ListContainersRequest(filter=v1.ContainerFilter(id=container))).containers
    assert not Path(f"/proc/{pid}").exists()


def test_nothing_is_left_of_a_removed_pod(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    remove(daemon, pod[0])
    left = [
        path
        for top in (daemon.root, daemon.state)
        for directory, directories, files in os.walk(top)
        for path in (os.path.join(directory, name) for name in (*directories, *files))
        if pod[0] in path or container in path
    ]
    assert left == []
    assert pod[0] not in Path("/proc/self/mountinfo").read_text()
    assert container not in Path(f"/proc/{daemon.pids().supervisor}/mountinfo").read_text()
    tops = [Path("/sys/fs/cgroup"), *(d for d in Path("/sys/fs/cgroup").iterdir() if d.is_dir())]
    assert not [t for t in tops if (t / pod[1].linux.cgroup_parent.strip("/") / container).exists()]


def test_a_repeated_run_gets_the_same_pod(daemon: Daemon) -> None:
    config = daemon.pod_config()
    first = daemon.run_pod(config)[0]
    assert daemon.run_pod(config)[0] == first
    other = v1.PodSandboxConfig()
    other.CopyFrom(config)
    other.labels["x"] = "y"
    with pytest.raises(grpc.RpcError) as failed:
        daemon.run_pod(other)
    assert failed.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert first in (failed.value.details() or "")
    config.metadata.attempt = 1
    assert daemon.run_pod(config)[0] != first


def test_fifty_identical_runs_make_one_pod(daemon: Daemon) -> None:
    config = daemon.pod_config()
    with ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(lambda _: daemon.run_pod(config)[0], range(50)))
    assert len(ids) == 1
    assert len([p for p in listed(daemon) if p.metadata == config.metadata]) == 1


def test_a_retry_after_a_cancel_gets_the_first_calls_pod(daemon: Daemon) -> None:
    """Scenario 16: whether the cancel comes before, during or after the work."""
    for delay in (0.0, 0.001, 0.003, 0.01, 0.05):
        config = daemon.pod_config()
        call = daemon.runtime.RunPodSandbox.future(v1.RunPodSandboxRequest(config=config))
        timer = threading.Timer(delay, call.cancel)
        timer.start()
        timer.join()
        pod = daemon.run_pod(config)[0]
        assert [p.id for p in listed(daemon) if p.metadata == config.metadata] == [pod]
        assert daemon.run_pod(config)[0] == pod


def test_a_failed_run_frees_name_and_everything(daemon: Daemon) -> None:
    config = daemon.pod_config(sysctls={"net.ipv4.no_such_setting": "1"})
    before = set(os.listdir(daemon.state / "pods"))
    with pytest.raises(grpc.RpcError) as failed:
        daemon.run_pod(config)
    assert "no_such_setting" in (failed.value.details() or "")
    assert set(os.listdir(daemon.state / "pods")) == before
    assert [p for p in listed(daemon) if p.metadata == config.metadata] == []
    del config.linux.sysctls["net.ipv4.no_such_setting"]
    daemon.run_pod(config)


def test_filters(daemon: Daemon) -> None:
    one, two = daemon.run_pod(labels={"t": "filters", "n": "1"})[0], daemon.run_pod(labels={"t": "filters", "n": "2"})[0]
    stop(daemon, two)
    ready = v1.PodSandboxStateValue(state=v1.SANDBOX_READY)
    assert {p.id for p in listed(daemon, label_selector={"t": "filters"})} == {one, two}
    assert [p.id for p in listed(daemon, label_selector={"t": "filters"}, state=ready)] == [one]
    assert [p.id for p in listed(daemon, label_selector={"t": "filters", "n": "2"})] == [two]
    assert listed(daemon, id=two, state=ready) == []


def test_bad_requests(daemon: Daemon) -> None:
    def refused(config: v1.PodSandboxConfig, handler: str = "") -> str:
        with pytest.raises(grpc.RpcError) as failed:
            daemon.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=config, runtime_handler=handler), timeout=10)
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        return failed.value.details() or ""

    assert "metadata.name" in refused(v1.PodSandboxConfig())
    assert "runtime_handler" in refused(daemon.pod_config(), "nope")
    assert "log_directory" in refused(daemon.pod_config(log_directory="/var/../etc"))
    assert "log_directory" in refused(daemon.pod_config(log_directory="relative"))
    assert "hostname" in refused(daemon.pod_config(hostname="a\nb"))


def test_the_network_namespace_is_pinned_where_status_says(daemon: Daemon) -> None:
    pod, _ = daemon.run_pod()
    found = info(daemon, pod)
    namespaces = {n["type"]: n["path"] for n in found["runtimeSpec"]["linux"]["namespaces"]}  # type: ignore[index]
    address = status(daemon, pod).status.network.ip
    shown = subprocess.run(["nsenter", f"--net={namespaces['network']}", "ip", "addr"], capture_output=True, text=True, check=True)
    assert f"inet {address}/" in shown.stdout
    assert "inet 127.0.0.1/8" in shown.stdout
    assert found["pid"] == 0
    stop(daemon, pod)
    assert not Path(namespaces["network"]).exists()


def test_a_shared_pid_namespace_has_a_first_process(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(shared_pid=True)
    pid = info(daemon, pod[0])["pid"]
    assert isinstance(pid, int)
    assert pid > 1
    one = daemon.run(pod, busybox, "sleep", "1001")
    two = daemon.run(pod, busybox, "sleep", "1002")
    shown = daemon.exec(one, "ps").stdout.decode()
    assert "sleep 1001" in shown
    assert "sleep 1002" in shown
    assert os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=two, timeout=0), timeout=20)
    assert daemon.container(one).state == v1.CONTAINER_RUNNING
    stop(daemon, pod[0])
    wait_for("the end of PID 1", lambda: not Path(f"/proc/{pid}").exists())


def test_containers_share_network_ipc_and_uts_but_not_pid(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    containers = [daemon.run(pod, busybox, "sleep", "1000") for _ in range(2)]
    inside = [
        dict(line.rsplit(" -> ", 1) for line in daemon.exec(c, "ls", "-l", "/proc/self/ns").stdout.decode().splitlines() if "->" in line)
        for c in containers
    ]
    shared = [{k.split()[-1]: v for k, v in one.items()} for one in inside]
    for kind in ("net", "ipc", "uts"):
        assert shared[0][kind] == shared[1][kind] != os.readlink(f"/proc/self/ns/{kind}")
    for kind in ("pid", "mnt"):
        assert shared[0][kind] != shared[1][kind]
    assert daemon.exec(containers[0], "cat", "/proc/1/comm").stdout == b"sleep\n"
    daemon.exec(containers[0], "sh", "-c", "echo shared > /dev/shm/x")
    assert daemon.exec(containers[1], "cat", "/dev/shm/x").stdout == b"shared\n"


def test_the_hosts_namespaces(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(host_network=True, host_pid=True, host_ipc=True)
    assert status(daemon, pod[0]).status.network.ip == ""
    container = daemon.run(pod, busybox, "sleep", "1000")
    shown = daemon.exec(container, "ls", "-l", "/proc/self/ns").stdout.decode()
    host = f"/proc/{daemon.pids().daemon}/ns"
    for kind in ("net", "ipc", "uts", "pid"):
        assert os.readlink(f"{host}/{kind}") in shown
    assert {n["type"] for n in info(daemon, pod[0])["runtimeSpec"]["linux"]["namespaces"]} == set()  # type: ignore[index]


def test_files_of_the_pod(daemon: Daemon, busybox: str) -> None:
    dns = v1.DNSConfig(servers=["192.0.2.53"], searches=["a.example", "b.example"], options=["ndots:5"])
    pod = daemon.run_pod(hostname="the-host", dns_config=dns, sysctls={"net.ipv4.ip_local_port_range": "20000 30000"})
    container = daemon.run(pod, busybox, "sleep", "1000")

    def read(path: str) -> str:
        return daemon.exec(container, "cat", path).stdout.decode()

    assert read("/etc/hostname") == "the-host\n"
    assert daemon.exec(container, "hostname").stdout == b"the-host\n"
    assert read("/etc/resolv.conf").splitlines() == ["search a.example b.example", "nameserver 192.0.2.53", "options ndots:5"]
    assert f"{status(daemon, pod[0]).status.network.ip}\tthe-host" in read("/etc/hosts")
    assert read("/proc/sys/net/ipv4/ip_local_port_range").split() == ["20000", "30000"]


def test_statuses_of_containers_come_with_the_pods(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    assert not status(daemon, pod[0]).containers_statuses
    container = daemon.create(pod, busybox, "sleep", "1000")
    [one] = status(daemon, pod[0]).containers_statuses
    assert (one.id, one.state) == (container, v1.CONTAINER_CREATED)
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
    [one] = status(daemon, pod[0]).containers_statuses
    assert one.state == v1.CONTAINER_RUNNING
    assert one == daemon.container(container)
    stop(daemon, pod[0])
    [one] = status(daemon, pod[0]).containers_statuses
    assert (one.state, one.exit_code) == (v1.CONTAINER_EXITED, 137)


def test_resources_of_a_resized_pod_are_recorded(daemon: Daemon) -> None:
    """The kubelet tells them after every in-place resize, and logs an error each time if the call is not known."""

    def update(pod: str, shares: int) -> None:
        resources = v1.LinuxContainerResources(cpu_shares=shares, memory_limit_in_bytes=1 << 26)
        daemon.runtime.UpdatePodSandboxResources(v1.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=resources), timeout=10)

    def linux() -> object:
        config = info(daemon, pod)["config"]
        assert isinstance(config, dict)
        return config["linux"]["resources"]

    pod, _ = daemon.run_pod(host_network=True)
    update(pod, 205)
    assert linux() == {"cpu_shares": "205", "memory_limit_in_bytes": str(1 << 26)}
    daemon.restart()
    assert linux() == {"cpu_shares": "205", "memory_limit_in_bytes": str(1 << 26)}
    stop(daemon, pod)
    for pod_id, code in ((pod, grpc.StatusCode.FAILED_PRECONDITION), ("nobody", grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.RpcError) as caught:
            update(pod_id, 1)
        assert caught.value.code() is code


def test_stopping_a_pod_ends_what_was_never_started(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    container = daemon.create(pod, busybox, "sleep", "1000")
    stop(daemon, pod[0])
    assert daemon.container(container).state == v1.CONTAINER_EXITED
    with pytest.raises(grpc.RpcError) as failed:
        daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_no_container_in_a_stopped_pod(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    stop(daemon, pod[0])
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "true")
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    remove(daemon, pod[0])
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "true")
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_creates_racing_a_stop_leave_nothing(daemon: Daemon, busybox: str) -> None:
    """Scenario 19, as far as a client can do it: each create either is in the pod or was refused, and the stop ends them all."""
    pod = daemon.run_pod()

    def create(number: int) -> str | grpc.StatusCode:
        try:
            return daemon.create(pod, busybox, "sleep", "1000", name=f"c{number}")
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(9) as pool:
        creations = [pool.submit(create, n) for n in range(8)]
        pool.submit(stop, daemon, pod[0]).result()
        results = [c.result() for c in creations]
    made = {r for r in results if isinstance(r, str)}
    assert {r for r in results if not isinstance(r, str)} <= {grpc.StatusCode.FAILED_PRECONDITION}
    found = daemon.runtime.ListContainers(v1.ListContainersRequest(filter=v1.ContainerFilter(pod_sandbox_id=pod[0]))).containers
    assert {c.id for c in found} == made
    assert {c.state for c in found} <= {v1.CONTAINER_EXITED}
    assert set(os.listdir(daemon.state / "containers")) >= made
    remove(daemon, pod[0])


def test_a_record_is_json_that_people_can_read(daemon: Daemon) -> None:
    pod, config = daemon.run_pod()
    document = json.loads((daemon.root / "pods" / f"{pod}.json").read_text())
    assert document["format"] == 1
    assert document["config"]["metadata"]["name"] == config.metadata.name
    assert document["facts"]["ips"] == [status(daemon, pod).status.network.ip]
    assert (daemon.root / "pods" / f"{pod}.json").stat().st_mode & 0o777 == 0o600
    for directory in (daemon.root, daemon.state, daemon.root / "pods", daemon.state / "pods"):
        assert directory.stat().st_mode & 0o777 == 0o700
