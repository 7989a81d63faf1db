"""Read-only additional image stores: made by one daemon, used by another, on a read-only mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri import config
from cri.errors import FailedPrecondition, StartError
from cri.images.store import Images
from hack import images
from hack.images import Layer, assemble
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Node, running
from tests.registry import DockerRegistry, Fake, inside

pytestmark = pytest.mark.registry


@pytest.fixture
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture
async def stores(tmp_path: Path, in_node: None) -> Any:
    """A function that makes stores."""
    made = []

    def make(name: str, *shared: Path) -> Images:
        settings = config.Images(registry_dir=str(tmp_path), additional_stores=tuple(map(str, shared)))
        store = Images(tmp_path / name / "images", settings)
        store.load()
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


def listing(top: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for path in sorted(top.rglob("*")):
        facts = path.lstat()
        found.append((str(path), facts.st_mode, facts.st_mtime_ns, facts.st_ctime_ns))
    return found


async def test_used_in_place_and_never_changed(stores: Callable[..., Images], registry: DockerRegistry, tmp_path: Path) -> None:
    base = Layer().directory("d", 0o750, uid=9).file("d/base", "x").finish()
    one, two = assemble([base]), assemble([base, Layer().file("d/top", "y").finish()])  # "d" of the top is implied
    first = stores("first")
    ref = registry.push(one, "shared/one:v1")
    await first.pull(ref)
    await first.close()
    before = listing(first.root)

    store = stores("second", tmp_path / "first")
    found = store.get(ref)
    assert found is not None and found.id == one.id and found.pinned and [i.id for i in store.list()] == [one.id]
    assert store.get(one.id[7:20]) == found == store.get(found.repo_digests[0])
    assert store.details(found)["imageSpec"]["os"] == "linux" and list(store.snapshots.all()) == []
    with pytest.raises(FailedPrecondition, match=f"read-only store {first.root}"):
        await store.remove(ref)
    recipe = await store.prepare(found, "c" * 64)
    assert recipe.lower[:-1] == (str(first.root / "snapshots" / one_chain(found) / "fs"),)
    used = (await store.fs_info()).images.bytes

    with Fake() as fake:
        fake.add(two, "latest")
        pulled = await store.pull(f"{fake.host}/two")
        assert not any(two.layers[0].digest in path for _, path, _ in fake.seen), "the layer is there"
    top = Path(store.view(pulled).lower[0])
    assert str(store.root) in str(top) and store.view(pulled).lower[1] == recipe.lower[0]
    assert (top / "d").stat().st_mode & 0o777 == 0o750 and (top / "d").stat().st_uid == 9, "takes after the layer over there"
    assert 0 < (await store.fs_info()).images.bytes - used < 40_000
    assert {i.id for i in store.list()} == {one.id, two.id}

    other = registry.push(one, "shared/other:v1")
    assert set((await store.pull(other)).repo_tags) == {ref, other}
    assert not store.get(one.id).pinned  # type: ignore[union-attr]
    moved = registry.push(assemble([Layer().file("moved", "z").finish()]), "shared/one:v1")
    await store.pull(moved)
    assert store.get(ref).id != one.id and store.get(one.id).repo_tags == (other,), "a tag is at one image"  # type: ignore[union-attr]
    await store.remove(moved)
    assert store.get(ref).id == one.id, "the name over there counts again"  # type: ignore[union-attr]
    await store.remove(other)
    await store.release("c" * 64)
    await store.snapshots.settled()

    again = stores("second", tmp_path / "first" / "images")
    assert {i.id for i in again.list()} == {one.id, two.id} and again.snapshots.get(found.chain_ids[0]) is not None
    assert listing(first.root) == before
    without = stores("second")
    assert list(without.list()) == [], "what lost its layers is not listed"


def one_chain(image: Any) -> str:
    return image.chain_ids[0][7:]


async def test_stores_that_cannot_be_used(stores: Callable[..., Images], registry: DockerRegistry, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"images\.additional_stores: .*/absent: no such directory \(is it mounted\?\)"):
        stores("x", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartError, match="/empty: is not an image store"):
        stores("x", tmp_path / "empty")
    first = stores("first")
    refs = [registry.push(assemble([Layer().file("f", str(n)).finish()]), f"shared/damaged{n}:v1") for n in range(4)]
    made = [await first.pull(r) for r in refs]
    await first.close()
    (first.root / "documents" / made[0].manifest_digest[7:]).write_bytes(b"")
    (first.root / "snapshots" / made[1].chain_ids[0][7:]).rename(tmp_path / "gone")
    (first.root / "records" / f"{made[2].id[7:]}.json").write_bytes(b'{"image"')
    assert [i.id for i in stores("second", tmp_path / "first").list()] == [made[3].id]
    (first.root / "snapshots").chmod(0o777)
    with pytest.raises(StartError, match="snapshots: others than root can change it"):
        stores("third", tmp_path / "first")


def test_through_the_daemon_on_a_read_only_mount(node: Node, registry: DockerRegistry, tmp_path: Path) -> None:
    """A container, an image volume, and what the kubelet sees."""
    ref = registry.push(images.busybox(), "shared/busybox:v1")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with running(node) as first:
        image_id = first.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=ref)), timeout=30).image_ref
        subprocess.run(["mount", "--bind", first.root, mountpoint], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", mountpoint], check=True)
        try:
            with running(node, extra=f'[images]\nadditional_stores = ["{mountpoint}"]\n', subnets=("10.214.0.0/16",)) as second:
                with pytest.raises(OSError):
                    os.mkdir(mountpoint / "x")
                (listed,) = second.images.ListImages(v1.ListImagesRequest(), timeout=10).images
                assert listed.id == image_id and listed.pinned and listed.repo_tags == [ref]
                with pytest.raises(grpc.RpcError) as caught:
                    second.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=ref)), timeout=10)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                pod = second.run_pod(host_network=True)
                mount = v1.Mount(container_path="/volume", readonly=True, image=v1.ImageSpec(image=ref))
                container = second.run(pod, ref, "sh", "-c", "echo written > /file && cat /file && ls /volume/bin/sh", mounts=(mount,))
                assert second.wait_exit(container).exit_code == 0
                assert "written" in second.log_text(container) and "/volume/bin/sh" in second.log_text(container)
                second.restart()
                assert second.container(container).state == v1.CONTAINER_EXITED
                second.remove_pods()
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=True)
