"""The unpack helper on a real file system: what a layer becomes, and that it stays inside its directory."""

import asyncio
import os
import stat
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from cri.images.unpack import Limits, Unpacked, Unpacker
from hack.images import Layer, compress, digest_of
from shim.errors import Failure

T = TypeVar("T")


async def helped(work: Callable[[Unpacker], Awaitable[T]]) -> T:
    unpacker = await Unpacker.start()
    try:
        return await work(unpacker)
    finally:
        await unpacker.close()


async def feed(unpacker: Unpacker, directory: Path, blob: bytes, limits: Limits) -> Unpacked:
    feed = await unpacker.unpack(directory, len(blob), "sha256", limits)
    try:
        await feed.write(blob)
    finally:
        feed.close()
    return await feed.done


def apply(directory: Path, blob: bytes, limits: Limits | None = None) -> Unpacked:
    directory.mkdir(exist_ok=True)
    return asyncio.run(asyncio.wait_for(helped(lambda u: feed(u, directory, blob, limits or Limits())), 60))


@pytest.mark.parametrize("how", ["none", "gzip", "zstd"])
def test_compressions_and_diff_id(tmp_path: Path, how: str) -> None:
    data = Layer().directory("d").file("d/f", b"x" * 3_000_000).finish()
    blob = compress(data, how)  # type: ignore[arg-type]
    result = apply(tmp_path / "l", blob)
    assert result.diff_id == digest_of(data) and result.archive == len(data)
    assert (tmp_path / "l/d/f").stat().st_size == 3_000_000
    assert result.inodes == 2 and result.bytes >= 3_000_000


def test_members_and_frames_in_a_row(tmp_path: Path) -> None:
    data = Layer().file("f", os.urandom(100_000)).finish()
    for how in ("gzip", "zstd"):
        halves = compress(data[:50_000], how) + compress(data[50_000:], how)  # type: ignore[arg-type]
        assert apply(tmp_path / how, halves).diff_id == digest_of(data)


