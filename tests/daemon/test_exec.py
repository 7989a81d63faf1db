"""ExecSync over the socket: output, exit codes, time limits, background children, the cap, leaks."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


@pytest.fixture(scope="module")
def container(daemon: Daemon, pod: Pod, busybox: str) -> str:
    return daemon.run(pod, busybox, "sleep", "100000", env={"GREETING": "hello"}, working_dir="/tmp")


def processes(daemon: Daemon, container: str) -> str:
    return daemon.exec(container, "ps", "-o", "pid,args").stdout.decode()


def test_output_and_exit_code(daemon: Daemon, container: str) -> None:
    reply = daemon.exec(container, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (reply.stdout, reply.stderr, reply.exit_code) == (b"out\n", b"err\n", 7)
    assert daemon.exec(container, "true") == v1.ExecSyncResponse()


def test_binary_output(daemon: Daemon, container: str) -> None:
    assert daemon.exec(container, "printf", r"\x00\xff\n\x00").stdout == b"\x00\xff\n\x00"


def test_the_containers_environment_directory_and_namespaces(daemon: Daemon, container: str) -> None:
    reply = daemon.exec(container, "sh", "-c", "echo $GREETING; pwd; cat /proc/1/cmdline | tr '\\0' ' '; readlink /proc/self/fd/0")
    assert reply.stdout.decode().splitlines() == ["hello", "/tmp", "sleep 100000 /dev/null"]


def test_death_by_a_signal_is_128_and_the_signal(daemon: Daemon, container: str) -> None:
    assert daemon.exec(container, "sh", "-c", "kill -9 $$").exit_code == 137
    assert daemon.exec(container, "sh", "-c", "kill -TERM $$").exit_code == 143


def test_a_program_that_does_not_exist(daemon: Daemon, container: str) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        daemon.exec(container, "/no/such/program")
    assert "/no/such/program" in (failed.value.details() or "")


def test_bad_requests(daemon: Daemon, pod: Pod, container: str, busybox: str) -> None:
    for command in ((), ("",)):
        with pytest.raises(grpc.RpcError) as failed:
            daemon.exec(container, *command)
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as failed:
        daemon.exec("d" * 64, "true")
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND
    created = daemon.create(pod, busybox, "true")
    with pytest.raises(grpc.RpcError) as failed:
        daemon.exec(created, "true")
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=created), timeout=10)
    daemon.wait_exit(created)
    with pytest.raises(grpc.RpcError) as failed:
        daemon.exec(created, "true")
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "CONTAINER_EXITED" in (failed.value.details() or "")


def test_a_time_limit_kills_the_execs_processes_and_no_others(daemon: Daemon, container: str) -> None:
    """Scenario 35. Another exec's processes, and those of the container, live on."""
    with ThreadPoolExecutor(1) as pool:
        bystander = pool.submit(daemon.exec, container, "sh", "-c", "sleep 30 & echo $! >/tmp/bystander; wait", timeout=40)
        wait_for("the other exec", lambda: "sleep 30" in processes(daemon, container))
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as failed:
            daemon.exec(container, "sh", "-c", "sleep 501 & sh -c 'sleep 502; true' & sleep 503; true", timeout=1)
        assert 0.9 < time.monotonic() - began < 9  # a busy machine
        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "timeout 1s exceeded" in (failed.value.details() or "")
        left = processes(daemon, container)
        for victim in ("sleep 501", "sleep 502", "sleep 503"):
            assert victim not in left
        assert "sleep 30" in left
        assert "sleep 100000" in left
        daemon.exec(container, "sh", "-c", "kill $(cat /tmp/bystander)")
        assert bystander.result(10).exit_code == 0
    assert daemon.container(container).state == v1.CONTAINER_RUNNING


def test_a_client_that_gives_up_ends_the_process(daemon: Daemon, container: str) -> None:
    request = v1.ExecSyncRequest(container_id=container, cmd=["sleep", "504"])
    with pytest.raises(grpc.RpcError):
        daemon.runtime.ExecSync(request, timeout=0.5)
    wait_for("its end", lambda: "sleep 504" not in processes(daemon, container))


def test_a_background_child_does_not_hold_the_answer(daemon: Daemon, container: str) -> None:
    """Scenario 36: it keeps stdout open; what was written is answered within a bound, and the child lives on."""
    began = time.monotonic()
    reply = daemon.exec(container, "sh", "-c", "echo first; sleep 15 & exit 4", timeout=30)
    assert time.monotonic() - began < 10
    assert (reply.stdout, reply.exit_code) == (b"first\n", 4)
    assert "sleep 15" in processes(daemon, container)


def test_what_a_background_child_writes_soon_after_is_in_the_answer(daemon: Daemon, container: str) -> None:
    reply = daemon.exec(container, "sh", "-c", "(sleep 0.2; echo second) & echo first")
    assert reply.stdout == b"first\nsecond\n"


