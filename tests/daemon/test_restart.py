"""What survives the death of our processes: pods, containers, logs and exits (scenarios 1-3, 9, 12-14, 61)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
COUNT = "i=0; while :; do echo line-$i; i=$((i+1)); sleep 0.01; done"


def pod_status(daemon: Daemon, pod: str) -> v1.PodSandboxStatus:
    return daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=10).status


def pid_of(daemon: Daemon, container: str) -> int:
    reply = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container, verbose=True), timeout=10)
    return int(json.loads(reply.info["info"])["pid"])


def contents(daemon: Daemon, container: str) -> list[str]:
    return [line.split(" ", 3)[3] for line in daemon.log_text(container).splitlines()]


def assert_without_a_hole(lines: list[str]) -> None:
    assert lines == [f"line-{n}" for n in range(len(lines))]


def goes_on(daemon: Daemon, container: str) -> None:
    written = len(contents(daemon, container))
    wait_for("the log to go on", lambda: len(contents(daemon, container)) > written + 10)


def replaced(daemon: Daemon, killed: int, name: str) -> None:
    wait_for(f"another {name}", lambda: getattr(daemon.pids(), name) not in (None, killed))


def remove_all(daemon: Daemon) -> None:
    daemon.remove_pods()
    assert not daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers


def test_pods_and_containers_survive_a_restart(daemon: Daemon, busybox: str) -> None:
    """Scenarios 1 and 3."""
    pod = daemon.run_pod(labels={"a": "b"})
    created = daemon.create(pod, busybox, "echo", "started later")
    running = daemon.run(pod, busybox, "sh", "-c", COUNT)
    ended = daemon.run(pod, busybox, "sh", "-c", "exit 4")
    before = (pod_status(daemon, pod[0]), daemon.wait_exit(ended), daemon.container(running), daemon.container(created))
    pid = pid_of(daemon, running)
    daemon.kill()
    time.sleep(0.5)
    daemon.start()
    after = (pod_status(daemon, pod[0]), daemon.container(ended), daemon.container(running), daemon.container(created))
    assert after == before
    assert pid_of(daemon, running) == pid
    goes_on(daemon, running)
    assert_without_a_hole(contents(daemon, running))
    assert daemon.exec(running, "echo", "hi").stdout == b"hi\n"
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=created), timeout=10)
    assert daemon.wait_exit(created).exit_code == 0
    assert contents(daemon, created) == ["started later"]
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=running, timeout=0), timeout=20)
    assert daemon.container(running).exit_code == 137
    remove_all(daemon)


def test_an_exit_while_the_daemon_is_down(daemon: Daemon, busybox: str) -> None:
    """Scenario 2: code and time are those of the exit, not of the restart."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", "sleep 1; echo last words; exit 23")
    pid = pid_of(daemon, container)
    daemon.kill()
    wait_for("the exit", lambda: not Path(f"/proc/{pid}").exists())
    seen = time.time_ns()
    time.sleep(1)
    daemon.start()
    ended = daemon.container(container)
    assert (ended.state, ended.exit_code, ended.reason) == (v1.CONTAINER_EXITED, 23, "Error")
    assert abs(ended.finished_at - seen) < 0.5e9
    assert contents(daemon, container) == ["last words"]
    remove_all(daemon)


def test_stdio_is_replaced(daemon: Daemon, busybox: str) -> None:
    """Scenario 13."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", COUNT)
    for _ in range(3):
        wait_for("some lines", lambda: len(contents(daemon, container)) > 5)
        replaced(daemon, daemon.kill_stdio(), "stdio")
        goes_on(daemon, container)
    assert_without_a_hole(contents(daemon, container))
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=20)
    assert daemon.container(container).exit_code == 137
    remove_all(daemon)


def test_the_supervisor_is_replaced(daemon: Daemon, busybox: str) -> None:
    """Scenario 14: containers and logs go on, exits keep their codes, and everything can be done afterwards."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", COUNT)
    dying = daemon.run(pod, busybox, "sh", "-c", "sleep 3; exit 42")
    pid = pid_of(daemon, container)
    wait_for("some lines", lambda: len(contents(daemon, container)) > 5)
    replaced(daemon, daemon.kill_supervisor(), "supervisor")
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    assert pid_of(daemon, container) == pid
    goes_on(daemon, container)
    assert daemon.wait_exit(dying).exit_code == 42
    assert daemon.exec(container, "echo", "hi").stdout == b"hi\n"
    other = daemon.run(pod, busybox, "sh", "-c", "exit 9")
    assert daemon.wait_exit(other).exit_code == 9
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=20)
    assert daemon.container(container).exit_code == 137
    assert_without_a_hole(contents(daemon, container))
    remove_all(daemon)


