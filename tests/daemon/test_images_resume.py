"""Pulls that are cut short, and how much of them is fetched again: in one store, by the next store, by a daemon that was killed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import config
from cri.errors import CriError
from cri.images import partials
from cri.images.store import Images
from hack.images import Assembled, Layer, assemble
from shim.errors import Failure
from tests.daemon.harness import Node
from tests.registry import Fake, Metered, inside

MIB = 1 << 20


@pytest.fixture(autouse=True)
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


def opened(directory: Path) -> Images:
    store = Images(directory, config.Images(progress_timeout=config.Seconds(3)))
    store.load()
    return store


def random_layers(count: int, size: int) -> Assembled:
    return assemble([Layer().file(f"f{n}", os.urandom(size)).finish() for n in range(count)], level=1)


def total(image: Assembled) -> int:
    return sum(layer.size for layer in image.layers)


def names(store: Images, directory: str) -> list[str]:
    return sorted(p.name for p in (store.root / directory).iterdir())


@pytest.mark.parametrize("layers, size", [(1, 32 * MIB), (10, 2 * MIB)])
async def test_cut_at_90_percent_by_the_registry(tmp_path: Path, layers: int, size: int) -> None:
    """The registry goes away; the next pull is made by another store, as after a restart."""
    image = random_layers(layers, size)
    metered = Metered(budget=total(image) * 9 // 10)
    with Fake(hook=metered) as fake:
        fake.add(image, "latest")
        store = opened(tmp_path / "images")
        with pytest.raises(CriError, match="blob"):
            await store.pull(f"{fake.host}/r")
        await store.close()
        first, metered.budget, metered.served = metered.served, None, 0
        store = opened(tmp_path / "images")
        assert (await store.pull(f"{fake.host}/r")).id == image.id
        assert first > total(image) * 0.8 and metered.served < total(image) * 0.15, (first, metered.served, total(image))
        await store.snapshots.settled()
        assert names(store, "partials") == names(store, "ingest") == []
        (lower, *_) = store.snapshots.view(store.get(image.id).chain_ids).lower  # type: ignore[union-attr]
        assert os.listdir(lower) == [f"f{layers - 1}"]
        await store.close()


async def test_cut_by_the_client(tmp_path: Path) -> None:
    """Cancelled while the registry stalls; the same store goes on."""
    image = random_layers(1, 8 * MIB)
    metered = Metered(budget=total(image) * 9 // 10, stall=True)
    with Fake(hook=metered) as fake:
        fake.add(image, "latest")
        store = opened(tmp_path / "images")
        pull = asyncio.ensure_future(store.pull(f"{fake.host}/r"))
        while metered.budget or sum(p.to_json()["fetched"] for p in store.pulls.progress()) < total(image) * 0.86:
            await asyncio.sleep(0.02)
        pull.cancel()
        await asyncio.wait([pull])
        metered.budget, metered.served = None, 0
        assert (await store.pull(f"{fake.host}/r")).id == image.id
        assert metered.served < total(image) * 0.15
        await store.close()


@pytest.mark.parametrize("damage", ["flipped", "longer"])
async def test_a_partial_is_not_trusted(tmp_path: Path, damage: str) -> None:
    image = random_layers(1, 4 * MIB)
    metered = Metered(budget=total(image) // 2)
    with Fake(hook=metered) as fake:
        fake.add(image, "latest")
        store = opened(tmp_path / "images")
        with pytest.raises(CriError):
            await store.pull(f"{fake.host}/r")
        (blob,) = (tmp_path / "images/partials").glob("*.blob")
        assert (await store.fs_info()).images.bytes >= blob.stat().st_blocks * 512 > 0, "it counts as used"
        data = bytearray(blob.read_bytes())
        data[1000] ^= 1
        blob.write_bytes(data if damage == "flipped" else bytes(total(image) + 1))
        metered.budget = None
        assert (await store.pull(f"{fake.host}/r")).id == image.id, "the registry is not blamed for what the disk did"
        await store.close()


async def test_abandoned_partials_are_collected(tmp_path: Path) -> None:
    image = random_layers(2, 3 * MIB)
    metered = Metered(budget=total(image) * 3 // 4)
    with Fake(hook=metered) as fake:
        fake.add(image, "latest")
        store = opened(tmp_path / "images")
        with pytest.raises(CriError):
            await store.pull(f"{fake.host}/r")
        await store.close()
        (intent,) = (tmp_path / "images/partials").glob("*.json")
        (tmp_path / "images/partials/sha256-0.blob").write_bytes(b"of no pull")
        store = opened(tmp_path / "images")
        assert len(names(store, "partials")) >= 2 and "sha256-0.blob" not in names(store, "partials")
        old = time.time() - partials.LIFE - 10
        os.utime(intent, (old, old))
        store.pulls._expire()
        await store.snapshots.settled()
        assert names(store, "partials") == names(store, "ingest") == [] and names(store, "snapshots") == ["empty"]
        await store.close()


async def test_a_full_disk_takes_its_partials_along(tmp_path: Path) -> None:
    """Layers that fit are not kept either: the node needs the room more than the pull that cannot succeed."""
    image = random_layers(3, 3 * MIB)
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    assert os.system(f"mount -t tmpfs -o size=9m,mode=700 tmpfs {mountpoint}") == 0
    try:
        with Fake() as fake:
            fake.add(image, "latest")
            store = opened(mountpoint / "images")
            for _ in range(2):
                with pytest.raises(Failure, match="ENOSPC"):
                    await store.pull(f"{fake.host}/r")
                await store.snapshots.settled()
                assert names(store, "partials") == names(store, "ingest") == [] and names(store, "snapshots") == ["empty"]
            facts = os.statvfs(mountpoint)
            assert (facts.f_blocks - facts.f_bfree) * facts.f_frsize < MIB
            await store.close()
    finally:
        os.system(f"umount -l {mountpoint}")


async def test_the_same_blob_twice_at_once(tmp_path: Path) -> None:
    """In one image twice, and in two images on other layers: one of them keeps what it gets, none disturbs the other."""
    shared = Layer().file("shared", os.urandom(3 * MIB)).finish()
    one = assemble([Layer().file("a", "1").finish(), shared, shared])
    two = assemble([Layer().file("b", "2").finish(), shared])
    with Fake() as fake:
        fake.add(one, "one")
        fake.add(two, "two")
        store = opened(tmp_path / "images")
        got = await asyncio.gather(store.pull(f"{fake.host}/r:one"), store.pull(f"{fake.host}/r:two"))
        assert [g.id for g in got] == [one.id, two.id]
        await store.snapshots.settled()
        assert names(store, "partials") == []
        await store.close()


async def test_an_image_that_fits_without_its_partials(tmp_path: Path) -> None:
    """What is kept for a next pull must not be what this one fails for: tried again, it is not kept."""
    image = random_layers(1, 6 * MIB)
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    assert os.system(f"mount -t tmpfs -o size=9m,mode=700 tmpfs {mountpoint}") == 0
    try:
        with Fake() as fake:
            fake.add(image, "latest")
            store = opened(mountpoint / "images")
            with pytest.raises(Failure, match="ENOSPC"):
                await store.pull(f"{fake.host}/r")
            await store.snapshots.settled()
            assert (await store.pull(f"{fake.host}/r")).id == image.id
            await store.close()
    finally:
        os.system(f"umount -l {mountpoint}")
