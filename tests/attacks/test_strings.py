"""Strings of requests and images that become lines, paths, parameters or settings (ATTACKS.md, "Untrusted strings")."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack.images import Layer
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.conftest import climbing
from tests.attacks.test_mounts import output
from tests.daemon.builders import unique
from tests.daemon.harness import Daemon, Node, running
from tests.registry import DockerRegistry

Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as failed:
        call()
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT, failed.value
    return failed.value.details() or ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
        ("net.ipv4.ip_forward", "1\nkernel.core_pattern=x"),
        ("net.ipv4.ip_forward", ""),
        ("kernel.core_pattern", "|/evil"),
        ("net.ipv4/../../kernel/core_pattern", "x"),
        ("net/../kernel/core_pattern", "x"),
        ("kernel/shm_rmid_forced/../core_pattern", "x"),
        ("fs.mqueue.", "1"),
        ("vm.swappiness", "1"),
    ],
)
def test_sysctls(daemon: Daemon, name: str, value: str) -> None:
    """CVE-2022-0811: a separator in a value sets another parameter; and names that leave their namespace."""
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    assert "sysctls" in refused(lambda: daemon.run_pod(sysctls={name: value}))
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


@pytest.mark.parametrize(
    ("fields", "sysctl"),
    [({"host_network": True}, ("net.ipv4.ip_unprivileged_port_start", "0")), ({"host_ipc": True}, ("kernel.shmmax", "4096"))],
)
def test_sysctls_of_the_hosts_namespaces(daemon: Daemon, fields: dict[str, Any], sysctl: tuple[str, str]) -> None:
    """CVE-2022-0532."""
    file = Path("/proc/sys") / sysctl[0].replace(".", "/")
    before = file.read_text()
    assert "sysctls" in refused(lambda: daemon.run_pod(sysctls=dict([sysctl]), **fields))
    assert file.read_text() == before


EVIL = "evil:x:0:0::/:/bin/sh"


@pytest.mark.parametrize("place", ["HOME", "working_dir", "hostname", "user", "image HOME", "image WorkingDir", "image User", "name"])
def test_newlines(daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str, place: str) -> None:
    """CVE-2022-4318, 2026-15809: nothing that becomes part of a line may hold the end of one."""
    bad = f"/x\n{EVIL}"
    calls: dict[str, Callable[[], object]] = {
        "HOME": lambda: daemon.create(pod, busybox, "true", env={"HOME": bad}),
        "working_dir": lambda: daemon.create(pod, busybox, "true", working_dir=bad),
        "hostname": lambda: daemon.run_pod(hostname=f"a\n127.0.0.1 {EVIL}"),
        "user": lambda: daemon.create(pod, busybox, "true", security=v1.LinuxContainerSecurityContext(run_as_username=f"0\n{EVIL}")),
        "image HOME": lambda: daemon.create(pod, image(Env=[f"HOME={bad}"]), "true"),
        "image WorkingDir": lambda: daemon.create(pod, image(WorkingDir=bad), "true"),
        "image User": lambda: daemon.create(pod, image(User=f"1\n{EVIL}"), "true"),
        "name": lambda: daemon.run_pod(daemon.pod_config("evil\nINFO forged")),
    }
    refused(calls[place])


@pytest.mark.parametrize("field", ["servers", "searches", "options"])
def test_newlines_in_dns(daemon: Daemon, field: str) -> None:
    """CVE-2022-4318: of /etc/resolv.conf."""
    dns = v1.DNSConfig(**{field: ["10.0.0.1\nnameserver 6.6.6.6"]})
    assert f"dns_config.{field}" in refused(lambda: daemon.run_pod(daemon.pod_config(dns_config=dns)))


def test_annotations_are_passed_by_exact_name(node: Node, registry: DockerRegistry, image: Callable[..., str]) -> None:
    """CVE-2023-6476, 2024-3154: one that only begins like an allowed name, or that sets properties of systemd, goes nowhere; and
    CVE-2026-53488: neither do an image's labels."""
    import json

    with running(node, extra='[runtime.handlers.""]\ncontainer_annotations = ["io.allowed"]\n') as daemon:
        labels = {"io.allowed": "from the image", "io.kubernetes.cri-o.userns-mode": "auto", "com.example/privileged": "true"}
        reference = image_of(daemon, image(Labels=labels))
        annotations = {
            "io.allowed": "yes", "io.allowed.more": "no", "io.allowed/x": "no",
            "org.systemd.property.ExecStopPost": "['/evil']", "io.kubernetes.cri-o.Devices": "/dev/sda:rwm",
        }  # fmt: skip
        config = daemon.pod_config(annotations={"org.systemd.property.CPUQuota": "1", "io.allowed": "of the pod"})
        pod = daemon.run_pod(config)
        container = daemon.create(pod, reference, "true", annotations=annotations)
        request = v1.ContainerStatusRequest(container_id=container, verbose=True)
        spec = json.loads(daemon.runtime.ContainerStatus(request, timeout=10).info["info"])["runtimeSpec"]
        found = {k: v for k, v in spec["annotations"].items() if not k.startswith("io.kubernetes.cri.")}
        assert found == {"io.allowed": "yes"}
        assert not spec["linux"].get("devices")


