"""Bind mounts of a container: targets, options, propagation, id mapping."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.linux import mount as m
from shim.oci.spec import IDMapping, Mount
from tests.kernel.rootbox import PROC, USUAL, Box, file_system, kernel, shared_tmpfs, wait_until

pytestmark = pytest.mark.mount


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    (path / "file").write_text("host")
    return path


def bind(source: Path, destination: str = "/data", *options: str) -> Mount:
    return Mount(destination, "bind", str(source), options or ("rbind", "rprivate"))


def options_of(lines: list[str], where: str) -> set[str]:
    return set(next(line.split()[5] for line in lines if line.split()[4] == where).split(","))


# ---- targets


def test_a_directory_on_a_missing_target(box: Box, volume: Path) -> None:
    result = box.run("cat /made/for/it/file; touch /made/for/it/new; stat -c %a /made/for", (*USUAL, bind(volume, "/made/for/it")))
    assert result.out == "host755\n"
    assert (volume / "new").exists()


def test_a_file_on_a_missing_target(box: Box, volume: Path) -> None:
    result = box.run("cat /etc/deep/hosts; echo container > /etc/deep/hosts", (*USUAL, bind(volume / "file", "/etc/deep/hosts")))
    assert result.out == "host"
    assert (volume / "file").read_text() == "container\n"
    assert (box.upper / "etc/deep/hosts").read_text() == ""


def test_a_file_over_a_file_and_below_dev(box: Box, volume: Path) -> None:
    (box.image / "etc/hosts").write_text("image")
    mounts = (*USUAL, bind(volume / "file", "/etc/hosts"), bind(volume / "file", "/dev/termination-log"))
    assert box.run("cat /etc/hosts /dev/termination-log", mounts).out == "hosthost"
    assert (box.image / "etc/hosts").read_text() == "image"


def test_through_the_images_symlinks(box: Box, volume: Path) -> None:
    os.symlink("/run", box.image / "var")  # dangling in the image
    os.symlink("../../../../../../srv", box.image / "up")
    mounts = (*USUAL, bind(volume, "/var/secrets"), bind(volume, "/up/there"))
    assert box.run("ls /run/secrets/file /srv/there/file", mounts).lines == ["/run/secrets/file", "/srv/there/file"]


@pytest.mark.parametrize(
    "source, destination, why",
    [("file", "/dir", "the source is a file"), ("", "/bin/busybox", "not a directory"), ("file", "/bin/sh/x", "not a")],
)
def test_a_file_and_a_directory_do_not_fit(box: Box, volume: Path, source: str, destination: str, why: str) -> None:
    (box.image / "dir").mkdir()
    with pytest.raises(Failure, match=why) as caught:
        box.run(mounts=(*USUAL, bind(volume / source, destination)))
    assert caught.value.path == destination


def test_a_missing_source_is_named(box: Box) -> None:
    with pytest.raises(Failure, match="mount source /does/not/exist: ENOENT"):
        box.run(mounts=(*USUAL, bind(Path("/does/not/exist"))))


def test_a_device_and_a_socket(box: Box, volume: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(volume / "sock"))
        mounts = (*USUAL, bind(volume / "sock", "/run/app.sock"), bind(Path("/dev/zero"), "/srv/zero"))
        assert box.run("stat -c %F /run/app.sock /srv/zero", mounts).lines == ["socket", "character special file"]


# ---- options


def test_read_only_and_flags(box: Box, volume: Path) -> None:
    mounts = (*USUAL, bind(volume, "/data", "rbind", "ro", "nosuid", "nodev", "noexec", "noatime"))
    result = box.run("touch /data/x; cat /proc/self/mountinfo", mounts)
    assert "Read-only file system" in result.out
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= options_of(result.lines[1:], "/data")


def _with_submount(volume: Path) -> Callable[[], None]:
    (volume / "sub").mkdir()

    def before() -> None:
        shared_tmpfs(volume / "sub", m.MS_PRIVATE)

    return before


def test_ro_is_the_top_mount_only_and_rro_all(box: Box, volume: Path) -> None:
    before = _with_submount(volume)
    script = "touch /data/x; touch /data/sub/x && echo sub"
    top = box.run(script, (*USUAL, bind(volume, "/data", "rbind", "ro")), before=before)
    assert (top.out.count("Read-only"), top.lines[-1]) == (1, "sub")
    everything = box.run(script, (*USUAL, bind(volume, "/data", "rbind", "rro")), before=before)
    assert everything.out.count("Read-only") == 2


def test_bind_alone_leaves_what_is_mounted_below(box: Box, volume: Path) -> None:
    before = _with_submount(volume)
    (volume / "sub/under").touch()
    script = "ls /data/sub"
    assert box.run(script, (*USUAL, bind(volume, "/data", "bind")), before=before).lines == ["under"]
    assert box.run(script, (*USUAL, bind(volume, "/data", "rbind")), before=before).lines == []


def test_idmapped_volume(box: Box, volume: Path) -> None:
    """On disk root, in the container the mapped id: what a pod with a user namespace sees as its own root."""
    if kernel() < (6, 3) and file_system(volume) == m.TMPFS_MAGIC:
        pytest.skip("an idmapped tmpfs needs Linux 6.3")
    ids = (IDMapping(0, 70000, 1000),)
    mount = Mount("/data", "bind", str(volume), ("rbind",), ids, ids)
    assert box.run("stat -c %u:%g /data/file", (*USUAL, mount)).out == "70000:70000\n"


# ---- propagation


def _mount_below(volume: Path) -> None:
    """The host mounts something into the volume, then says so through a file on the volume itself."""
    shared_tmpfs(volume / "sub", m.MS_PRIVATE)
    (volume / "sub/late").touch()


def _host_to_container(box: Box, volume: Path, propagation: str) -> str:
    """What a container sees of a mount that the host makes while it runs."""
    (volume / "sub").mkdir(exist_ok=True)

    def before() -> None:
        shared_tmpfs(volume)
        (volume / "sub").mkdir()

    def during() -> None:
        wait_until((volume / "up").exists)
        _mount_below(volume)
        (volume / "go").touch()

    script = "touch /data/up; until [ -e /data/go ]; do usleep 2000; done; ls /data/sub"
    return box.run(script, (*USUAL, bind(volume, "/data", "rbind", propagation)), before=before, during=during).out


def test_rslave_brings_the_hosts_later_mounts(box: Box, volume: Path) -> None:
    assert _host_to_container(box, volume, "rslave") == "late\n"


def test_rshared_brings_them_too(box: Box, volume: Path) -> None:
    assert _host_to_container(box, volume, "rshared") == "late\n"


def test_rprivate_does_not(box: Box, volume: Path) -> None:
    assert _host_to_container(box, volume, "rprivate") == ""


@pytest.mark.parametrize("propagation, seen", [("rshared", "late"), ("rslave", ""), ("rprivate", "")])
def test_container_to_host(box: Box, volume: Path, propagation: str, seen: str) -> None:
    def before() -> None:
        shared_tmpfs(volume)
        (volume / "sub").mkdir()

    def after() -> str:
        return " ".join(os.listdir(volume / "sub"))

    script = "mount -t tmpfs x /data/sub && touch /data/sub/late"
    result = box.run(script, (*USUAL, bind(volume, "/data", "rbind", propagation)), before=before, after=after)
    assert (result.code, result.host) == (0, seen)


@pytest.mark.parametrize("propagation", ["rshared", "rslave"])
def test_propagation_without_peers_is_an_error(box: Box, volume: Path, propagation: str) -> None:
    with pytest.raises(Failure, match=r"shared mount|slave mount"):
        box.run(mounts=(*USUAL, bind(volume, "/data", "rbind", propagation)))


def test_a_private_volume_on_a_shared_mount_leaves_no_peer(box: Box, volume: Path) -> None:
    lines = box.run("cat /proc/self/mountinfo", (PROC, bind(volume)), before=lambda: shared_tmpfs(volume)).lines
    data = next(line for line in lines if line.split()[4] == "/data")
    assert "shared:" not in data
    assert "master:" not in data


def test_a_disk_is_found_on_the_host(box: Box, tmp_path: Path) -> None:
    """Its source means the host's file, whatever the image has under that name."""
    if not Path("/sys/fs/ext4").exists() or not Path("/sbin/mke2fs").exists():
        pytest.skip("no ext4 or mke2fs here")
    import subprocess

    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mke2fs", "-q", "-F", str(image)], check=True)
    loop = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if loop.returncode:
        pytest.skip(f"no loop devices: {loop.stderr.strip()}")
    device = loop.stdout.strip()
    try:
        mounts = (*USUAL, Mount("/disk", "ext4", device, ("noatime",)))
        assert box.run("ls /disk; stat -f -c %T /disk", mounts).lines == ["lost+found", "ext2/ext3"]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
