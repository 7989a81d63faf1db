"""Image volumes in the kernel: read-only views of layers, sub paths found inside the mount, whatever happens to the names."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci.bundle import IMAGE_VOLUME, Volume
from shim.oci.spec import IDMapping, Mount
from shim.rootfs import idmap, overlay, volumes
from tests.kernel.rootbox import USUAL, Box, Result

pytestmark = pytest.mark.mount
AT = "/vol"


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def layers(tmp_path: Path) -> tuple[str, ...]:
    """Two layers, topmost first: a file of each, a directory of both, links that point out of the image."""
    below, above = tmp_path / "below", tmp_path / "above"
    (below / "dir/deep").mkdir(parents=True)
    (below / "low").write_text("low")
    (below / "dir/one").write_text("one")
    (above / "dir").mkdir(parents=True)
    (above / "dir/two").write_text("two")
    (above / "tool").write_text("#!/bin/sh\necho ran\n")
    (above / "tool").chmod(0o4755)
    (above / "out").symlink_to("../../../../../../etc")
    (above / "inside").symlink_to("/dir")
    return str(above), str(below)


def show(box: Box, layers: tuple[str, ...], script: str, sub_path: str = "", mount: Mount | None = None, **options: object) -> Result:
    recipe = replace(box.recipe(), volumes=(Volume(AT, layers, sub_path),))
    mount = mount or Mount(AT, "image", "sha256:x", ("ro",))
    return box.run(script, (*USUAL, mount), recipe=recipe, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["newest", "older kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel can do with detached mounts: as here, and as before Linux 6.15."""
    if request.param != "newest":
        monkeypatch.setattr(overlay, "_PARSES_AT_ONCE", False)
        monkeypatch.setattr(overlay, "_DETACHED_LAYERS", False)
        monkeypatch.setattr(volumes.m, "clone_mount", _only_attached(volumes.m.clone_mount))


def _only_attached(clone: Callable[..., int]) -> Callable[..., int]:
    def refuse_detached(fd: int, *, recursive: bool = False) -> int:
        with open(f"/proc/self/fdinfo/{fd}") as info, open("/proc/self/mountinfo") as table:
            mount_id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
            if not any(line.startswith(f"{mount_id} ") for line in table):
                raise OSError(22, "detached")
        return clone(fd, recursive=recursive)

    return refuse_detached


@pytest.mark.usefixtures("way")
def test_the_image_read_only(box: Box, layers: tuple[str, ...]) -> None:
    script = "cat low dir/one dir/two; echo; ./tool; touch new; echo x > low; rm tool; mkdir dir/x"
    found = show(box, layers, f"cd {AT}; {script}; grep ' {AT} ' /proc/self/mountinfo")
    assert found.lines[:2] == ["lowonetwo", "ran"]
    assert found.out.count("Read-only file system") >= 3
    options = found.lines[-1].split()[5].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options) and "noexec" not in options


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("sub_path", "listing"), [("dir", "deep one two"), ("dir/deep", "*"), ("inside/./deep//", "*"), (".", "dir inside low out tool")]
)
def test_sub_path(box: Box, layers: tuple[str, ...], sub_path: str, listing: str) -> None:
    found = show(box, layers, f"cd {AT}; echo *; touch x", sub_path)
    assert found.lines[0] == listing
    assert "Read-only" in found.out


@pytest.mark.parametrize(
    ("sub_path", "why"),
    [
        ("absent", "does not exist"),
        ("dir/one", "is not a directory"),
        ("low/x", "not a directory"),
        ("out", "does not exist"),  # resolved inside the image, where there is no /etc
        ("../../../etc", "does not exist"),
    ],
)
def test_a_sub_path_that_is_none(box: Box, layers: tuple[str, ...], sub_path: str, why: str) -> None:
    with pytest.raises(Failure, match=why) as raised:
        show(box, layers, "true", sub_path)
    assert (raised.value.operation, raised.value.path) == (IMAGE_VOLUME, AT)


def test_one_layer_and_a_missing_one(box: Box, layers: tuple[str, ...], tmp_path: Path) -> None:
    assert show(box, layers[1:], f"ls {AT}/dir", "").lines == ["deep", "one"]
    assert show(box, layers[1:], f"ls {AT}", "dir").lines == ["deep", "one"]
    with pytest.raises(Failure, match="gone") as raised:
        show(box, (str(tmp_path / "gone"), *layers), "true")
    assert raised.value.operation == IMAGE_VOLUME


