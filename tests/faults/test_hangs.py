"""File systems that do not answer (scenario 26): only the request that asked for one waits, and not for ever."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon

MNT_DETACH = 2


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    """A FUSE mount whose server never answers: every look-up in it sleeps until the mount is aborted."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse on this kernel")
    libc = ctypes.CDLL(None, use_errno=True)
    directory = tmp_path / "dead"
    directory.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"dead", bytes(directory), b"fuse", 0, options) != 0:
        os.close(device)
        pytest.skip(f"FUSE cannot be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        os.close(device)  # aborts the connection: everybody who sleeps gets ENOTCONN
        libc.umount2(bytes(directory), MNT_DETACH)


def test_a_dead_host_path_is_named_and_hurts_nobody_else(daemon: Daemon, busybox: str, dead: Path) -> None:
    pod = daemon.run_pod(host_network=True)
    mounts = (v1.Mount(container_path="/x", host_path=str(dead / "below")),)

    def create(name: str) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as failed:
            daemon.create(pod, busybox, "true", name=name, mounts=mounts)
        return failed.value

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(create, f"dead-{n}") for n in range(3)]
        slowest = 0.0
        while not all(w.done() for w in waiting):
            began = time.monotonic()
            container = daemon.run(pod, busybox, "true")
            daemon.wait_exit(container)
            daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.2)
        errors = [w.result() for w in waiting]
    assert slowest < 5
    for error in errors:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert str(dead / "below") in (error.details() or "")
    threads = os.listdir(f"/proc/{daemon.pids().daemon}/task")
    assert len(threads) < 40
    daemon.remove_pods()
    assert os.listdir(daemon.state / "containers") == []
