"""Devices of a request on the real kernel: what the container may do with them, directories of devices, links, and what is no device."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon

pytestmark = pytest.mark.cgroup
Pod = tuple[str, v1.PodSandboxConfig]
# Root may open it without any capability, and it is not among the devices that every container may use.
SOME = next(path for path in ("/dev/fuse", "/dev/net/tun", "/dev/loop-control") if Path(path).exists())
NUMBER = os.stat(SOME).st_rdev
MAJOR, MINOR = os.major(NUMBER), os.minor(NUMBER)


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def output(daemon: Daemon, pod: Pod, image: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, image, "sh", "-c", f"exec 2>/dev/null; {script}", **fields)
    daemon.wait_exit(container)
    return " ".join(line.split(" ", 3)[3] for line in daemon.log_text(container).splitlines())


@pytest.mark.parametrize(
    ("permissions", "may"),
    [("r", "read"), ("w", "write"), ("m", "make"), ("rw", "read write both"), ("rwm", "read write both make")],
)
def test_permissions(daemon: Daemon, pod: Pod, busybox: str, permissions: str, may: str) -> None:
    """Opening for reading, for writing, for both; making another node of it. Making is allowed for every device: opening is what counts."""
    device = v1.Device(host_path=SOME, container_path="/dev/some", permissions=permissions)
    script = (
        "(: < /dev/some) && echo read; (: >> /dev/some) && echo write; (: <> /dev/some) && echo both;"
        f"mknod /tmp/other c {MAJOR} {MINOR} && echo make"
    )
    assert output(daemon, pod, busybox, script, devices=[device]) == (may if "make" in may else f"{may} make")


def test_other_devices_stay_closed(daemon: Daemon, pod: Pod, busybox: str) -> None:
    script = f"mknod /tmp/some c {MAJOR} {MINOR} && echo made; (: < /tmp/some) && echo opened"
    assert output(daemon, pod, busybox, script) == "made"


def test_a_directory_is_walked(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    """As containerd: every device below it, under the container's path, with the host's mode and owner; nothing else in it."""
    (tmp_path / "deep").mkdir()
    for name, mode in (("one", 0o620), ("deep/two", 0o600)):
        os.mknod(tmp_path / name, stat.S_IFCHR | mode, NUMBER)
        os.chmod(tmp_path / name, mode)
    os.chown(tmp_path / "one", 3, 4)
    (tmp_path / "file").write_text("not a device")
    (tmp_path / "link").symlink_to("one")
    device = v1.Device(host_path=str(tmp_path), container_path="/dev/all", permissions="r")
    script = "cd /dev/all; find . -type c | sort; find . -type f; find . -type l; stat -c '%a %u %g' one"
    script += "; (: < deep/two) && echo ok; (: >> one) && echo no"
    assert output(daemon, pod, busybox, script, devices=[device]) == "./deep/two ./one 620 3 4 ok"


def test_a_link_leads_to_its_device(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "by-id").symlink_to(SOME)
    device = v1.Device(host_path=str(tmp_path / "by-id"), container_path="/dev/mine", permissions="rw")
    script = "stat -c '%F %t:%T' /dev/mine; (: < /dev/mine) && echo ok"
    assert output(daemon, pod, busybox, script, devices=[device]) == f"character special file {MAJOR:x}:{MINOR:x} ok"


def test_outside_of_dev(daemon: Daemon, pod: Pod, busybox: str) -> None:
    device = v1.Device(host_path=SOME, container_path="/opt/vendor/some", permissions="r")
    assert output(daemon, pod, busybox, "(: < /opt/vendor/some) && echo ok", devices=[device]) == "ok"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"host_path": "/dev/absent"}, "devices[0].host_path: '/dev/absent': No such file"),
        ({"host_path": "/etc/passwd"}, "devices[0].host_path: '/etc/passwd' is not a device"),
        ({"host_path": "/proc/self/net"}, "devices[0].host_path: '/proc/self/net' is not a device"),
        ({"host_path": "dev/fuse"}, "devices[0].host_path: 'dev/fuse' is not an absolute path"),
        ({"host_path": SOME, "container_path": "x"}, "devices[0].container_path: 'x'"),
        ({"host_path": SOME, "permissions": ""}, "devices[0].permissions: ''"),
        ({"host_path": SOME, "permissions": "rx"}, "devices[0].permissions: 'rx'"),
    ],
)
def test_refused(daemon: Daemon, pod: Pod, busybox: str, fields: dict[str, str], named: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        daemon.create(pod, busybox, "true", devices=[v1.Device(**{"permissions": "rwm", **fields})])
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in raised.value.details()
