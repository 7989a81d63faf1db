"""Containers over the socket: life, idempotence, configuration, stopping."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
REFUSED = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def start(daemon: Daemon, container: str) -> None:
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=20)


def stop(daemon: Daemon, container: str, timeout: int = 0) -> None:
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=timeout), timeout=timeout + 30)


def remove(daemon: Daemon, container: str) -> None:
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=30)


def listed(daemon: Daemon, **question: Any) -> list[v1.Container]:
    request = v1.ListContainersRequest(filter=v1.ContainerFilter(**question))
    return list(daemon.runtime.ListContainers(request, timeout=10).containers)


def info(daemon: Daemon, container: str) -> dict[str, Any]:
    reply = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container, verbose=True), timeout=10)
    found = json.loads(reply.info["info"])
    assert isinstance(found, dict)
    return found


def output(daemon: Daemon, pod: Pod, busybox: str, *command: str, **fields: Any) -> tuple[int, str]:
    """Run to the end; exit code and what the log has, without times and tags."""
    container = daemon.run(pod, busybox, *command, **fields)
    code = daemon.wait_exit(container).exit_code
    text = "".join(line.split(" ", 3)[3] + "\n" for line in daemon.log_text(container).splitlines())
    remove(daemon, container)
    return code, text


def code_of(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    return error.value.code()


def test_life_of_a_container(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.create(pod, busybox, "sh", "-c", "echo out; echo err >&2; exit 3", labels={"a": "b"}, annotations={"c": "d"})
    assert len(container) == 64
    created = daemon.container(container)
    assert (created.state, created.started_at, created.finished_at) == (v1.CONTAINER_CREATED, 0, 0)
    assert (dict(created.labels), dict(created.annotations)) == ({"a": "b"}, {"c": "d"})
    assert created.image_id.startswith("sha256:")
    assert "busybox" in created.image.image
    start(daemon, container)
    ended = daemon.wait_exit(container)
    assert (ended.exit_code, ended.reason) == (3, "Error")
    assert ended.created_at <= ended.started_at <= ended.finished_at <= time.time_ns()
    log = daemon.log_text(container)
    assert " stdout F out\n" in log
    assert " stderr F err\n" in log
    remove(daemon, container)
    with pytest.raises(grpc.RpcError) as failed:
        daemon.container(container)
    assert code_of(failed) == grpc.StatusCode.NOT_FOUND
    assert Path(ended.log_path).exists(), "the kubelet removes logs, not the runtime"


def test_success_is_completed(daemon: Daemon, pod: Pod, busybox: str) -> None:
    ended = daemon.wait_exit(daemon.run(pod, busybox, "true"))
    assert (ended.exit_code, ended.reason) == (0, "Completed")


def test_a_program_that_does_not_exist(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.create(pod, busybox, "/no/such/program")
    with pytest.raises(grpc.RpcError) as failed:
        start(daemon, container)
    assert "/no/such/program" in (failed.value.details() or "")
    ended = daemon.wait_exit(container)
    assert (ended.exit_code, ended.reason) == (128, "StartError")
    assert "/no/such/program" in ended.message
    remove(daemon, container)


def test_unknown_ids(daemon: Daemon) -> None:
    unknown = "e" * 64
    stop(daemon, unknown)
    remove(daemon, unknown)
    for call in (start, info):
        with pytest.raises(grpc.RpcError) as failed:
            call(daemon, unknown)
        assert code_of(failed) == grpc.StatusCode.NOT_FOUND


def test_stop_and_remove_are_idempotent(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    for _ in range(2):
        stop(daemon, container)
    assert daemon.container(container).exit_code == 137
    for _ in range(2):
        remove(daemon, container)


def test_remove_kills_what_runs(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    pid = info(daemon, container)["pid"]
    remove(daemon, container)
    assert not Path(f"/proc/{pid}").exists()
    assert listed(daemon, id=container) == []


def test_only_a_created_container_starts(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    with pytest.raises(grpc.RpcError) as failed:
        start(daemon, container)
    assert code_of(failed) == REFUSED
    stop(daemon, container)
    with pytest.raises(grpc.RpcError) as failed:
        start(daemon, container)
    assert code_of(failed) == REFUSED


def test_fifty_identical_creates_make_one_container(daemon: Daemon, pod: Pod, busybox: str) -> None:
    with ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(lambda _: daemon.create(pod, busybox, "true", name="fifty"), range(50)))
    assert len(ids) == 1
    assert [c.id for c in listed(daemon) if c.metadata.name == "fifty"] == list(ids)
    remove(daemon, ids.pop())


def test_a_name_that_is_taken(daemon: Daemon, pod: Pod, busybox: str) -> None:
    first = daemon.create(pod, busybox, "sleep", "1000", name="taken")
    assert daemon.create(pod, busybox, "sleep", "1000", name="taken") == first
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "sleep", "2000", name="taken")
    assert code_of(failed) == grpc.StatusCode.ALREADY_EXISTS
    start(daemon, first)
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "sleep", "1000", name="taken")
    assert code_of(failed) == grpc.StatusCode.ALREADY_EXISTS
    remove(daemon, first)
    remove(daemon, daemon.create(pod, busybox, "sleep", "1000", name="taken"))


def test_a_failed_create_frees_name_and_everything(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 23."""
    before = {top: set(os.listdir(top)) for top in (daemon.state / "containers", daemon.root / "containers", daemon.root / "volumes")}
    for fields in (
        {"image": "no/such/image"},
        {"image": busybox, "working_dir": "relative"},
        {"image": busybox, "mounts": (v1.Mount(container_path="/x", host_path="/dev/null/below"),)},
        {"image": busybox, "mounts": (v1.Mount(container_path="/proc", host_path="/tmp"),)},
        {"image": busybox, "log_path": "../escape"},
    ):
        with pytest.raises(grpc.RpcError):
            daemon.create(pod, str(fields.pop("image")), "true", name="free", **fields)
        assert {top: set(os.listdir(top)) for top in before} == before
    container = daemon.create(pod, busybox, "true", name="free")
    remove(daemon, container)
    assert {top: set(os.listdir(top)) for top in before} == before


