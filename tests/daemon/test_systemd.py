"""A node whose cgroups are systemd's, as a kubelet with ``cgroupDriver: systemd`` uses it (scenarios 48 and 51)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon import builders
from tests.daemon.harness import REPOSITORY, Daemon, Node, wait_for
from tests.registry import DockerRegistry

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(not Path("/run/systemd/system").is_dir(), reason="systemd is not PID 1")]
MIB = 1 << 20
_START = 120  # s for a daemon to serve, in an emulated machine that shares its processors


@pytest.fixture(scope="module")
def daemon(node: Node) -> Iterator[Daemon]:
    daemon = Daemon(node, driver="systemd")
    try:
        daemon.start(_START)
        yield daemon
    finally:
        daemon.close()


def systemctl(*argv: str) -> str:
    return subprocess.run(["systemctl", *argv], check=True, capture_output=True, text=True, timeout=_START).stdout




def privileged_pod(daemon: Daemon, **fields: Any) -> tuple[str, v1.PodSandboxConfig]:
    """One that privileged containers may be in, too."""
    config = daemon.pod_config(**fields)
    config.linux.security_context.privileged = True
    return daemon.run_pod(config)


def test_the_kubelet_is_told(daemon: Daemon) -> None:
    assert daemon.runtime.RuntimeConfig(v1.RuntimeConfigRequest(), timeout=5).linux.cgroup_driver == v1.SYSTEMD
    with pytest.raises(grpc.RpcError, match="is not a slice, but the cgroup driver is systemd"):
        daemon.run_pod(cgroup_parent="/kubepods/burstable/pod1")


def test_a_pods_life(daemon: Daemon, busybox: str) -> None:
    pod = privileged_pod(daemon, shared_pid=True, annotations={"org.systemd.property.CPUWeight": "uint64 1", "CollectMode": "'inactive'"})
    slice_name = pod[1].linux.cgroup_parent.rpartition("/")[2]
    memory = v1.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_shares=512, cpu_quota=20000, cpu_period=100000)
    annotations = {"org.systemd.property.MemoryMax": "uint64 4096", "org.systemd.property.DevicePolicy": "'auto'"}
    container = daemon.run(pod, busybox, "sh", "-c", "echo up; sleep 1000", resources=memory, annotations=annotations)
    privileged = v1.LinuxContainerSecurityContext(privileged=True)
    other = daemon.run(pod, busybox, "sleep", "1000", security=privileged)
    unit = f"cri-shim-{container}.scope"
    shown = dict(line.partition("=")[::2] for line in systemctl("show", unit).splitlines())
    limit = shown.get("MemoryMax") if shown.get("MemoryMax") != "infinity" else shown.get("MemoryLimit")
    assert (shown["Slice"], limit, shown["DevicePolicy"], shown["CollectMode"]) == (
        *(slice_name, str(64 * MIB), "strict", "inactive-or-failed"),  # CVE-2024-3154: no annotation names a property
    )
    assert f"{pod[1].linux.cgroup_parent}/cri-shim-{pod[0]}.scope" == systemctl(
        *("show", f"cri-shim-{pod[0]}.scope", "--property=ControlGroup", "--value")
    ).strip()
    stats = daemon.runtime.ContainerStats(v1.ContainerStatsRequest(container_id=container), timeout=10).stats
    assert stats.memory.working_set_bytes.value > 0
    update = v1.LinuxContainerResources(memory_limit_in_bytes=96 * MIB)
    daemon.runtime.UpdateContainerResources(v1.UpdateContainerResourcesRequest(container_id=container, linux=update), timeout=30)
    systemctl("daemon-reload")
    assert str(96 * MIB) in systemctl("show", unit, "--property=MemoryMax", "--property=MemoryLimit")
    daemon.kill()
    daemon.start(_START)
    daemon.kill_supervisor()
    wait_for("another supervisor", lambda: daemon.pids().supervisor, 60)
    assert daemon.exec(container, "echo", "still").stdout == b"still\n"
    assert "up" in daemon.log_text(container)
    for name in (container, other):
        daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=name, timeout=0), timeout=30)
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=name), timeout=30)
    daemon.remove_pods()
    assert not systemctl("list-units", "--all", "--plain", "--no-legend", f"cri-shim-{pod[0]}.scope", unit)
    assert daemon.pids().supervisor


def test_out_of_memory(daemon: Daemon, busybox: str) -> None:
    """Scenario 48."""
    pod = daemon.run_pod()
    small = v1.LinuxContainerResources(memory_limit_in_bytes=16 * MIB, memory_swap_limit_in_bytes=16 * MIB)
    container = daemon.run(pod, busybox, "tail", "/dev/zero", resources=small)
    status = daemon.wait_exit(container, 60)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    daemon.remove_pods()


_DEVICES = """
try() { if "$@" >/dev/null 2>&1; then echo yes; else echo no; fi; }
[ -e /tmp/kmsg ] || mknod /tmp/kmsg c 1 11
echo $(try sh -c ': >/dev/null') $(try head -c 1 /dev/zero) $(try head -c 1 /dev/urandom) $(try sh -c ': </tmp/kmsg')
"""


def test_devices_survive_a_reload(daemon: Daemon, busybox: str) -> None:
    """Scenario 51: what is allowed stays allowed, and what is not does not become so."""
    pod = privileged_pod(daemon)
    container = daemon.run(pod, busybox, "sleep", "1000")
    privileged = daemon.run(pod, busybox, "sleep", "1000", security=v1.LinuxContainerSecurityContext(privileged=True))
    for reload in (False, True):
        if reload:
            systemctl("daemon-reload")
        assert daemon.exec(container, "sh", "-c", _DEVICES).stdout == b"yes yes yes no\n"
        assert daemon.exec(privileged, "sh", "-c", _DEVICES).stdout == b"yes yes yes yes\n"
    daemon.remove_pods()


def test_the_service_is_restarted(node: Node, registry: DockerRegistry) -> None:
    """``systemctl restart`` ends the daemon only: not the supervisor, which is in a scope of its own, and no container."""
    daemon = Daemon(node, driver="auto")
    service = Path(f"/run/systemd/system/crishim-test-{os.getpid()}.service")
    daemon.config.write_text(daemon.config.read_text().replace(f'runtime_cgroup = "{daemon.slice}.slice"', ""))
    service.write_text(
        f"[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nKillMode=process\nDelegate=yes\nTimeoutStartSec={_START}\n"
        f"Environment=PYTHONPATH={REPOSITORY} HOME=/root TMPDIR={os.environ.get('TMPDIR', '/tmp')}\n"
        f"ExecStart={' '.join(daemon.node.command(sys.executable, '-m', 'cri.cli', 'serve', '--config', str(daemon.config)))}\n"
        f"StandardOutput=append:{daemon.log}\nStandardError=append:{daemon.log}\n"
    )
    try:
        systemctl("daemon-reload")
        systemctl("start", service.name)
        daemon.connect()
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        config = builders.pod_config("svc", cgroup_parent="crishimsvc.slice", log_directory=str(daemon.logs / "svc"), host_network=True)
        pod = daemon.run_pod(config)
        container = daemon.run(pod, image, "sleep", "1000")
        before = _supervisors()
        systemctl("restart", service.name)
        daemon.connect()
        assert _supervisors() == before
        assert len(before) == 1
        assert daemon.container(container).state == v1.CONTAINER_RUNNING
        assert daemon.exec(container, "echo", "on").stdout == b"on\n"
        daemon.remove_pods()
    except BaseException:
        print(daemon.tail())
        raise
    finally:
        subprocess.run(["systemctl", "stop", service.name], check=False)
        service.unlink()
        for scope in systemctl("list-units", "--plain", "--no-legend", "cri-shim-runtime-*.scope").split("\n"):
            if scope and daemon.slice not in scope:
                systemctl("kill", "--signal=KILL", scope.split()[0])
        time.sleep(0.2)
        systemctl("daemon-reload")
        daemon.close()


def _supervisors() -> set[str]:
    """Processes of runtime scopes in system.slice, where a daemon puts its own by default."""
    found = set()
    for file in Path("/sys/fs/cgroup").glob("**/system.slice/cri-shim-runtime-*.scope/cgroup.procs"):
        for pid in file.read_text().split():
            if "supervisor" in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(pid)
    return found