def image_of(daemon: Daemon, reference: str) -> str:
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    return reference


@pytest.mark.parametrize("name", ["../../../../evil", "a/../../../../evil", "..", "x/..", "\0", "evil\n"])
def test_log_paths(daemon: Daemon, pod: Pod, busybox: str, name: str) -> None:
    """CVE-2025-0750: a log that would be written elsewhere."""
    for path in (name, f"/{name}"):
        assert "log_path" in refused(lambda p=path: daemon.create(pod, busybox, "true", log_path=p))
    if name != "evil\n":
        assert "log_directory" in refused(lambda: daemon.run_pod(log_directory=f"/tmp/{name}"))


@pytest.mark.parametrize("link", ["directory", "file", "later"])
def test_links_in_the_log_directory(daemon: Daemon, busybox: str, sentinel: Path, link: str) -> None:
    """CVE-2025-0750, 2024-9341: somebody who may write to a pod's log directory (a hostPath volume) leaves links there. Nothing is
    written, made or cut off where they lead."""
    pod = daemon.run_pod()
    directory = Path(pod[1].log_directory)
    directory.mkdir()
    if link == "directory":
        (directory / "c").symlink_to(sentinel)
    elif link == "file":
        (directory / "c").mkdir()
        (directory / "c" / "0.log").symlink_to(sentinel / "secret")
    name = "c/0.log"
    try:
        container = daemon.run(pod, busybox, "sh", "-c", "while :; do echo x; sleep 0.05; done", log_path=name)
    except grpc.RpcError:
        assert link != "later"
        return
    assert link == "later", "a log was opened through a link"
    os.rename(directory / "c", directory / "before")
    (directory / "c").symlink_to(sentinel)
    with pytest.raises(grpc.RpcError):
        daemon.runtime.ReopenContainerLog(v1.ReopenContainerLogRequest(container_id=container), timeout=10)
    daemon.kill_stdio()  # its successor opens the log by its path
    daemon.exec(container, "true")
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod[0]), timeout=20)


@pytest.mark.parametrize("where", ["etc/hosts", "etc/resolv.conf", "etc/hostname", "etc"])
def test_our_files_in_an_image_of_links(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path, where: str) -> None:
    """CVE-2024-5154, 2024-9341: /etc/hosts and its like are put where the image has links."""
    layer = Layer().whiteout(where) if where == "etc" else Layer()
    reference = image(layer, Layer().symlink(where, climbing(sentinel if where == "etc" else sentinel / "new" / "file")))
    try:
        text = output(daemon, pod, reference, "cat /etc/hosts")
    except grpc.RpcError as error:
        text = error.details() or ""
    assert "host-secret" not in text


@pytest.mark.parametrize("field", ["name", "namespace", "uid", "handler", "cgroup_parent", "container name"])
@pytest.mark.parametrize("value", ["../../evil", "a/b\0c", "/abs/../../evil"])
def test_names_are_no_paths(daemon: Daemon, pod: Pod, busybox: str, field: str, value: str) -> None:
    """CVE-2025-0750: of pods and containers."""
    before = set(os.listdir(daemon.directory)), set(os.listdir(daemon.state)), set(os.listdir("/"))
    try:
        if field == "handler":
            request = v1.RunPodSandboxRequest(config=daemon.pod_config(), runtime_handler=value)
            daemon.runtime.RunPodSandbox(request, timeout=10)
        elif field == "container name":
            daemon.create(pod, busybox, "true", name=value, log_path="x.log")
        else:
            daemon.run_pod(**{"log_directory": str(daemon.logs / unique()), field: value})
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert field in ("name", "namespace", "uid", "container name"), "this one is a path"
    assert (set(os.listdir(daemon.directory)), set(os.listdir(daemon.state)), set(os.listdir("/"))) == before