def test_filters(daemon: Daemon, pod: Pod, busybox: str) -> None:
    other = daemon.run_pod()
    one = daemon.create(pod, busybox, "true", labels={"t": "filters", "n": "1"})
    two = daemon.run(pod, busybox, "sleep", "1000", labels={"t": "filters", "n": "2"})
    three = daemon.run(other, busybox, "true", labels={"t": "filters"})
    daemon.wait_exit(three)
    selector = {"t": "filters"}

    def found(**question: Any) -> set[str]:
        return {c.id for c in listed(daemon, **question)}

    def state(value: v1.ContainerState) -> v1.ContainerStateValue:
        return v1.ContainerStateValue(state=value)

    assert found(label_selector=selector) == {one, two, three}
    assert found(label_selector={"t": "filters", "n": "2"}) == {two}
    assert found(label_selector=selector, pod_sandbox_id=pod[0]) == {one, two}
    assert found(label_selector=selector, pod_sandbox_id=pod[0][:20]) == {one, two}
    assert found(label_selector=selector, state=state(v1.CONTAINER_CREATED)) == {one}
    assert found(label_selector=selector, state=state(v1.CONTAINER_RUNNING)) == {two}
    assert found(label_selector=selector, state=state(v1.CONTAINER_EXITED)) == {three}
    assert found(id=one[:13]) == {one}
    assert found(id=one, pod_sandbox_id=other[0]) == set()
    assert found(id="0" * 63) == set()


# -- what is configured is what runs


def test_command_and_args(daemon: Daemon, pod: Pod, busybox: str) -> None:
    assert output(daemon, pod, busybox, "echo", args=("a b", "$X", "c")) == (0, "a b $X c\n")


def test_environment_and_directory(daemon: Daemon, pod: Pod, busybox: str) -> None:
    code, text = output(daemon, pod, busybox, "sh", "-c", "echo $A-$B; pwd", env={"A": "1 2", "B": "="}, working_dir="/made/for/this")
    assert (code, text) == (0, "1 2-=\n/made/for/this\n")


