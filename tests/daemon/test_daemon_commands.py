"""``cri-shim run`` and ``cri-shim pull`` as a person uses them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import REPOSITORY, Daemon, wait_for

pytestmark = pytest.mark.registry


def command(daemon: Daemon, name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cri.cli", name, "--socket", str(daemon.socket), *arguments]


def run(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    options: Any = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": False, "timeout": 60}
    return subprocess.run(command(daemon, "run", "--cgroup-parent", f"{daemon.cgroup_parent}/run", *arguments), **options)


def pods(daemon: Daemon) -> int:
    return len(daemon.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=5).items)


@pytest.mark.parametrize("network", ["pod", "host"])
def test_run_returns_output_and_exit_code(daemon: Daemon, busybox: str, network: str) -> None:
    done = run(daemon, "--network", network, busybox, "sh", "-c", "echo out; echo err >&2; printf tail; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\ntail\n", "err\n")
    assert pods(daemon) == 0


def test_run_options_reach_the_container(daemon: Daemon, busybox: str, tmp_path: Any) -> None:
    (tmp_path / "f").write_text("shared")
    tmp_path.chmod(0o755)
    script = "id -u; id -g; echo $A; pwd; cat /mnt/f; touch /mnt/g /x; hostname"
    done = run(
        *(daemon, "--user", "1000:1001", "-e", "A=b c", "-w", "/tmp", "-v", f"{tmp_path}:/mnt:ro", "--hostname", "box", "--read-only"),
        *(busybox, "sh", "-c", script),
    )
    assert done.stdout.split("\n") == ["1000", "1001", "b c", "/tmp", "sharedbox", ""]
    assert "Read-only" in done.stderr


def test_run_of_a_missing_program_is_told(daemon: Daemon, busybox: str) -> None:
    done = run(daemon, busybox, "/no/such/program")
    assert done.returncode == 125
    assert "/no/such/program" in done.stderr and "ENOENT" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert pods(daemon) == 0


def test_interrupt_stops_and_removes(daemon: Daemon, busybox: str) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    arguments = command(daemon, "run", "--cgroup-parent", f"{daemon.cgroup_parent}/run", busybox, "sh", "-c", script)
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "bye\n"
    assert process.returncode == 3
    assert pods(daemon) == 0


def test_second_interrupt_kills(daemon: Daemon, busybox: str) -> None:
    arguments = command(
        daemon, "run", "--cgroup-parent", f"{daemon.cgroup_parent}/run", busybox, "sh", "-c", "trap '' TERM; echo ready; sleep 99"
    )
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=8) == 137
    wait_for("the pod to be removed", lambda: pods(daemon) == 0)


def test_pull_prints_the_image_id(daemon: Daemon, busybox: str) -> None:
    options: Any = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": False, "timeout": 60}
    done = subprocess.run(command(daemon, "pull", busybox), **options)
    status = daemon.images.ImageStatus(v1.ImageStatusRequest(image=v1.ImageSpec(image=busybox)), timeout=5)
    assert (done.returncode, done.stdout) == (0, f"{status.image.id}\n"), done.stderr
    done = subprocess.run(command(daemon, "pull", busybox.replace("busybox", "nothing")), **options)
    assert done.returncode == 1
    assert done.stderr.startswith("cri-shim: ") and len(done.stderr.splitlines()) == 1


def test_pull_draws_on_a_terminal(daemon: Daemon, busybox: str) -> None:
    """`script` gives the command a terminal; the bar is taken away again and the id stays."""
    line = " ".join(command(daemon, "pull", busybox))
    done = subprocess.run(["script", "-qec", line, "/dev/null"], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert "sha256:" in done.stdout