@pytest.mark.usefixtures("way")
def test_one_layer_on_an_empty_one(box: Box, layers: tuple[str, ...], tmp_path: Path) -> None:
    """What a single layer needs to have an SELinux label: a file system of its own. (No kernel here has SELinux to label it.)"""
    (tmp_path / "empty").mkdir()
    found = show(box, (layers[1], str(tmp_path / "empty")), f"ls {AT}; grep ' {AT} ' /proc/self/mountinfo; touch {AT}/x", "dir")
    assert found.lines[:2] == ["deep", "one"] and " overlay " in found.lines[2] and "Read-only" in found.out


@pytest.mark.usefixtures("way")
def test_several_volumes_of_the_containers_own_layers(box: Box, layers: tuple[str, ...]) -> None:
    root = replace(box.recipe(), lower=(str(box.image), *layers))
    shown = tuple(Volume(f"/v{i}", layers, sub) for i, sub in enumerate(("", "dir", "dir/deep", "")))
    mounts = tuple(Mount(v.destination, "image", "sha256:x", ("ro", "noexec")) for v in shown)
    found = box.run("cat /v0/low /v1/two /v3/low /low; ls /v2; /v0/tool", (*USUAL, *mounts), recipe=replace(root, volumes=shown))
    assert found.out.startswith("lowtwolowlow")
    assert "Permission denied" in found.out


@pytest.mark.usefixtures("way")
def test_mapped(box: Box, layers: tuple[str, ...], tmp_path: Path) -> None:
    """In a user namespace the image's ids are the container's."""
    ids = (IDMapping(0, 300000, 65536),)
    os.chown(tmp_path / "below/low", 7, 8)
    try:
        os.close(idmap.user_namespace((ids, ids)))
        fd = overlay.root_mount(replace(box.recipe(), upper="", work=""), idmap.user_namespace((ids, ids)))
    except Failure as failure:
        pytest.skip(f"cannot idmap here: {failure}")
    os.close(fd)
    for sub_path, path in (("", f"{AT}/low"), ("dir", AT)):
        mount = Mount(AT, "image", "sha256:x", ("ro",), ids, ids)
        found = show(box, layers, f"stat -c %u:%g {path}", sub_path, mount)
        assert found.out.strip() == ("300007:300008" if not sub_path else "300000:300000")


def test_places_that_show_no_image(box: Box, layers: tuple[str, ...]) -> None:
    for place in ("/proc", "/sys", "/dev", "/proc/self"):
        with pytest.raises(Failure, match="may not show an image"):
            recipe = replace(box.recipe(), volumes=(Volume(place, layers),))
            box.run("true", (Mount(place, "image", "x", ("ro",)),), recipe=recipe)
    with pytest.raises(Failure, match="recipe has no image"):
        box.run("true", (*USUAL, Mount(AT, "image", "x")))


@pytest.mark.race
def test_a_sub_path_swapped_while_it_is_mounted(box: Box, layers: tuple[str, ...], tmp_path: Path) -> None:
    """CVE-2017-1002101, CVE-2021-25741. Whoever could change an image while its sub path is mounted still reaches nothing outside."""
    sentinel = tmp_path / "sentinel"
    sentinel.mkdir()
    (sentinel / "secret").write_text("secret")
    real, link = Path(layers[1]) / "swap", Path(layers[1]) / "link"
    (real / "sub").mkdir(parents=True)
    (real / "sub/fine").write_text("fine")
    link.symlink_to(sentinel)
    (sentinel / "sub").mkdir()
    (sentinel / "sub/secret").write_text("secret")
    stop = threading.Event()
    swapped = [0]

    def swap() -> None:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
        while not stop.is_set():
            exchange(-100, os.fsencode(real), -100, os.fsencode(link), 2)
            swapped[0] += 1

    outcomes = {"fine": 0, "refused": 0}
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(60):
            for lowers in (layers[1:], layers):
                try:
                    found = show(box, lowers, f"ls {AT}", "swap/sub")
                except Failure as failure:
                    assert failure.operation == IMAGE_VOLUME
                    outcomes["refused"] += 1
                else:
                    assert "secret" not in found.out
                    outcomes["fine"] += 1
    finally:
        stop.set()
        thread.join()
    assert swapped[0] > 1000 and outcomes["fine"], (swapped, outcomes)
