"""SELinux labels on volumes: an attribute that any kernel keeps, so the walk is tested without SELinux (CVE-2021-43816)."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import relabel
from cri.errors import InvalidArgument
from protos.runtime.v1 import api_pb2 as v1

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def label(path: Path) -> str:
    try:
        return os.getxattr(path, "security.selinux", follow_symlinks=False).decode()
    except OSError:
        return ""


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """With a file, a directory, a link that leads out, a FIFO, a device, and another file system mounted below."""
    top = tmp_path / "volume"
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").touch()
    (tmp_path / "sentinel").mkdir()
    (tmp_path / "sentinel/file").touch()
    (top / "out").symlink_to(tmp_path / "sentinel")
    os.mkfifo(top / "a/fifo")
    os.mknod(top / "a/null", 0o600 | 0o020000, os.makedev(1, 3))
    (top / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(top / "mounted")], check=True)
    (top / "mounted/other").touch()
    yield top
    subprocess.run(["umount", str(top / "mounted")], check=True)


def test_everything_of_the_volume_and_nothing_else(volume: Path, tmp_path: Path) -> None:
    relabel.tree(str(volume), LABEL, "f")
    for inside in (".", "a", "a/b", "a/b/file", "out", "a/fifo", "a/null"):
        assert label(volume / inside) == LABEL, inside
    for outside in (tmp_path / "sentinel", tmp_path / "sentinel/file", volume / "mounted/other"):
        assert label(outside) == "", outside
    os.setxattr(volume / "a", "security.selinux", b"other")
    relabel.tree(str(volume), LABEL, "f")
    assert label(volume / "a") == LABEL


async def test_only_what_the_request_flags(volume: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    flagged = v1.Mount(host_path=str(volume), container_path="/b", selinux_relabel=True)
    await relabel.volumes([v1.Mount(host_path=str(other), container_path="/a"), flagged], LABEL)
    assert (label(volume), label(other)) == (LABEL, "")


@pytest.mark.parametrize("path", ["/", "/etc", "/usr/", "/var/lib/../../etc"])
async def test_what_the_host_lives_on_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="may not be relabelled") as caught:
        await relabel.volumes([v1.Mount(host_path=path, container_path="/x", selinux_relabel=True)], LABEL)
    assert caught.value.field == "config.mounts[0].selinux_relabel"


def test_a_link_to_what_the_host_lives_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(InvalidArgument, match="'/etc' may not be relabelled"):
        relabel.tree(str(tmp_path / "link"), LABEL, "f")
    assert label(Path("/etc")) == "" or label(Path("/etc")) != LABEL


@pytest.mark.race
def test_a_directory_that_somebody_swaps(tmp_path: Path) -> None:
    volume, sentinel = tmp_path / "volume", tmp_path / "sentinel"
    (volume / "dir").mkdir(parents=True)
    (volume / "dir/file").touch()
    sentinel.mkdir()
    (sentinel / "file").touch()
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(volume / "dir", volume / "away")
            os.symlink(sentinel, volume / "dir")
            os.unlink(volume / "dir")
            os.rename(volume / "away", volume / "dir")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for i in range(400):
            relabel.tree(str(volume), f"{LABEL}{i}", "f")
    finally:
        done.set()
        thread.join()
    assert label(sentinel) == label(sentinel / "file") == ""


def test_a_deep_tree_needs_few_descriptors_beside_its_depth(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / f"d{i}").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    relabel.tree(str(tmp_path), LABEL, "f")
    assert len(os.listdir("/proc/self/fd")) == before
    assert label(tmp_path / "d1999") == LABEL