def test_users(daemon: Daemon, pod: Pod, busybox: str) -> None:
    security = v1.LinuxContainerSecurityContext(
        run_as_user=v1.Int64Value(value=1234), run_as_group=v1.Int64Value(value=55), supplemental_groups=[7, 8]
    )
    container = daemon.run(pod, busybox, "sleep", "1000", security=security)
    assert daemon.exec(container, "id", "-u").stdout == b"1234\n"
    assert set(daemon.exec(container, "id", "-G").stdout.split()) == {b"55", b"7", b"8"}
    user = daemon.container(container).user.linux
    assert (user.uid, user.gid, set(user.supplemental_groups)) == (1234, 55, {55, 7, 8})
    remove(daemon, container)


def test_a_read_only_root(daemon: Daemon, pod: Pod, busybox: str) -> None:
    security = v1.LinuxContainerSecurityContext(readonly_rootfs=True)
    _, text = output(daemon, pod, busybox, "sh", "-c", "touch /x 2>&1; touch /dev/shm/y && echo shm", security=security)
    assert "Read-only file system" in text
    assert text.endswith("shm\n")


def test_mounts(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "rw").mkdir()
    (tmp_path / "file").write_text("content\n")
    mounts = (
        v1.Mount(container_path="/rw", host_path=str(tmp_path / "rw")),
        v1.Mount(container_path="/etc/file", host_path=str(tmp_path / "file"), readonly=True),
        v1.Mount(container_path="/missing", host_path=str(tmp_path / "not/there/yet")),
    )
    _, text = output(
        daemon,
        pod,
        busybox,
        "sh",
        "-c",
        "cat /etc/file; echo x > /rw/made; echo y > /etc/file || echo refused; ls -d /missing",
        mounts=mounts,
    )
    assert text.splitlines()[0] == "content"
    assert "refused" in text
    assert (tmp_path / "rw/made").read_text() == "x\n"
    assert (tmp_path / "not/there/yet").is_dir()


def test_verbose_status(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    found = info(daemon, container)
    assert found["sandboxID"] == pod[0]
    assert Path(f"/proc/{found['pid']}/comm").read_text() == "sleep\n"
    assert found["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]
    assert found["config"]["metadata"]["name"]
    assert Path(found["bundle"]).is_dir()
    assert found["logPath"] == daemon.container(container).log_path
    remove(daemon, container)


def test_resources_and_their_update(daemon: Daemon, pod: Pod, busybox: str) -> None:
    wanted = v1.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=512, cpu_period=100_000, cpu_quota=50_000)
    container = daemon.run(pod, busybox, "sleep", "1000", resources=wanted)
    assert daemon.container(container).resources.linux.memory_limit_in_bytes == 64 << 20

    def limit() -> int:
        path = f"{pod[1].linux.cgroup_parent.strip('/')}/{container}"
        for name in (f"memory/{path}/memory.limit_in_bytes", f"{path}/memory.max"):
            if (Path("/sys/fs/cgroup") / name).exists():
                return int((Path("/sys/fs/cgroup") / name).read_text())
        raise AssertionError(f"no memory cgroup {path}")

    assert limit() == 64 << 20
    change = v1.LinuxContainerResources(memory_limit_in_bytes=128 << 20)
    request = v1.UpdateContainerResourcesRequest(container_id=container, linux=change, annotations={"n": "1"})
    daemon.runtime.UpdateContainerResources(request, timeout=10)
    assert limit() == 128 << 20
    found = daemon.container(container)
    assert (found.resources.linux.memory_limit_in_bytes, found.resources.linux.cpu_shares) == (128 << 20, 512)
    stop(daemon, container)
    with pytest.raises(grpc.RpcError) as failed:
        daemon.runtime.UpdateContainerResources(request, timeout=10)
    assert code_of(failed) == REFUSED


def test_a_target_pid_namespace(daemon: Daemon, pod: Pod, busybox: str) -> None:
    target = daemon.run(pod, busybox, "sleep", "1003")
    options = v1.NamespaceOption(network=v1.POD, ipc=v1.POD, pid=v1.TARGET, target_id=target)
    debug = daemon.run(pod, busybox, "sleep", "1004", security=v1.LinuxContainerSecurityContext(namespace_options=options))
    assert "sleep 1003" in daemon.exec(debug, "ps").stdout.decode()
    stop(daemon, debug)
    assert daemon.container(target).state == v1.CONTAINER_RUNNING
    stop(daemon, target)
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "true", security=v1.LinuxContainerSecurityContext(namespace_options=options))
    assert code_of(failed) == REFUSED