def test_metadata(tmp_path: Path) -> None:
    root = tmp_path / "l"
    capability = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep
    layer = Layer().directory("./", 0o751, uid=7, gid=8, mtime=1_600_000_000)
    layer.directory("sticky", 0o1777, mtime=1_500_000_000).file("sticky/later", "x")
    layer.file("setuid", "x", 0o6755, uid=1000, gid=2000, mtime=1_400_000_000)
    layer.file(
        "capable", "x", 0o755, uid=1, pax_headers={"SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")}
    )
    layer.file(
        "attributes",
        "x",
        pax_headers={f"SCHILY.xattr.{n}": "v" for n in ("user.mine", "user.overlay.opaque", "trusted.overlay.opaque", "security.selinux")},
    )
    layer.symlink("link", "/etc/shadow", uid=5, mtime=1_300_000_000).hardlink("hard", "setuid")
    layer.entry("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3).entry("pipe", tarfile.FIFOTYPE, mode=0o620)
    result = apply(root, layer.finish())

    facts = {n: os.lstat(root / n) for n in os.listdir(root)}
    assert (facts["setuid"].st_mode & 0o7777, facts["setuid"].st_uid, facts["setuid"].st_gid, facts["setuid"].st_mtime) == (
        0o6755,
        1000,
        2000,
        1.4e9,
    )
    assert facts["hard"].st_ino == facts["setuid"].st_ino
    assert (facts["sticky"].st_mode & 0o7777, facts["sticky"].st_mtime) == (0o1777, 1.5e9), "children do not change the directory's time"
    assert (root.stat().st_mode & 0o7777, root.stat().st_uid, root.stat().st_mtime) == (0o751, 7, 1.6e9)
    assert os.readlink(root / "link") == "/etc/shadow" and (facts["link"].st_uid, facts["link"].st_mtime) == (5, 1.3e9)
    assert stat.S_ISCHR(facts["null"].st_mode) and facts["null"].st_rdev == os.makedev(1, 3) and facts["null"].st_mode & 0o777 == 0o666
    assert stat.S_ISFIFO(facts["pipe"].st_mode) and facts["pipe"].st_mode & 0o777 == 0o620
    assert os.getxattr(root / "capable", "security.capability") == capability
    assert os.listxattr(root / "attributes") == ["user.mine"] and result.dropped == 3
    assert result.implicit == 0, "the archive has an entry for every directory"


def test_names_of_all_kinds(tmp_path: Path) -> None:
    long = "d/" * 60 + "n" * 200
    layer = Layer().file(long, "long").file("n\udce9n-utf8", "x").file("new\nline", "x").file("a/./b//c", "x").file(".hidden", "x")
    apply(tmp_path / "l", layer.finish())
    assert (tmp_path / "l" / long).read_text() == "long"
    assert (
        (tmp_path / "l/a/b/c").exists()
        and (tmp_path / "l/new\nline").exists()
        and os.path.exists(os.fsencode(tmp_path / "l") + b"/n\xe9n-utf8")
    )


def test_whiteouts_become_what_overlayfs_reads(tmp_path: Path) -> None:
    layer = Layer().whiteout("gone").directory("d").whiteout("d/below").directory("o").opaque("o").file("o/new", "x")
    layer.whiteout("again").directory("again").file("again/inside", "x")
    layer.directory("before").file("before/x", "x").whiteout("before")
    layer.file("kept", "new").whiteout("kept")
    layer.file(".wh..wh.plnk/1.2", "aufs").opaque("implied/deep")
    apply(tmp_path / "l", layer.finish())
    root = tmp_path / "l"
    for name in ("gone", "d/below"):
        facts = os.lstat(root / name)
        assert stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0
    opaque = [n for n in ("d", "o", "again", "before", "implied", "implied/deep") if "trusted.overlay.opaque" in os.listxattr(root / n)]
    assert opaque == ["o", "again", "before", "implied/deep"]
    assert (root / "kept").read_text() == "new"
    assert not [n for n in os.listdir(root) if n.startswith(".wh")]


def test_many_opaque_directories(tmp_path: Path) -> None:
    layer = Layer()
    for n in range(1200):
        layer.opaque(f"d{n}")
    apply(tmp_path / "l", layer.finish())
    assert all(os.getxattr(tmp_path / f"l/d{n}", "trusted.overlay.opaque") == b"y" for n in range(1200))


def test_implied_directories_take_after_the_layers_below(tmp_path: Path) -> None:
    """A tar with ``etc/app/x`` and no entry for ``etc/app`` must not turn the lower one into root's 0755."""
    snapshots = tmp_path / "snapshots"
    for name, mode in (("bottom", 0o700), ("middle", 0o2770)):
        (snapshots / name / "fs/etc/app").mkdir(parents=True)
        os.chown(snapshots / name / "fs/etc/app", 10, 20)
        (snapshots / name / "fs/etc/app").chmod(mode)
    (snapshots / "bottom/fs/link").symlink_to("/etc")
    top = tmp_path / "top"
    top.mkdir()

    async def work(unpacker: Unpacker) -> None:
        feed = await unpacker.unpack(top, 1, "sha256", Limits())
        await feed.write(Layer().file("etc/app/x", "x").file("link/y", "y").file("fresh/z", "z").finish())
        feed.close()
        assert (await feed.done).implicit == 5, "etc, etc/app, link, fresh and the root itself"
        await unpacker.settle(feed.number, top, snapshots, ["middle", "bottom"])

    asyncio.run(helped(work))
    facts = (top / "etc/app").stat()
    assert (facts.st_mode & 0o7777, facts.st_uid, facts.st_gid) == (0o2770, 10, 20)
    assert (top / "link").stat().st_mode & 0o7777 == 0o755 and (top / "fresh").stat().st_mode & 0o7777 == 0o755


def sentinel(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    return outside


def test_nothing_leaves_the_directory(tmp_path: Path) -> None:
    """CVE-2021-32760 and the tar classics: .., absolute names, symlinked parents, hard links to host files."""
    outside = sentinel(tmp_path)
    before = {p: p.lstat().st_ctime_ns for p in (outside, outside / "secret")}
    layer = Layer().file("../outside/dotdot", "x").file(f"{outside}/absolute", "x").file("a/../../../outside/deep", "x")
    layer.symlink("escape", str(outside)).file("escape/through", "x").symlink("up", "../../../..").file(f"up{outside}/up", "x")
    layer.directory("replaced").file("replaced/x", "x").symlink("replaced", str(outside)).file("replaced/after", "x")
    layer.symlink("abs", str(outside / "secret")).file("abs", "overwritten", 0o777, uid=1)
    layer.directory("escape2").symlink("escape2", str(outside)).directory("escape2", 0o777, uid=1234)
    layer.whiteout("escape/secret")
    apply(tmp_path / "l", layer.finish())
    assert sorted(os.listdir(outside)) == ["secret"]
    assert {p: p.lstat().st_ctime_ns for p in before} == before
    assert (tmp_path / "l/abs").read_text() == "overwritten"


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside/secret", "missing"])
def test_hard_links_find_only_the_layer(tmp_path: Path, target: str) -> None:
    sentinel(tmp_path)
    with pytest.raises(Failure, match="not in this layer"):
        apply(tmp_path / "l", Layer().hardlink("h", target).finish())


def test_a_hard_link_through_a_symlink_does_not_reach_the_host(tmp_path: Path) -> None:
    outside = sentinel(tmp_path)
    with pytest.raises(Failure):
        apply(tmp_path / "l", Layer().symlink("s", str(outside)).hardlink("h", "s/secret").finish())
    assert (outside / "secret").stat().st_nlink == 1


@pytest.mark.parametrize(
    "blob, message",
    [
        (b"not an archive at all".ljust(2000), "checksum"),
        (compress(Layer().file("f", os.urandom(100_000)).finish(), "gzip")[:-200], "EOF|end"),
        (compress(os.urandom(1000), "gzip"), "checksum|header"),
        (Layer().file(".wh..", "x").finish(), "whiteout of nothing"),
        (Layer().file("x" * 300, "x").finish(), "ENAMETOOLONG"),
    ],
)
def test_damaged_layers_are_refused(tmp_path: Path, blob: bytes, message: str) -> None:
    with pytest.raises(Failure, match=message):
        apply(tmp_path / "l", blob)


@pytest.mark.parametrize(
    "blob, limits, message",
    [
        (compress(Layer().file("zeros", bytes(64 << 20)).finish(), "gzip"), Limits(free=1 << 20, ratio=10), "unpacks to more than"),
        (compress(Layer().file("zeros", bytes(64 << 20)).finish(), "zstd"), Limits(free=1 << 20, ratio=10), "unpacks to more than"),
        (Layer().file("/".join("d" * 500), "x").finish(), Limits(entries=100), "more than 100 entries"),
        (
            Layer().file("s", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 62), "GNU.sparse.name": "s"}).finish(),
            Limits(),
            "sparse file of",
        ),
    ],
)
def test_bombs(tmp_path: Path, blob: bytes, limits: Limits, message: str) -> None:
    with pytest.raises(Failure, match=message):
        apply(tmp_path / "l", blob, limits)