def test_all_at_once(daemon: Daemon, busybox: str) -> None:
    """Scenario 61: daemon, supervisor and stdio die together; containers live, logs and exits are whole."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", COUNT)
    dying = daemon.run(pod, busybox, "sh", "-c", "sleep 3; echo end; exit 21")
    pid = pid_of(daemon, container)
    wait_for("some lines", lambda: len(contents(daemon, container)) > 5)
    daemon.kill_everything()
    time.sleep(0.5)
    daemon.start()
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    assert pid_of(daemon, container) == pid
    ended = daemon.wait_exit(dying)
    release = tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2])
    assert ended.exit_code == 21 if release >= (6, 15) else ended.exit_code in (21, 255)
    assert contents(daemon, dying) == ["end"]
    goes_on(daemon, container)
    # stdio may die between reading and writing: that costs at most one read of each stream
    lines = contents(daemon, container)
    numbers = [int(line.removeprefix("line-")) for line in lines]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= numbers[-1] - 5
    assert daemon.exec(container, "echo", "hi").stdout == b"hi\n"
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=20)
    remove_all(daemon)


def test_a_name_stays_taken_and_a_retry_joined(daemon: Daemon, busybox: str) -> None:
    pod = daemon.run_pod()
    container = daemon.create(pod, busybox, "sleep", "1000", name="again")
    daemon.restart()
    assert daemon.run_pod(pod[1])[0] == pod[0]
    assert daemon.create(pod, busybox, "sleep", "1000", name="again") == container
    remove_all(daemon)


def test_fifty_containers_are_listed_within_a_second(daemon: Daemon, busybox: str) -> None:
    pods = [daemon.run_pod(host_network=True) for _ in range(10)]
    containers = {daemon.run(pod, busybox, "sleep", "1000") for pod in pods for _ in range(5)}
    daemon.kill()
    took = daemon.start()
    found = daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers
    assert {c.id for c in found if c.state == v1.CONTAINER_RUNNING} == containers
    # the start of the interpreter and of grpc is in this, on a machine that others use too
    assert took < 3
    assert "50 containers recovered" in daemon.tail(400)
    remove_all(daemon)


@pytest.mark.parametrize("damage", [b"", b'{"format": 1, "facts"', b"\0" * 500])
def test_a_damaged_record_costs_only_its_own_object(daemon: Daemon, busybox: str, damage: bytes) -> None:
    """Scenario 9: quarantined, said in the log, its leftovers released; everything else is as before."""
    bad, good = daemon.run_pod(), daemon.run_pod()
    victim, bystander = daemon.run(bad, busybox, "sleep", "1000"), daemon.run(good, busybox, "sleep", "1000")
    lost = daemon.run(good, busybox, "sleep", "1000")
    pids = [pid_of(daemon, victim), pid_of(daemon, lost)]
    daemon.kill()
    (daemon.root / "pods" / f"{bad[0]}.json").write_bytes(damage)
    (daemon.root / "containers" / f"{lost}.json").write_bytes(damage)
    daemon.start()
    found = {c.id: c.state for c in daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers}
    assert found == {bystander: v1.CONTAINER_RUNNING}
    assert [p.id for p in daemon.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items] == [good[0]]
    assert (daemon.root / "pods" / f"{bad[0]}.json.corrupt").read_bytes() == damage
    assert f"{bad[0]}.json" in daemon.tail(400)
    wait_for("the release of what it had", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    wait_for("the end of its directory", lambda: bad[0] not in os.listdir(daemon.state / "pods"))
    assert not (daemon.state / "netns" / bad[0]).exists()
    assert daemon.run_pod(bad[1])[0] != bad[0], "its name is free"
    remove_all(daemon)


def test_another_boot(daemon: Daemon, busybox: str) -> None:
    """Scenario 12, as far as it can be played: the records are of another boot, and everything under ``state`` is gone."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    ended = daemon.run(pod, busybox, "sh", "-c", "exit 4")
    daemon.wait_exit(ended)
    address = pod_status(daemon, pod[0]).network.ip
    daemon.kill()
    for record in [daemon.root / "pods" / f"{pod[0]}.json", *(daemon.root / "containers").glob("*.json")]:
        document = json.loads(record.read_text())
        document["facts"]["boot_id"] = "0" * 36
        record.write_text(json.dumps(document))
    daemon.start()
    assert pod_status(daemon, pod[0]).state == v1.SANDBOX_NOTREADY
    found = daemon.container(container)
    assert (found.state, found.exit_code, found.reason) == (v1.CONTAINER_EXITED, 255, "Unknown")
    assert daemon.container(ended).exit_code == 4
    wait_for("the release of the namespace", lambda: not (daemon.state / "netns" / pod[0]).exists())
    fresh = [pod_status(daemon, daemon.run_pod()[0]).network.ip for _ in range(3)]
    assert all(ip for ip in fresh)
    assert address
    remove_all(daemon)


