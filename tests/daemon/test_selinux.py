"""SELinux labels on a kernel that has them, with a small policy of our own (checkpolicy compiles it)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hack.node import Node
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon
from tests.daemon.selinux_policy import source
from tests.registry import DockerRegistry

pytestmark = pytest.mark.selinux

Context = v1.LinuxContainerSecurityContext
Option = v1.SELinuxOption
CURRENT = "cat /proc/self/attr/current | tr -d '\\0'"


@pytest.fixture(scope="module")
def labelled(node: Node, registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    """A daemon that was started with the policy in force; and an image."""
    if shutil.which("checkpolicy") is None:
        pytest.skip("Debian's checkpolicy is not installed")
    directory = tmp_path_factory.mktemp("policy")
    (directory / "policy.conf").write_text(source())
    version = min(33, int(Path("/sys/fs/selinux/policyvers").read_text()))
    command = ["checkpolicy", "-M", "-U", "allow", "-c", str(version), "-o", str(directory / "policy"), str(directory / "policy.conf")]
    subprocess.run(command, check=True, capture_output=True)
    Path("/sys/fs/selinux/load").write_bytes((directory / "policy").read_bytes())
    contexts = Path("/etc/selinux/mine/contexts")
    contexts.mkdir(parents=True, exist_ok=True)
    Path("/etc/selinux/config").write_text("SELINUX=permissive\nSELINUXTYPE=mine\n")
    (contexts / "lxc_contexts").write_text('process = "system_u:system_r:container_t:s0"\nfile = "system_u:object_r:container_file_t:s0"\n')
    daemon = Daemon(node)
    try:
        daemon.start(180)  # this runs in an emulated machine, perhaps on a busy one
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=180)
        yield daemon, image
    finally:
        daemon.close()


def label(path: Path) -> str:
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


@pytest.mark.parametrize("shared", [False, True], ids=["own-pids", "shared-pids"])
def test_labels_of_processes_and_files(labelled: tuple[Daemon, str], tmp_path: Path, shared: bool) -> None:
    daemon, image = labelled
    volume = Path("/run/tmp") if Path("/run/tmp").is_dir() else tmp_path  # on tmpfs in the machine, which keeps labels
    volume = volume / f"volume-{shared}"
    (volume / "below").mkdir(parents=True)
    pod = daemon.run_pod(shared_pid=shared)
    mounts = (v1.Mount(container_path="/vol", host_path=str(volume), selinux_relabel=True),)
    script = f"{CURRENT}; echo; touch /x /dev/shm/y /dev/z; sleep 1000"
    container = daemon.run(pod, image, "sh", "-c", script, mounts=mounts)
    while not (log := daemon.log_text(container)):
        assert daemon.container(container).state == v1.CONTAINER_RUNNING
    own = log.split(" F ", 1)[1].strip()
    level = re.fullmatch(r"system_u:system_r:container_t:(s0:c[0-9]+,c[0-9]+)", own)
    assert level is not None, own
    assert daemon.exec(container, "sh", "-c", CURRENT).stdout.decode() == own
    wanted = f"system_u:object_r:container_file_t:{level[1]}"
    assert label(volume) == label(volume / "below") == wanted
    pid = int(daemon.exec(container, "sh", "-c", "echo $PPID").stdout or 0)  # of the namespace
    assert pid >= 0
    root = Path(f"/proc/{_pid(daemon, container)}/root")
    for path in ("x", "dev/shm/y", "dev/z", "etc/hosts", "etc/resolv.conf"):
        assert label(root / path) == wanted, path
    other = daemon.run(daemon.run_pod(), image, "sh", "-c", f"{CURRENT}; echo; sleep 1000")
    assert daemon.exec(other, "sh", "-c", CURRENT).stdout.decode() != own, "each pod has a level of its own"


def _pid(daemon: Daemon, container: str) -> int:
    import json

    request = v1.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(daemon.runtime.ContainerStatus(request, timeout=10).info["info"])["pid"])


def test_what_the_request_says(labelled: tuple[Daemon, str]) -> None:
    daemon, image = labelled
    pod = daemon.run_pod()
    context = Context(selinux_options=Option(type="spc_t", level="s0:c7,c9"), no_new_privs=True)
    container = daemon.run(pod, image, "sh", "-c", "sleep 1000", security=context)
    assert daemon.exec(container, "sh", "-c", CURRENT).stdout == b"system_u:system_r:spc_t:s0:c7,c9"
    with pytest.raises(grpc.RpcError, match="selinux"):
        daemon.run(pod, image, "true", security=Context(selinux_options=Option(type="nobody_knows_t")))
    with pytest.raises(grpc.RpcError, match="selinux_relabel"):
        daemon.run(pod, image, "true", mounts=(v1.Mount(container_path="/vol", host_path="/etc", selinux_relabel=True),))
