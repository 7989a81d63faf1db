"""What a container can do to processes that join it before their program runs, and by them to us (beyond ATTACKS.md).

Between its fork and its execve a process that joins is ours, and already visible. It can be stopped by anybody of the same user, and its
descriptors can be taken by anybody with CAP_SYS_PTRACE.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.test_descriptors import capable, mount
from tests.daemon.harness import Daemon, wait_for

STOP = "echo ready; while :; do for p in /proc/[0-9]*; do n=${p#/proc/}; [ $n = 1 ] || [ $n = $$ ] || kill -STOP $n; done 2>/dev/null; done"


@pytest.mark.parametrize("how", ["exec", "shared pids"])
def test_descriptors_taken_from_a_newcomer_are_of_no_use(daemon: Daemon, busybox: str, hostile: Callable[[str], Path], how: str) -> None:
    """A TCP socket with SO_LINGER that the supervisor had to close would stop it, and the node, for an hour."""
    pod = daemon.run_pod(shared_pid=how != "exec")
    robber = daemon.run(
        pod, busybox, "/hostile/hijack", mounts=(mount(hostile("hijack"), "/hostile"),), security=capable(pod[1], "SYS_PTRACE")
    )
    wait_for("the robber", lambda: "ready" in daemon.log_text(robber))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(grpc.RpcError):  # a process that was robbed may fail, or be late
            if how == "exec":
                daemon.exec(robber, "true", timeout=1)
            else:
                daemon.run(pod, busybox, "true")
        if "stole" in daemon.log_text(robber):
            break
    text = daemon.log_text(robber)
    assert "stole" in text, "nobody was robbed: the test shows nothing"
    assert "sent 8" not in text, text
    began = time.monotonic()
    other = daemon.run(daemon.run_pod(), busybox, "sleep", "100")
    assert daemon.exec(other, "echo", "fine").stdout == b"fine\n"
    assert time.monotonic() - began < 3
    daemon.remove_pods()


def test_a_newcomer_that_is_stopped_delays_nobody_else(daemon: Daemon, busybox: str) -> None:
    """The exec ends in time, and what it took here is given back with the container."""
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sh", "-c", STOP)
    wait_for("the loop", lambda: "ready" in daemon.log_text(container))
    supervisor = daemon.pids().supervisor
    before = len(os.listdir(f"/proc/{supervisor}/fd"))
    stopped = 0
    for _ in range(4):
        began = time.monotonic()
        try:
            daemon.exec(container, "true", timeout=1)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            stopped += 1
        assert time.monotonic() - began < 4
    assert stopped, "no exec was stopped: the test shows nothing"
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=20)
    wait_for("descriptors given back", lambda: len(os.listdir(f"/proc/{supervisor}/fd")) <= before, 10)
    daemon.remove_pods()


def test_a_neighbour_that_is_stopped_can_be_removed(daemon: Daemon, busybox: str) -> None:
    """A container that stops the processes of its pod's other containers harms its pod only."""
    pod = daemon.run_pod(shared_pid=True)
    hostile = daemon.run(pod, busybox, "sh", "-c", STOP.replace("[ $n = $$ ]", "[ $n -le $(($$ + 1)) ]"))
    wait_for("the loop", lambda: "ready" in daemon.log_text(hostile))
    for _ in range(3):
        container = daemon.create(pod, busybox, "sleep", "1000")
        with contextlib.suppress(grpc.RpcError):
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=1)
    began = time.monotonic()
    daemon.remove_pods()
    assert time.monotonic() - began < 20
    assert not os.listdir(daemon.state / "containers")