def test_half_made_objects_are_undone(daemon: Daemon, busybox: str) -> None:
    """The daemon dies at random moments of creations: whatever was answered exists, and nothing else does."""
    for delay in (0.002, 0.005, 0.01, 0.02, 0.04):
        config = daemon.pod_config()
        call = daemon.runtime.RunPodSandbox.future(v1.RunPodSandboxRequest(config=config))
        time.sleep(delay)
        daemon.kill()
        answered = call.done() and call.exception() is None
        daemon.start()
        found = [p.id for p in daemon.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items]
        if answered:
            assert found
        wait_for("the undoing", lambda found=found: set(os.listdir(daemon.state / "pods")) == set(found))
        wait_for("the pins to go", lambda found=found: set(os.listdir(daemon.state / "netns")) == set(found))
        pod = daemon.run_pod(config)
        call = daemon.runtime.CreateContainer.future(
            v1.CreateContainerRequest(pod_sandbox_id=pod[0], config=_container(busybox, delay), sandbox_config=pod[1])
        )
        time.sleep(delay)
        daemon.kill()
        daemon.start()
        containers = [c.id for c in daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=10).containers]
        wait_for("the undoing", lambda containers=containers: set(os.listdir(daemon.state / "containers")) == set(containers))
        remove_all(daemon)


def _container(image: str, delay: float) -> v1.ContainerConfig:
    from tests.daemon.builders import container_config

    return container_config(image, "sleep", "1000", name=f"half-{delay}")


def test_a_graceful_end_touches_no_container(daemon: Daemon, busybox: str) -> None:
    import signal

    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    pid = pid_of(daemon, container)
    daemon.restart(signal.SIGTERM)
    assert pid_of(daemon, container) == pid
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    with pytest.raises(grpc.RpcError):
        daemon.exec("nope", "true")
    remove_all(daemon)


@pytest.mark.parametrize("killed", ["daemon", "supervisor"])
def test_the_first_status_after_a_kill_says_ready(daemon: Daemon, killed: str) -> None:
    """A kubelet that hears "not ready" once calls the node NotReady, and starts no pod until it asks again."""
    for _ in range(3):
        if killed == "daemon":
            daemon.kill()
            process = daemon.spawn()
            wait_for("the socket", lambda: _answers(daemon), step=0.001)
            daemon.process = process
        else:
            daemon.kill_supervisor()
        conditions = daemon.runtime.Status(v1.StatusRequest(), timeout=10).status.conditions
        assert {c.type: c.status for c in conditions} == {"RuntimeReady": True, "NetworkReady": True}, conditions


def _answers(daemon: Daemon) -> bool:
    """Whether somebody listens now: a file of the killed daemon may still be there."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket))
    except OSError:
        return False
    daemon.connect()
    return True


def test_execs_in_flight_when_the_supervisor_dies_do_not_hold_their_container(daemon: Daemon, busybox: str) -> None:
    """Nobody knows their pids yet, and a PID namespace ends only when all that was in it is reaped: the daemon inherits them."""
    pod = daemon.run_pod(host_network=True)
    container = daemon.run(pod, busybox, "sleep", "1000")
    done = threading.Event()

    def probe() -> None:
        while not done.is_set():
            with contextlib.suppress(grpc.RpcError):  # those in flight fail
                daemon.exec(container, "true")

    with ThreadPoolExecutor(8) as pool:
        probes = [pool.submit(probe) for _ in range(8)]
        try:
            for _ in range(4):
                time.sleep(0.3)
                replaced(daemon, daemon.kill_supervisor(), "supervisor")
        finally:
            done.set()
        for one in probes:
            one.result()
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=30)
    assert daemon.container(container).state == v1.CONTAINER_EXITED
    process = daemon.process
    assert process is not None
    wait_for("no ended child unreaped", lambda: not _zombies(process.pid), 15)


def _zombies(parent: int) -> list[str]:
    """Names of ended children that nobody has reaped."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                name, _, rest = Path(f"/proc/{child}/stat").read_text().rpartition(")")
                if rest.split()[0] == "Z":
                    found.append(name)
    return found
