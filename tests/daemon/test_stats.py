"""Stats and metrics over the socket."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from shim.cgroups import detect
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
MIB = 1 << 20
LIMITED = v1.LinuxContainerResources(
    cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=64 * MIB, memory_swap_limit_in_bytes=64 * MIB
)


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod(labels={"app": "stats"}, annotations={"note": "x"})


@pytest.fixture(scope="module")
def busy(daemon: Daemon, pod: Pod, busybox: str) -> str:
    """Uses a CPU up to its quota."""
    return daemon.run(
        pod, busybox, "sh", "-c", "while :; do :; done", name="busy", labels={"kind": "busy"}, annotations={"a": "b"}, resources=LIMITED
    )


@pytest.fixture(scope="module")
def idle(daemon: Daemon, pod: Pod, busybox: str) -> str:
    return daemon.run(pod, busybox, "sleep", "1000", name="idle", labels={"kind": "idle"})


def stats_of(daemon: Daemon, container: str) -> v1.ContainerStats:
    return daemon.runtime.ContainerStats(v1.ContainerStatsRequest(container_id=container), timeout=20).stats


def listed(daemon: Daemon, **conditions: object) -> list[str]:
    request = v1.ListContainerStatsRequest(filter=v1.ContainerStatsFilter(**conditions))
    return [each.attributes.id for each in daemon.runtime.ListContainerStats(request, timeout=20).stats]


def pod_stats_of(daemon: Daemon, pod: str) -> v1.PodSandboxStats:
    return daemon.runtime.PodSandboxStats(v1.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=20).stats


def test_what_a_container_uses(daemon: Daemon, busy: str) -> None:
    # The kernel adds up what a group has in batches, or after two seconds.
    wait_for("the first counters", lambda: stats_of(daemon, busy).memory.rss_bytes.value > 0)
    before = time.time_ns()
    stats = stats_of(daemon, busy)
    attributes = stats.attributes
    assert (attributes.id, attributes.metadata.name) == (busy, "busy")
    assert (dict(attributes.labels)["kind"], dict(attributes.annotations)["a"]) == ("busy", "b")
    for part in (stats.cpu, stats.memory):
        assert before <= part.timestamp <= time.time_ns()
    assert stats.cpu.usage_core_nano_seconds.value > 0
    memory = stats.memory
    assert 0 < memory.working_set_bytes.value <= memory.usage_bytes.value < 64 * MIB
    assert memory.available_bytes.value == 64 * MIB - memory.working_set_bytes.value
    assert memory.rss_bytes.value > 0
    assert memory.page_faults.value > 0


def test_the_rate_comes_with_the_second_sample(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "while :; do :; done", resources=LIMITED)
    first = stats_of(daemon, container)
    assert not first.cpu.HasField("usage_nano_cores")
    time.sleep(1.3)
    second = stats_of(daemon, container)
    used = second.cpu.usage_core_nano_seconds.value - first.cpu.usage_core_nano_seconds.value
    seconds = (second.cpu.timestamp - first.cpu.timestamp) / 1e9
    assert second.cpu.usage_nano_cores.value == pytest.approx(used / seconds, rel=0.05)
    assert 0 < second.cpu.usage_nano_cores.value < 700_000_000  # the quota is half a CPU
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container), timeout=20)


@pytest.mark.skipif(
    detect().version == 1 or not os.access("/proc/pressure/cpu", os.R_OK),
    reason="pressure is told of version 2 groups only, and where the kernel keeps it",
)
def test_pressure(daemon: Daemon, busy: str) -> None:
    """A quota makes tasks wait."""
    wait_for("time lost by the quota", lambda: stats_of(daemon, busy).cpu.psi.Some.Total > 0)
    stats = stats_of(daemon, busy)
    assert stats.memory.HasField("psi")
    assert stats.io.timestamp > 0
    found = daemon.runtime.ListPodSandboxMetrics(v1.ListPodSandboxMetricsRequest(), timeout=20).pod_metrics
    names = {metric.name for pod in found for container in pod.container_metrics for metric in container.metrics}
    assert {f"container_pressure_{what}_waiting_seconds_total" for what in ("cpu", "memory", "io")} <= names


def test_filters(daemon: Daemon, pod: Pod, busy: str, idle: str) -> None:
    other = daemon.run_pod()
    assert {busy, idle} <= set(listed(daemon))
    assert listed(daemon, id=busy) == listed(daemon, id=busy[:13]) == [busy]
    assert {busy, idle} <= set(listed(daemon, pod_sandbox_id=pod[0][:13]))
    assert listed(daemon, pod_sandbox_id=other[0]) == []
    assert listed(daemon, label_selector={"kind": "idle"}) == [idle]
    assert listed(daemon, id=busy, label_selector={"kind": "idle"}) == []
    assert listed(daemon, id="f" * 64) == []
    with pytest.raises(grpc.RpcError) as failed:
        stats_of(daemon, "f" * 64)
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_states_other_than_running(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """A created container has a cgroup; an ended one has a layer, and what it used is not made up."""
    created = daemon.create(pod, busybox, "true")
    assert stats_of(daemon, created).memory.usage_bytes.value > 0
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=created), timeout=20)
    daemon.wait_exit(created)
    stats = stats_of(daemon, created)
    assert not stats.HasField("cpu")
    assert not stats.HasField("memory")
    assert stats.writable_layer.inodes_used.value > 0
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=created), timeout=20)
    assert created not in listed(daemon)


def test_the_writable_layer(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "head -c 3000000 /dev/urandom > /file; sleep 1000")
    daemon.exec(container, "sh", "-c", "while [ $(wc -c < /file) -lt 3000000 ]; do sleep 0.05; done; sync")
    layer = stats_of(daemon, container).writable_layer
    info = daemon.images.ImageFsInfo(v1.ImageFsInfoRequest(), timeout=20)
    assert layer.fs_id.mountpoint == info.container_filesystems[0].fs_id.mountpoint
    assert 3_000_000 <= layer.used_bytes.value < 4_000_000
    assert layer.inodes_used.value >= 2
    assert 0 < layer.timestamp <= time.time_ns()


def test_an_unchanged_container_is_asked_often(daemon: Daemon, idle: str) -> None:
    """Kept files show new values, not those of the first read."""
    first = stats_of(daemon, idle)
    daemon.exec(idle, "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    second = stats_of(daemon, idle)
    assert second.cpu.usage_core_nano_seconds.value > first.cpu.usage_core_nano_seconds.value
    # the kernel adds these up in its own time
    wait_for("page faults", lambda: stats_of(daemon, idle).memory.page_faults.value > first.memory.page_faults.value)


def test_files_of_ended_containers_are_closed(daemon: Daemon, pod: Pod, busybox: str) -> None:
    def kept() -> int:
        process = daemon.process
        assert process is not None
        links = (os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd"))
        return sum(container in link for link in links)

    container = daemon.run(pod, busybox, "sleep", "1000")
    stats_of(daemon, container)
    assert kept() > 0
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container), timeout=20)
    daemon.wait_exit(container)
    stats_of(daemon, container)
    assert kept() == 0


def test_what_a_pod_uses(daemon: Daemon, pod: Pod, busy: str, idle: str) -> None:
    stats = pod_stats_of(daemon, pod[0])
    assert stats.attributes.id == pod[0]
    assert stats.attributes.metadata == pod[1].metadata
    assert (dict(stats.attributes.labels)["app"], dict(stats.attributes.annotations)["note"]) == ("stats", "x")
    linux = stats.linux
    members = {each.attributes.id: each for each in linux.containers}
    assert {busy, idle} <= set(members)
    assert linux.cpu.usage_core_nano_seconds.value >= members[busy].cpu.usage_core_nano_seconds.value > 0
    assert linux.memory.working_set_bytes.value > 0
    assert linux.process.process_count.value >= 2
    network = linux.network
    assert (network.default_interface.name, list(network.interfaces)) == ("eth0", [])
    assert network.timestamp > 0


def test_traffic_is_counted(daemon: Daemon, pod: Pod, idle: str) -> None:
    """With and without a process in the pod, which take different ways."""
    empty, _ = daemon.run_pod()
    address = daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=empty), timeout=20).status.network.ip

    def counters() -> list[int]:
        both = [pod_stats_of(daemon, each).linux.network.default_interface for each in (pod[0], empty)]
        return [count.value for one in both for count in (one.rx_bytes, one.tx_bytes)]

    before = counters()
    assert daemon.exec(idle, "ping", "-c", "3", "-i", "0.1", address).exit_code == 0
    assert all(b - a >= 3 * 84 for a, b in zip(before, counters(), strict=True))


def test_a_pod_of_the_host_network_has_no_interfaces(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(host_network=True)
    daemon.run(pod, busybox, "sleep", "1000")
    linux = pod_stats_of(daemon, pod[0]).linux
    assert not linux.HasField("network")
    assert linux.memory.usage_bytes.value > 0


def test_pods_that_share_a_cgroup_parent_are_told_apart(daemon: Daemon, busybox: str) -> None:
    """crictl and critest give all pods one parent, or none."""
    parent = f"{daemon.cgroup_parent}/shared"
    loud, quiet = (daemon.run_pod(daemon.pod_config(cgroup_parent=parent)) for _ in range(2))
    daemon.run(loud, busybox, "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; sleep 1000")
    time.sleep(0.5)
    assert not pod_stats_of(daemon, quiet[0]).linux.cpu.usage_core_nano_seconds.value
    assert pod_stats_of(daemon, loud[0]).linux.cpu.usage_core_nano_seconds.value > 0


def test_list_of_pods(daemon: Daemon, pod: Pod) -> None:
    def ids(**conditions: object) -> list[str]:
        request = v1.ListPodSandboxStatsRequest(filter=v1.PodSandboxStatsFilter(**conditions))
        return [each.attributes.id for each in daemon.runtime.ListPodSandboxStats(request, timeout=20).stats]

    assert ids(id=pod[0][:13]) == ids(label_selector={"app": "stats"}) == [pod[0]]
    assert ids(label_selector={"app": "other"}) == []
    stopped = daemon.run_pod()
    assert stopped[0] in ids()
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=stopped[0]), timeout=20)
    assert stopped[0] not in ids()
    assert not pod_stats_of(daemon, stopped[0]).linux.HasField("cpu")


def test_streams_give_what_lists_give(daemon: Daemon, busy: str, idle: str) -> None:
    runtime = daemon.runtime

    def flat(stream: Iterator[object], field: str) -> list[str]:
        pages = [getattr(page, field) for page in stream]
        assert all(pages)
        return [item.id if hasattr(item, "id") else item.attributes.id for page in pages for item in page]

    listed_pods = [pod.id for pod in runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=20).items]
    listed_containers = [c.id for c in runtime.ListContainers(v1.ListContainersRequest(), timeout=20).containers]
    assert flat(runtime.StreamPodSandboxes(v1.StreamPodSandboxesRequest(), timeout=20), "pod_sandboxes") == listed_pods
    assert flat(runtime.StreamContainers(v1.StreamContainersRequest(), timeout=20), "containers") == listed_containers
    assert flat(runtime.StreamContainerStats(v1.StreamContainerStatsRequest(), timeout=20), "container_stats") == listed(daemon)
    ready = v1.PodSandboxFilter(state=v1.PodSandboxStateValue(state=v1.SANDBOX_READY))
    assert flat(runtime.StreamPodSandboxStats(v1.StreamPodSandboxStatsRequest(), timeout=20), "pod_sandbox_stats") == flat(
        runtime.StreamPodSandboxes(v1.StreamPodSandboxesRequest(filter=ready), timeout=20), "pod_sandboxes"
    )
    only = v1.ContainerFilter(id=busy)
    assert flat(runtime.StreamContainers(v1.StreamContainersRequest(filter=only), timeout=20), "containers") == [busy]
    none = v1.ContainerStatsFilter(id="f" * 64)
    assert list(runtime.StreamContainerStats(v1.StreamContainerStatsRequest(filter=none), timeout=20)) == []
    metrics = [
        m for page in runtime.StreamPodSandboxMetrics(v1.StreamPodSandboxMetricsRequest(), timeout=20) for m in page.pod_sandbox_metrics
    ]
    assert {each.pod_sandbox_id for each in metrics} <= set(listed_pods)


def test_metrics_have_the_labels_of_their_descriptors(daemon: Daemon, pod: Pod, busy: str) -> None:
    described = daemon.runtime.ListMetricDescriptors(v1.ListMetricDescriptorsRequest(), timeout=20).descriptors
    keys = {each.name: list(each.label_keys) for each in described}
    assert len(keys) == len(described)
    assert all(each.help for each in described)
    found = daemon.runtime.ListPodSandboxMetrics(v1.ListPodSandboxMetricsRequest(), timeout=20).pod_metrics
    mine = next(each for each in found if each.pod_sandbox_id == pod[0])
    [container] = [each for each in mine.container_metrics if each.container_id == busy]
    values = {}
    for metric in [*mine.metrics, *container.metrics]:
        labels = dict(zip(keys[metric.name], metric.label_values, strict=True))
        assert (labels["pod"], labels["namespace"]) == (pod[1].metadata.name, "default")
        values[metric.name, labels["container"]] = metric.value.value
    assert values["container_network_receive_bytes_total", "POD"] > 0
    assert values["container_memory_working_set_bytes", "busy"] > 0
    assert values["container_memory_working_set_bytes", ""] >= values["container_memory_working_set_bytes", "busy"]
    assert values["container_spec_memory_limit_bytes", "busy"] == 64 * MIB
    assert (values["container_spec_cpu_quota", "busy"], values["container_spec_cpu_shares", "busy"]) == (50_000, 512)
    assert (values["container_processes", "busy"], values["container_threads", "busy"]) == (1, 1)
    assert values["container_file_descriptors", "busy"] >= 3
    assert values["container_cpu_cfs_periods_total", "busy"] > 0
    assert abs(values["container_last_seen", "busy"] - time.time()) < 20
    assert values["container_fs_limit_bytes", "busy"] > 0


def test_after_a_restart(daemon: Daemon, busy: str, pod: Pod) -> None:
    daemon.restart()
    assert stats_of(daemon, busy).memory.usage_bytes.value > 0
    assert pod_stats_of(daemon, pod[0]).linux.network.default_interface.name == "eth0"


def test_stats_do_not_wait_for_a_layer_with_many_files(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(
        pod, busybox, "sh", "-c", "mkdir /d; cd /d; i=0; while [ $i -lt 20000 ]; do : > $i; i=$((i+1)); done; echo done; sleep 1000"
    )
    wait_for("the files", lambda: "done" in daemon.log_text(container), 60)
    began = time.monotonic()
    stats_of(daemon, container)
    assert time.monotonic() - began < 1
    wait_for("the measurement", lambda: stats_of(daemon, container).writable_layer.inodes_used.value > 20_000, 15)