def test_replacing_a_tree_over_and_over_takes_linear_time(tmp_path: Path) -> None:
    layer = Layer()
    for n in range(3000):
        layer.file(f"d/{n % 7}/x", "x").file("d", "file")
        layer.directory(f"known/{n}")
    apply(tmp_path / "l", layer.finish())
    assert (tmp_path / "l/d").read_bytes() == b"file"


async def confined(helper: int) -> int:
    """The helper's child, once it has given everything up."""
    for _ in range(500):
        for child in Path(f"/proc/{helper}/task/{helper}/children").read_text().split():
            if "NoNewPrivs:\t1" in Path(f"/proc/{child}/status").read_text():
                await asyncio.sleep(0.05)
                return int(child)
        await asyncio.sleep(0.01)
    raise AssertionError("no confined child")


def test_the_child_has_nothing_worth_having(tmp_path: Path) -> None:
    """No network, no environment, no capabilities beyond file metadata, no root but the layer, no way to fork or to gain privileges."""

    async def work(unpacker: Unpacker) -> None:
        feed = await unpacker.unpack(tmp_path, 1 << 20, "sha256", Limits())
        helper = unpacker._process.pid
        child = await confined(helper)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines() if ":\t" in line)
        expected = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31
        assert all(int(status[k], 16) == expected for k in ("CapEff", "CapPrm", "CapBnd"))
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0 and status["NoNewPrivs"].strip() == "1"
        assert os.listdir(f"/proc/{child}/root") == []
        assert os.stat(f"/proc/{child}/root").st_ino == tmp_path.stat().st_ino
        assert Path(f"/proc/{child}/environ").read_bytes() == b""
        assert os.readlink(f"/proc/{child}/ns/net") != os.readlink("/proc/self/ns/net")
        assert len(os.listdir(f"/proc/{child}/fd")) <= 5, "std streams, the pipe and the socket to the helper"
        limits = Path(f"/proc/{child}/limits").read_text()
        assert "Max processes             0" in limits and "Max core file size        0" in limits
        mounts = Path(f"/proc/{child}/mountinfo").read_text().splitlines()
        assert len(mounts) == 1 and all(o in mounts[0] for o in ("nosuid", "nodev", "noexec"))
        feed.close()

    asyncio.run(helped(work))


def test_a_dead_helper_is_an_error_not_a_hang(tmp_path: Path) -> None:
    async def work(unpacker: Unpacker) -> None:
        feed = await unpacker.unpack(tmp_path, 1, "sha256", Limits())
        os.kill(unpacker._process.pid, 9)
        with pytest.raises(Failure, match="ended early"):
            await asyncio.wait_for(feed.done, 10)
        feed.close()

    asyncio.run(helped(work))