@pytest.mark.parametrize("size", [65536, 65537, 1 << 20, 5_000_000])
def test_more_output_than_a_pipe_holds(daemon: Daemon, container: str, size: int) -> None:
    reply = daemon.exec(container, "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x; echo done >&2", timeout=30)
    assert (len(reply.stdout), reply.stderr) == (size, b"done\n")


def test_output_is_capped_and_the_process_goes_on(daemon: Daemon, container: str) -> None:
    """Scenario 37, CVE-2022-1708: the rest is read and dropped, and the answer fits the kubelet's 16 MiB message."""
    daemon_pid = daemon.pids().daemon
    reply = daemon.exec(container, "sh", "-c", "head -c 200000000 /dev/zero; head -c 30000000 /dev/zero >&2; exit 9", timeout=60)
    assert reply.exit_code == 9
    assert 15 << 20 < len(reply.stdout) + len(reply.stderr) <= 16 << 20
    assert len(reply.stdout) >= (8 << 20) - 2048
    assert len(reply.stderr) >= (8 << 20) - 2048
    status = Path(f"/proc/{daemon_pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 400_000


def test_exec_during_a_graceful_stop(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 39: probes and preStop hooks still run while the container winds down."""
    script = "trap 'sleep 2; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    container = daemon.run(pod, busybox, "sh", "-c", script)
    wait_for("the trap", lambda: "ready" in daemon.log_text(container))
    with ThreadPoolExecutor(1) as pool:
        request = v1.StopContainerRequest(container_id=container, timeout=20)
        stopping = pool.submit(daemon.runtime.StopContainer, request, timeout=30)
        time.sleep(0.3)
        assert daemon.exec(container, "echo", "still here").stdout == b"still here\n"
        stopping.result(20)
    assert daemon.container(container).exit_code == 0


def test_an_exec_ends_with_its_container(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sleep", "1000")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(daemon.exec, container, "sleep", "600", timeout=60)
        wait_for("the exec", lambda: "sleep 600" in processes(daemon, container))
        daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=20)
        assert running.result(10).exit_code == 137


def fds(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("count", [200, pytest.param(int(os.environ.get("EXECS", "1500")), marks=pytest.mark.slow)])
def test_many_execs_leak_nothing(daemon: Daemon, container: str, count: int) -> None:
    """Scenario 38: descriptors, processes and memory return to what they were, also after time limits and background children.
    EXECS=10000 is the scenario in full: minutes, and nothing that 1500 would not show."""
    pids = daemon.pids()

    def one(number: int) -> None:
        if number % 50 == 7:
            with pytest.raises(grpc.RpcError):
                daemon.exec(container, "sleep", "60", timeout=1)
        elif number % 50 == 9:
            daemon.exec(container, "sh", "-c", "sleep 1 &")
        else:
            assert daemon.exec(container, "echo", str(number)).stdout == b"%d\n" % number

    for number in range(60):
        one(number)
    time.sleep(1.5)
    before = {pid: fds(pid) for pid in (pids.daemon, pids.supervisor, pids.stdio)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(count)))
    wait_for("the last background child", lambda: "sleep 1\n" not in processes(daemon, container))
    wait_for("descriptors to return", lambda: all(fds(pid) <= before[pid] + 2 for pid in before))
    # a spare child more or less
    wait_for("helpers to end", lambda: len(daemon.pids().others) <= len(pids.others) + 2)


def test_an_exec_that_meets_the_containers_end_says_so(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """A probe of a container that ends just then: not "join namespaces: ESRCH", which reads like a fault of the runtime."""
    refused: list[grpc.RpcError] = []

    def probe(victim: str) -> None:
        while True:
            try:
                daemon.exec(victim, "true")
            except grpc.RpcError as error:
                refused.append(error)
                return

    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            victim = daemon.run(pod, busybox, "sleep", "100000")
            probes = [pool.submit(probe, victim) for _ in range(6)]
            time.sleep(0.1)
            info = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=victim, verbose=True), timeout=10).info["info"]
            os.kill(json.loads(info)["pid"], signal.SIGKILL)
            for one in probes:
                one.result()
    assert {error.code() for error in refused} == {grpc.StatusCode.FAILED_PRECONDITION}, {error.details() for error in refused}


def test_what_nobody_waits_for_any_more_is_not_run(daemon: Daemon, container: str) -> None:
    """A supervisor that is behind drops exec sessions whose time is over, instead of making those behind them late as well."""
    supervisor = daemon.pids().supervisor
    assert supervisor is not None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        with pytest.raises(grpc.RpcError) as late:
            daemon.exec(container, "touch", "/tmp/late", timeout=1)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "timeout 1s exceeded" in str(late.value.details())
    assert daemon.exec(container, "test", "-e", "/tmp/late").exit_code == 1