# -- stopping

TRAP = "trap 'echo term; exit 5' TERM; trap 'echo usr1; exit 6' USR1; echo ready; while :; do sleep 0.05; done"
IGNORE = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def running(daemon: Daemon, pod: Pod, busybox: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, busybox, "sh", "-c", script, **fields)
    wait_for("the trap to be set", lambda: "ready" in daemon.log_text(container))
    return container


def test_the_stop_signal_is_sent_first(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, TRAP)
    began = time.monotonic()
    stop(daemon, container, 20)
    assert time.monotonic() - began < 5
    assert daemon.container(container).exit_code == 5
    assert "term" in daemon.log_text(container)


def test_a_stop_signal_of_its_own(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, TRAP, stop_signal=v1.SIGNAL_SIGUSR1)
    assert daemon.container(container).stop_signal == v1.SIGNAL_SIGUSR1
    stop(daemon, container, 20)
    assert daemon.container(container).exit_code == 6


def test_sigkill_after_the_grace_period(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, IGNORE)
    began = time.monotonic()
    stop(daemon, container, 1)
    assert 0.9 < time.monotonic() - began < 5
    ended = daemon.container(container)
    assert (ended.state, ended.exit_code, ended.reason) == (v1.CONTAINER_EXITED, 137, "Error")


def test_no_grace_period_no_signal(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, TRAP)
    stop(daemon, container, 0)
    assert daemon.container(container).exit_code == 137
    assert "term" not in daemon.log_text(container)


def test_a_second_shorter_stop_wins(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 21."""
    container = running(daemon, pod, busybox, IGNORE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stop, daemon, container, 60)
        time.sleep(0.3)
        began = time.monotonic()
        stop(daemon, container, 1)
        first.result(5)
        assert time.monotonic() - began < 5


def test_a_second_longer_stop_does_not_delay_the_first(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, IGNORE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stop, daemon, container, 1)
        time.sleep(0.2)
        began = time.monotonic()
        stop(daemon, container, 60)
        assert time.monotonic() - began < 5
        first.result(5)


def test_a_client_that_gives_up_does_not_end_the_grace_period(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = running(daemon, pod, busybox, IGNORE)
    with pytest.raises(grpc.RpcError):
        daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=2), timeout=0.3)
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    daemon.wait_exit(container, 5)


def test_stop_during_start(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 20: whichever comes first, the container is exited in the end, or was never started."""
    for _ in range(5):
        container = daemon.create(pod, busybox, "sleep", "1000")
        with ThreadPoolExecutor(2) as pool:
            starting = pool.submit(start, daemon, container)
            stop(daemon, container)
            starting.result(10)
        state = daemon.container(container).state
        assert state in (v1.CONTAINER_EXITED, v1.CONTAINER_RUNNING)
        remove(daemon, container)


def test_processes_of_a_container_in_the_hosts_pid_namespace_go_with_it(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod(host_pid=True)
    container = running(daemon, pod, busybox, "sleep 98765 & echo ready; wait")
    pids = [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and b"sleep\x0098765" in wait_bytes(p / "cmdline")]
    assert pids
    stop(daemon, container)
    wait_for("the end of the child", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def wait_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_image_volumes_are_directories_of_ours(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    mounts = info(daemon, container)["runtimeSpec"]["mounts"]
    volumes = daemon.root / "volumes" / container
    wanted = [m for m in mounts if m["source"].startswith(str(volumes))]
    assert len(wanted) == (len(list(volumes.iterdir())) if volumes.exists() else 0)
    remove(daemon, container)
    assert not volumes.exists()
