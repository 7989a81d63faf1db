"""Images and volumes that try to have a mount, a node or a directory land somewhere else (ATTACKS.md, "Mounts and procfs").

Each case has a sentinel directory on the host that must stay as it is. The loops are bounded in time; each iteration makes a whole root
while another process exchanges the target with a symlink.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.linux import path as paths
from shim.oci.spec import Device, Linux, Mount
from tests.kernel.rootbox import DEV, NAMESPACES, PROC, USUAL, Box, swapping

SECONDS = 2.0  # of racing, or a little more on a machine that is too busy for a handful of rounds in that time
ROUNDS = 12


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    path = tmp_path / "sentinel"
    path.mkdir()
    (path / "keep").write_text("mine")
    return path


def untouched(sentinel: Path) -> bool:
    return os.listdir(sentinel) == ["keep"] and (sentinel / "keep").read_text() == "mine"


def climbing(target: Path) -> str:
    """A relative symlink that would reach ``target`` from anywhere, were it not clamped to the root."""
    return "../" * 20 + str(target).lstrip("/")


def replace_by_link(box: Box, name: str, target: str) -> None:
    (box.image / name).rmdir()
    os.symlink(target, box.image / name)


@pytest.mark.mount
@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
@pytest.mark.parametrize("how", ["climbing", "absolute", "sibling"])
def test_images_with_a_symlink_there_are_rejected(box: Box, sentinel: Path, name: str, how: str) -> None:
    """CVE-2019-19921, 2023-27561, 2023-28642 (/proc, /sys), CVE-2026-41579, 2026-47766 (/dev)."""
    target = {"climbing": climbing(sentinel), "absolute": str(sentinel), "sibling": "tmp"}[how]
    replace_by_link(box, name, target)
    with pytest.raises(Failure, match="other than a directory") as caught:
        box.run(linux=Linux(namespaces=NAMESPACES, devices=(Device("/dev/fuse", "c", 10, 229),)))
    assert caught.value.path == f"/{name}"
    assert untouched(sentinel)


@pytest.mark.mount
def test_a_file_for_dev_is_rejected(box: Box) -> None:
    (box.image / "dev").rmdir()
    (box.image / "dev").write_text("")
    with pytest.raises(Failure, match="other than a directory"):
        box.run()


@pytest.mark.mount
def test_nothing_in_the_images_dev_counts(box: Box, sentinel: Path) -> None:
    """CVE-2025-31133, 2025-52565: /dev/null or /dev/pts as symlinks."""
    os.symlink("/proc/sys/kernel/core_pattern", box.image / "dev/null")
    os.symlink(climbing(sentinel), box.image / "dev/pts")
    os.symlink(climbing(sentinel), box.image / "dev/shm")
    masked = Linux(namespaces=NAMESPACES, masked_paths=("/proc/keys",))
    result = box.run("stat -c %t:%T /dev/null /proc/keys; stat -f -c %T /dev/pts", linux=masked)
    assert result.lines[:2] == ["1:3", "1:3"]
    assert untouched(sentinel)


@pytest.mark.mount
@pytest.mark.parametrize("link", ["/proc", "/proc/sys", "/sys", "/sys/kernel"])
def test_targets_that_lead_into_proc_or_sys_are_rejected(box: Box, tmp_path: Path, link: str) -> None:
    """CVE-2019-16884: a volume over /proc by way of a link makes labels and sysctls land in fake files."""
    os.symlink(link, box.image / "data")
    (tmp_path / "volume").mkdir()
    with pytest.raises(Failure, match="leads into"):
        box.run(mounts=(*USUAL, Mount("/data", "bind", str(tmp_path / "volume"), ("rbind",))))


@pytest.mark.mount
def test_a_node_outside_dev_lands_in_the_image(box: Box, sentinel: Path) -> None:
    os.symlink(climbing(sentinel), box.image / "opt")
    linux = Linux(namespaces=NAMESPACES, devices=(Device("/opt/node", "c", 1, 3), Device("/opt/a/b", "c", 1, 3)))
    box.run(linux=linux)
    assert untouched(sentinel)


@pytest.mark.mount
@pytest.mark.parametrize("cwd", ["/proc/self/fd/3", "/proc/self/root/x", "/proc/1/cwd"])
def test_a_working_directory_through_a_magic_link_is_rejected(box: Box, cwd: str) -> None:
    """CVE-2024-21626."""
    with pytest.raises(Failure, match="mkdir /proc"):
        box.run(cwd=cwd)


@pytest.mark.mount
def test_a_fifo_as_target_blocks_nobody(box: Box, tmp_path: Path) -> None:
    os.mkfifo(box.image / "etc/hosts")
    (tmp_path / "hosts").write_text("h")
    assert box.run("cat /etc/hosts", (*USUAL, Mount("/etc/hosts", "bind", str(tmp_path / "hosts"), ("bind",)))).out == "h"


@pytest.mark.race
@pytest.mark.parametrize("target", ["climbing", "proc", "dangling"])
def test_a_mount_into_a_volume_that_somebody_swaps(box: Box, sentinel: Path, target: str) -> None:
    """CVE-2021-30465: the target lies in a volume shared with a running container, which exchanges it with a symlink."""
    volume, source = box.base / "volume", box.base / "source"
    (volume / "target").mkdir(parents=True)
    source.mkdir()
    (source / "evil").touch()
    mounts = (
        *USUAL,
        Mount("/data", "bind", str(volume), ("rbind",)),
        Mount("/data/target", "bind", str(source), ("rbind",)),
    )
    link = {"climbing": climbing(sentinel), "proc": "/proc", "dangling": climbing(sentinel / "new")}[target]
    script = "stat -f -c %T /proc /sys; cat /proc/self/mountinfo"
    made = refused = 0
    end = time.monotonic() + SECONDS
    with swapping(volume, "target", link):
        while time.monotonic() < end or made + refused < ROUNDS:
            try:
                lines = box.run(script, mounts).lines
            except Failure as failure:
                if failure.path not in ("/data/target", "/proc", "/sys"):
                    raise
                refused += 1
                continue
            made += 1
            assert lines[:2] == ["proc", "sysfs"]
            assert not [line for line in lines[2:] if "sentinel" in line.split()[4] and not line.split()[4].startswith("/tmp")]
            assert untouched(sentinel)
    assert untouched(sentinel)


@pytest.mark.race
def test_directories_made_in_a_volume_that_somebody_swaps(box: Box, sentinel: Path) -> None:
    """CVE-2024-45310: mkdir -p through the race makes directories and files on the host."""
    volume = box.base / "volume"
    (volume / "part").mkdir(parents=True)
    end, rounds = time.monotonic() + SECONDS, 0
    root = os.open(volume, os.O_PATH | os.O_DIRECTORY)
    try:
        with swapping(volume, "part", climbing(sentinel)):
            while time.monotonic() < end:
                for make in (paths.mkdir_all_in_root, paths.create_file_in_root):
                    rounds += 1
                    try:
                        fd = make(root, f"/part/{rounds}/x")
                    except OSError:
                        continue
                    where = os.readlink(f"/proc/self/fd/{fd}")
                    os.close(fd)
                    assert where.startswith(f"{volume}/")
    finally:
        os.close(root)
    assert rounds > ROUNDS
    assert untouched(sentinel)


@pytest.mark.race
def test_a_copy_out_of_a_directory_that_somebody_swaps(box: Box, sentinel: Path) -> None:
    """CVE-2018-15664, 2026-41568: copy-up while the source changes. The loop copies what is, never what a link leads to."""
    from shim.rootfs import copyup

    source = box.base / "source"
    (source / "part").mkdir(parents=True)
    (source / "part/file").write_text("ours")
    end, rounds = time.monotonic() + SECONDS, 0
    from_ = os.open(source, os.O_PATH | os.O_DIRECTORY)
    with swapping(source, "part", str(sentinel)):
        while time.monotonic() < end:
            rounds += 1
            target = box.base / f"copy{rounds}"
            target.mkdir()
            into = os.open(target, os.O_PATH | os.O_DIRECTORY)
            try:
                copyup.copy_into_empty(from_, into)
            except OSError:
                pass
            finally:
                os.close(into)
            assert not list(target.rglob("keep")) or any(p.is_symlink() for p in target.iterdir())
            assert not [p for p in target.iterdir() if not p.is_symlink() and (p / "keep").exists()]
    os.close(from_)
    assert rounds > ROUNDS


@pytest.mark.mount
def test_dev_is_the_only_file_system_needed(box: Box) -> None:
    """A specification with nothing but /proc still gets a /dev of ours."""
    assert box.run("stat -f -c %T /dev; echo > /dev/null", (PROC,)).lines == ["tmpfs"]
    assert box.run("ls /dev/null", (DEV,)).lines == ["/dev/null"]
