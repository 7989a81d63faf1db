"""Hostile layers, pulled by the daemon: SCENARIOS 55; ATTACKS "Images and registries" and the unpack row of "Denial of service".

Each layer is refused with an error, or lands inside its own directory; a sentinel outside it must not change, nothing half done may
stay, and the daemon must answer."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hack.images import Assembled, Layer, assemble, digest_of
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, wait_for
from tests.registry import Fake

UP = "../" * 12
REFUSED, CONTAINED = "refused", "contained"


def pull(daemon: Daemon, node: Node, image: Assembled, seconds: float = 60) -> str | grpc.RpcError:
    """The image id, or the error."""
    with Fake(netns=node.netns) as fake:
        fake.add(image, "latest")
        try:
            request = v1.PullImageRequest(image=v1.ImageSpec(image=f"{fake.host}/hostile"))
            return str(daemon.images.PullImage(request, timeout=seconds).image_ref)
        except grpc.RpcError as error:
            return error


def lowers(daemon: Daemon) -> list[Path]:
    return [p / "fs" for p in (daemon.root / "images/snapshots").iterdir() if p.name != "empty"]


def nothing_left(daemon: Daemon) -> bool:
    return not [*(daemon.root / "images/ingest").iterdir(), *(daemon.root / "images/trash").iterdir()]


@pytest.fixture(autouse=True)
def tidy(daemon: Daemon) -> object:
    yield
    for image in daemon.images.ListImages(v1.ListImagesRequest(), timeout=20).images:
        daemon.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=image.id)), timeout=20)
    wait_for("abandoned layers to go", lambda: nothing_left(daemon), 30)
    return None


# Each makes a layer out of the sentinel's path.
CORPUS: dict[str, tuple[str, Callable[[str], Layer]]] = {
    "absolute name": (CONTAINED, lambda s: Layer().file(f"{s}/secret", "pwned")),
    "name that climbs": (CONTAINED, lambda s: Layer().file(f"{UP}{s}/secret", "pwned")),
    "name that climbs in the middle": (CONTAINED, lambda s: Layer().directory("a").file(f"a/{UP}{s}/secret", "pwned")),
    "symlink to a directory, then through it": (CONTAINED, lambda s: Layer().symlink("l", s).file("l/secret", "pwned")),
    "symlink that climbs, then through it": (CONTAINED, lambda s: Layer().symlink("l", UP + s).file("l/secret", "pwned")),
    "symlink to a file, then over it": (CONTAINED, lambda s: Layer().symlink("l", f"{s}/secret").file("l", "pwned")),
    "chain of symlinks": (CONTAINED, lambda s: Layer().symlink("a", "b").symlink("b", "c").symlink("c", s).file("a/secret", "pwned")),
    "directory swapped for a symlink": (CONTAINED, lambda s: Layer().directory("d").symlink("d", s).file("d/secret", "pwned")),
    "symlink to /proc": (CONTAINED, lambda s: Layer().symlink("p", "/proc/self/root").file(f"p{s}/secret", "pwned")),
    "hard link to the host": (REFUSED, lambda s: Layer().hardlink("h", f"{s}/secret")),
    "hard link that climbs": (REFUSED, lambda s: Layer().hardlink("h", f"{UP}{s}/secret")),
    "hard link through a symlink": (REFUSED, lambda s: Layer().symlink("l", s).hardlink("h", "l/secret").file("h", "pwned")),
    "hard link to a symlink": (CONTAINED, lambda s: Layer().symlink("l", f"{s}/secret").hardlink("h", "l").file("h", "pwned")),
    "whiteout through a symlink": (CONTAINED, lambda s: Layer().symlink("l", s).file("l/.wh.secret")),
    "opaque mark through a symlink": (CONTAINED, lambda s: Layer().symlink("l", s).opaque("l")),
    "whiteout of the parent": (REFUSED, lambda s: Layer().file(".wh..")),
    "whiteout of all": (REFUSED, lambda s: Layer().file("d/.wh.")),
    "mode of a symlink's target": (CONTAINED, lambda s: Layer().symlink("l", s).directory("l", 0o777)),
    "attributes of a symlink's target": (
        CONTAINED,
        lambda s: Layer().symlink("l", f"{s}/secret").file("l", "x", pax_headers={"SCHILY.xattr.user.owned": "1"}),
    ),
    "device": (CONTAINED, lambda s: Layer().entry("mem", tarfile.CHRTYPE, devmajor=1, devminor=1).file("mem", "pwned")),
    "FIFO, then written to": (CONTAINED, lambda s: Layer().entry("fifo", tarfile.FIFOTYPE).file("fifo", "x")),
    "root as a symlink": (CONTAINED, lambda s: Layer().symlink(".", s).symlink("/", s).file("secret", "pwned")),
    "PAX path": (CONTAINED, lambda s: Layer().file("x", "pwned", pax_headers={"path": f"{UP}{s}/secret"})),
    "PAX linkpath": (REFUSED, lambda s: Layer().entry("x", tarfile.LNKTYPE, pax_headers={"linkpath": f"{s}/secret"})),
    "PAX linkpath with NUL": (REFUSED, lambda s: Layer().entry("x", tarfile.SYMTYPE, pax_headers={"linkpath": f"a\0{s}"})),
    "name without end": (REFUSED, lambda s: Layer().file("n" * 5000, "x")),
    "owner beyond 32 bits": (REFUSED, lambda s: Layer().file("x", "x", pax_headers={"uid": "4294967296"})),
    "unknown member": (REFUSED, lambda s: Layer().entry("x", b"Z")),
}


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(daemon: Daemon, node: Node, sentinel: Path, name: str) -> None:
    expected, make = CORPUS[name]
    mode = stat.S_IMODE(sentinel.stat().st_mode)
    outcome = pull(daemon, node, assemble([make(str(sentinel)).finish()]))
    assert (CONTAINED if isinstance(outcome, str) else REFUSED) == expected, outcome
    if not isinstance(outcome, str):
        assert outcome.code() == grpc.StatusCode.UNKNOWN or outcome.code() == grpc.StatusCode.INTERNAL, outcome
        assert "unpack layer" in str(outcome.details())
    assert stat.S_IMODE(sentinel.stat().st_mode) == mode and not os.listxattr(sentinel) and not os.listxattr(sentinel / "secret")


@pytest.mark.parametrize("kind", ["gnu", "raw"])
def test_names_that_are_not_utf8(daemon: Daemon, node: Node, kind: str) -> None:
    layer = Layer()
    layer._tar.format = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.USTAR_FORMAT
    layer._tar.errors = "surrogateescape"
    layer._tar.encoding = "utf-8"
    layer.file(os.fsdecode(b"caf\xe9"), "x").symlink(os.fsdecode(b"\xff\xfe"), os.fsdecode(b"to\xe9"))
    assert isinstance(pull(daemon, node, assemble([layer.finish()])), str)
    found = [os.listdir(os.fsencode(lower)) for lower in lowers(daemon)]
    assert [b"caf\xe9", b"\xff\xfe"] in [sorted(f) for f in found]


def test_overlay_attributes_are_dropped(daemon: Daemon, node: Node, sentinel: Path) -> None:
    """A redirect would make overlayfs show a directory of the host."""
    names = (
        "trusted.overlay.redirect",
        "trusted.overlay.opaque",
        "trusted.overlay.metacopy",
        "user.overlay.redirect",
        "user.overlay.opaque",
    )
    headers = {f"SCHILY.xattr.{name}": str(sentinel) for name in (*names, "security.selinux", "security.ima", "system.posix_acl_access")}
    layer = Layer().directory("d", pax_headers=headers).file("d/f", "x", pax_headers={**headers, "SCHILY.xattr.user.kept": "1"})
    assert isinstance(pull(daemon, node, assemble([layer.finish()])), str)
    (lower,) = lowers(daemon)
    assert os.listxattr(lower / "d") == [] and os.listxattr(lower / "d/f") == ["user.kept"]


def test_directories_are_private(daemon: Daemon, node: Node) -> None:
    """CVE-2021-41103: setuid programs of an image must not be reachable for users of the host."""
    assert isinstance(pull(daemon, node, assemble([Layer().file("su", "x", 0o4755).finish()])), str)
    for directory in (daemon.root / "images", daemon.root / "images/snapshots", daemon.root / "images/partials"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# -- denial of service ------------------------------------------------------------------------------------------------------


def raw(archive: bytes) -> Assembled:
    return assemble([archive], compression="gzip", level=1)


def pax_of(size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "archive, message",
    [
        (pax_of(8 << 30) + bytes(1024), "extended header of 8589934592"),
        (pax_of((1 << 20) + 1) + b"9" * (2 << 20), "extended header of"),
        (Layer().file("s", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 60)}).finish(), "sparse file of"),
        (
            Layer()
            .file(
                "s",
                b"99999999\n" + b"1\n" * 600_000,
                pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"},
            )
            .finish(),
            "sparse map",
        ),
    ],
    ids=["PAX header of 8 GiB", "PAX header over the limit", "sparse file of an exbibyte", "sparse map without end"],
)
def test_what_an_archive_may_not_ask_for(daemon: Daemon, node: Node, archive: bytes, message: str) -> None:
    outcome = pull(daemon, node, raw(archive))
    assert isinstance(outcome, grpc.RpcError) and message in str(outcome.details())


def test_a_bomb_is_stopped(daemon: Daemon, node: Node) -> None:
    """1.5 GiB of zeros behind the archive, in 1.6 MB: nothing of it is written, and reading it ends at the limit."""
    zeros = gzip.compress(bytes(64 << 20), 9)
    image = assemble([Layer().file("f", "x").finish()], compression="none")
    bomb = gzip.compress(Layer().file("f", "x").finish()) + zeros * 24
    layer = image.layers[0]
    blobs = {digest: data for digest, data in image.blobs.items() if digest != layer.digest}
    document = image.manifest.replace(layer.digest.encode(), digest_of(bomb).encode(), 1)
    document = document.replace(f'"size": {layer.size}'.encode(), f'"size": {len(bomb)}'.encode(), 1)
    before = time.monotonic()
    outcome = pull(daemon, node, Assembled(image.media_type, document, {**blobs, digest_of(bomb): bomb}))
    assert isinstance(outcome, grpc.RpcError) and "unpacks to more than" in str(outcome.details())
    assert time.monotonic() - before < 40


def test_deep_whiteouts_take_linear_time(daemon: Daemon, node: Node) -> None:
    """Four times the members may cost eight times as much on a busy machine; quadratic would be sixteen, and seconds."""
    deep = "/".join("d" * 150)

    def seconds(count: int) -> float:
        layer = Layer()
        for n in range(count):
            layer.file(f"{deep}/{n}/.wh.x").file(f"{deep}/{n % 7}/.wh..wh..opq").directory(f"{deep}/{n % 5}").file(
                f"{deep}/{n % 5}", "file"
            )
        image = raw(layer.finish())
        began = time.monotonic()
        outcome = pull(daemon, node, image)
        assert isinstance(outcome, str), outcome
        return time.monotonic() - began

    once = min(seconds(100), seconds(101))
    assert seconds(400) < max(8 * once, 6)
