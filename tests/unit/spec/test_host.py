"""The host's facts: parsing of mountinfo, bounded files, device discovery on the real /dev."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cri.spec import host

MOUNTINFO = """\
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
21 20 0:5 / /a rw shared:2 master:1 - tmpfs tmpfs rw
22 20 0:6 / /b rw master:3 - tmpfs tmpfs rw
23 20 0:7 / /c rw - tmpfs tmpfs rw
24 20 0:8 / /c\\040d rw shared:4 - tmpfs tmpfs rw
25 21 0:9 / /a/x rw unbindable - tmpfs tmpfs rw
26 20 0:9 / /b rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "shared"),
        ("/ab", "shared"),
        ("/a", "shared"),
        ("/a/y", "shared"),
        ("/a/x/z", "private"),
        ("/b", "private"),
        ("/c/q", "private"),
        ("/c d", "shared"),
    ],
)
def test_propagation(path: str, expected: str) -> None:
    assert host.propagation_in(MOUNTINFO, path) == expected


def test_propagation_of_a_slave() -> None:
    assert host.propagation_in(MOUNTINFO.rsplit("26 ", 1)[0], "/b") == "slave"


def test_propagation_of_this_machine() -> None:
    assert host.propagation("/proc/self") in ("shared", "slave", "private")


def test_files_are_regular_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    assert host.read_file(str(tmp_path / "f")) == b"x"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(b"")
    os.truncate(tmp_path / "big", (1 << 20) + 1)
    for name in ("fifo", "big"):
        with pytest.raises(OSError, match="not a regular file"):
            host.read_file(str(tmp_path / name))
    with pytest.raises(OSError, match="regular"):
        host.read_file("/dev/zero")
    with pytest.raises(FileNotFoundError):
        host.read_file(str(tmp_path / "none"))


def test_devices() -> None:
    (null,) = host.devices("/dev/null")
    assert (null.path, null.type, null.major, null.minor) == ("/dev/null", "c", 1, 3)
    found = {d.path for d in host.devices("/dev")}
    assert "/dev/null" in found
    assert not any(p.startswith(("/dev/pts/", "/dev/shm/")) for p in found)
    assert host.devices("/etc/hosts") == ()
    with pytest.raises(FileNotFoundError):
        host.devices("/dev/none")


def test_a_link_to_a_device_keeps_the_name_it_was_asked_by(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    assert host.devices(str(tmp_path / "link"))[0].path == str(tmp_path / "link")


def test_detect() -> None:
    facts = host.detect(cgroup_version=2, cgroup_driver="cgroupfs", controllers=frozenset({"hugetlb"}), swap=True)
    assert facts.kernel >= (5, 0)
    assert facts.hostname
    assert facts.hugetlb
    assert facts.capabilities[0] == "CAP_CHOWN"
    assert facts.recursive_read_only == (facts.kernel >= (5, 12))


def test_hugepage_sizes(tmp_path: Path) -> None:
    for kilobytes in (64, 2048, 32768, 1048576, 16777216):
        (tmp_path / f"hugepages-{kilobytes}kB").mkdir()
    assert host.hugepage_sizes(str(tmp_path)) == {"64KB", "2MB", "32MB", "1GB", "16GB"}
    assert host.hugepage_sizes(str(tmp_path / "none")) == frozenset()
