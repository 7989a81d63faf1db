"""Images and requests that want a mount, a node or a write to land somewhere else (ATTACKS.md, "Mounts and procfs"), without races."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hack.images import Layer
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.conftest import climbing
from tests.attacks.test_descriptors import mount
from tests.daemon.harness import Daemon

Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def output(daemon: Daemon, pod: Pod, image: str, script: str, **fields: object) -> str:
    container = daemon.run(pod, image, "sh", "-c", script, **fields)
    daemon.wait_exit(container)
    text = "".join(line.split(" ", 3)[3] for line in daemon.log_text(container).splitlines(keepends=True))
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    return text


def refused(daemon: Daemon, pod: Pod, image: str, **fields: object) -> str:
    with pytest.raises(grpc.RpcError) as failed:
        daemon.run(pod, image, "true", **fields)
    return failed.value.details() or ""


@pytest.mark.parametrize("volume", ["/proc", "/proc/self", "/sys", "/sys/kernel", "/dev", "/./proc/../proc"])
def test_a_volume_over_what_we_write_to(daemon: Daemon, pod: Pod, image: Callable[..., str], volume: str) -> None:
    """CVE-2019-16884, 2019-19921, 2023-27561: labels and sysctls would be written to the image's files."""
    assert "Volumes" in refused(daemon, pod, image(Volumes={volume: {}}))


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
@pytest.mark.parametrize("where", ["climbing", "inside"])
def test_proc_sys_or_dev_as_a_link(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path, name: str, where: str) -> None:
    """CVE-2019-19921, 2023-28642 (/proc and /sys), CVE-2026-41579, 2026-47766 (/dev): refused, and nothing is made at the link's end."""
    target = climbing(sentinel) if where == "climbing" else "tmp"
    reference = image(Layer().whiteout(name), Layer().symlink(name, target))
    assert f"/{name}" in refused(daemon, pod, reference)


@pytest.mark.parametrize("link", ["/proc", "/proc/sys/kernel", "/sys"])
def test_a_volume_whose_way_leads_into_proc(daemon: Daemon, pod: Pod, image: Callable[..., str], tmp_path: Path, link: str) -> None:
    """CVE-2019-16884, 2023-27561: by a link of the image."""
    reference = image(Layer().symlink("data", link))
    assert "leads into" in refused(daemon, pod, reference, mounts=(mount(tmp_path, "/data/x"), mount(tmp_path, "/data")))


def test_cgroups_are_read_only(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """CVE-2023-25809: nothing below /sys/fs/cgroup can be written to, nor made, nor mounted anew."""
    script = (
        "for f in $(find /sys/fs/cgroup -name cgroup.procs -o -name tasks -o -name release_agent -o -name notify_on_release); do "
        "echo 0 > $f && echo WRITTEN $f; done; "
        "for d in $(find /sys/fs/cgroup -type d -maxdepth 2); do mkdir $d/evil && echo MADE $d; done; "
        "mount -o remount,rw /sys/fs/cgroup && echo REMOUNTED; mount -t cgroup -o memory x /tmp && echo MOUNTED; "
        "echo FOUND $(find /sys/fs/cgroup | wc -l)"
    )
    text = output(daemon, pod, busybox, script)
    assert not {"WRITTEN", "MADE", "REMOUNTED", "MOUNTED"} & set(text.split()), text
    words = text.split()  # of two streams, in any order
    assert int(words[words.index("FOUND") + 1]) > 1


def test_devices_as_links(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path) -> None:
    """CVE-2025-31133, 2025-52565: /dev/null, /dev/console, /dev/pts and /dev/ptmx that lead to the host's parameters."""
    layer = Layer().symlink("dev/null", "/proc/sys/kernel/core_pattern").symlink("dev/console", climbing(sentinel / "secret"))
    layer.symlink("dev/ptmx", "/proc/sysrq-trigger").symlink("dev/shm", climbing(sentinel))
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    masked = v1.LinuxContainerSecurityContext(masked_paths=["/proc/keys"], readonly_paths=["/proc/sys"])
    masked.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)
    script = "stat -c %t:%T /dev/null /proc/keys; echo x > /proc/sys/kernel/core_pattern || echo kept"
    text = output(daemon, pod, image(layer), script, security=masked)
    assert text.split()[:2] == ["1:3", "1:3"] and "kept" in text, text
    tty = daemon.run(pod, image(layer), "sh", "-c", "stat -c %F /dev/console; echo done", tty=True, security=masked)
    daemon.wait_exit(tty)
    assert "character special file" in daemon.log_text(tty)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_masked_paths_that_are_links(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path) -> None:
    """CVE-2025-31133, 2025-52881: masking by a link of the image, which must not mount over anything of the host."""
    layer = Layer().symlink("masked", climbing(sentinel)).symlink("ro", climbing(sentinel / "secret"))
    security = v1.LinuxContainerSecurityContext(masked_paths=["/masked", "/proc/../masked"], readonly_paths=["/ro"])
    security.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)
    output(daemon, pod, image(layer), "ls -la /masked /ro", security=security)
    assert str(sentinel) not in Path("/proc/self/mounts").read_text()
    assert (sentinel / "secret").read_text().startswith("host-secret")


@pytest.mark.parametrize("what", ["link to a directory", "link to a file", "relative", "chain"])
def test_a_volume_that_is_a_link(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path, what: str) -> None:
    """CVE-2022-23648: a VOLUME at a link to the host's files would have them copied into the container."""
    layer = Layer()
    if what == "link to a directory":
        layer.symlink("v", str(sentinel))
    elif what == "link to a file":
        layer.symlink("v", str(sentinel / "secret"))
    elif what == "relative":
        layer.symlink("v", climbing(sentinel))
    else:
        layer.symlink("w", "/x/../.." + str(sentinel)).symlink("v", "w")
    reference = image(layer, Volumes={"/v": {}})
    try:
        text = output(daemon, pod, reference, "cat /v/secret /v; find / -name secret -xdev; mount | grep ' /v'")
    except grpc.RpcError as error:
        text = error.details() or ""
    assert "host-secret" not in text
    for volume in (daemon.root / "volumes").glob("*/*/*"):
        assert "host-secret" not in volume.read_text()


@pytest.mark.parametrize("part", ["link", "link/below", "../../../etc", "/etc", "a/../../link", "proc"])
def test_a_part_of_an_image_volume(
    daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str, sentinel: Path, part: str
) -> None:
    """CVE-2017-1002101, 2021-25741: a sub_path of an image volume is looked up inside the image, links and all. (Images do not change,
    so there is nothing to be swapped meanwhile.)"""
    content = image(Layer().symlink("link", climbing(sentinel)).directory("a").symlink("b", str(sentinel)))
    volume = v1.Mount(container_path="/x", image=v1.ImageSpec(image=content), image_sub_path=part, readonly=True)
    try:
        text = output(daemon, pod, busybox, "ls -a /x; cat /x/secret /x", mounts=(volume,))
    except grpc.RpcError as error:
        text = error.details() or ""
    assert "host-secret" not in text
    if part.startswith("../"):
        assert "x:0:0" not in text  # /etc/passwd of the host
