"""The daemon as a process: who may start it, how it ends, what it says about itself."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc
from tests.daemon.harness import REPOSITORY, Daemon, Node, running, wait_for


def refused(daemon: Daemon, *flags: str) -> str:
    """What a second daemon prints before it gives up."""
    command = daemon.node.command(sys.executable, "-m", "cri.cli", "serve", "--config", str(daemon.config), *flags)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    return done.stderr


def test_second_daemon_on_the_same_root_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    line = f"cri-shim: another cri-shim (pid {daemon.pids().daemon}) is using {daemon.root}\n"
    assert refused(daemon) == line
    assert refused(daemon, "--state", str(tmp_path / "s"), "--listen", f"unix://{tmp_path}/s/s") == line
    assert refused(daemon, "--root", str(tmp_path / "r")) == line.replace(f"{daemon.root}\n", f"{daemon.state}\n")
    assert daemon.runtime.Version(v1.VersionRequest(), timeout=5).runtime_name == "cri-shim"


def test_unknown_key_is_one_line(daemon: Daemon) -> None:
    broken = daemon.directory / "broken.toml"
    broken.write_text("[network]\nmod = 1\n")
    assert refused(daemon, "--config", str(broken)) == f"cri-shim: {broken}: unknown key `mod` in `network`\n"


def test_state_is_private(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    for directory in (daemon.root, daemon.state, *daemon.root.rglob("*"), *daemon.state.glob("*")):
        if directory.is_dir() and "snapshots" not in directory.parts:
            assert stat.S_IMODE(directory.stat().st_mode) & 0o077 == 0, directory


def test_directories_open_to_others_are_repaired(daemon: Daemon) -> None:
    daemon.kill(signal.SIGTERM)
    opened = [daemon.root, daemon.state, daemon.root / "pods", daemon.state / "containers"]
    for directory in opened:
        directory.chmod(0o755)
    daemon.start()
    assert [stat.S_IMODE(d.stat().st_mode) for d in opened] == [0o700] * len(opened)


def test_sigterm_ends_it_in_good_order(daemon: Daemon) -> None:
    supervisor = daemon.pids().supervisor
    assert daemon.kill(signal.SIGTERM) == 0
    assert not daemon.socket.exists()
    assert supervisor is not None and Path(f"/proc/{supervisor}").exists(), "the supervisor outlives the daemon"
    daemon.start()
    assert daemon.pids().supervisor == supervisor


@pytest.mark.registry
def test_sigterm_does_not_wait_for_long_calls(daemon: Daemon, busybox: str) -> None:
    """It must not hold up an upgrade: what takes longer than the grace period is cut off, the container goes on."""
    container = daemon.run(daemon.run_pod(), busybox, "sleep", "300")
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:  # not the harness's, which hangs up before it kills
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        call = stub.ExecSync.future(v1.ExecSyncRequest(container_id=container, cmd=["sleep", "60"]))
        time.sleep(0.3)
        began = time.monotonic()
        assert daemon.kill(signal.SIGTERM) == 0
        assert 2 < time.monotonic() - began < 8
        with pytest.raises(grpc.RpcError):
            call.result(timeout=5)
    daemon.start()
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    daemon.remove_pods()


def test_a_socket_left_by_sigkill_is_replaced(daemon: Daemon) -> None:
    daemon.kill(signal.SIGKILL)
    assert daemon.socket.exists()
    daemon.start()
    daemon.runtime.Version(v1.VersionRequest(), timeout=5)


def test_sigusr1_tells_what_it_is_doing(daemon: Daemon) -> None:
    before = len(daemon.log.read_text())
    pid = daemon.pids().daemon
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    said = wait_for("the dump", lambda: (text := daemon.log.read_text()[before:]).rstrip().endswith(" tasks ---") and text)
    assert "thread MainThread:\n" in said
    assert "task Task-1: <coroutine object _serve" in said
    assert "cri/daemon.py" in said
    daemon.runtime.Version(v1.VersionRequest(), timeout=5)


def test_systemd_is_told(node: Node, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "n"))
        receiver.settimeout(20)
        with running(node, env={"NOTIFY_SOCKET": str(tmp_path / "n")}) as daemon:
            assert receiver.recv(100) == b"READY=1"
            daemon.kill(signal.SIGTERM)
            assert receiver.recv(100) == b"STOPPING=1"


def test_metrics_endpoint_and_json_log(node: Node) -> None:
    extra = '[metrics]\nlisten = "127.0.0.1:19464"\n'
    with running(node, extra=extra, env={"CRI_SHIM_LOG_FORMAT": "json"}) as daemon:
        daemon.runtime.ListContainers(v1.ListContainersRequest(), timeout=5)
        with pytest.raises(grpc.RpcError):
            daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id="x"), timeout=5)
        script = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:19464/metrics', timeout=5).read().decode())"
        text = node.run(sys.executable, "-c", script).stdout
        assert 'cri_shim_rpc_duration_seconds_count{code="OK",method="ListContainers"} 1.0' in text
        assert 'cri_shim_rpc_duration_seconds_count{code="NOT_FOUND",method="ContainerStatus"} 1.0' in text
        assert '"message":"ListContainers"' in daemon.log.read_text()
