"""Pulls of artifacts against a registry that cuts connections, serves wrong bytes, or goes away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.errors import CriError
from cri.images.store import Images
from hack.images import artifact
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


def files_of(store: Images, image_id: str) -> dict[str, bytes]:
    image = store.get(image_id)
    assert image is not None
    (lower,) = map(Path, store.view(image).lower)
    return {str(path.relative_to(lower)): path.read_bytes() for path in lower.rglob("*") if path.is_file()}


async def test_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """By another store, as after a restart; then nothing but the files is left."""
    files = {"model": os.urandom(8 * MIB), "again/model": os.urandom(2 * MIB), "small": b"s"}
    files["twice"] = files["again/model"]
    made, size = artifact(files), sum(map(len, set(files.values())))
    metered = Metered(budget=size * 8 // 10)
    with Fake(hook=metered) as fake:
        fake.add(made, "latest")
        store = opened(tmp_path / "images")
        with pytest.raises(CriError, match="blob"):
            await store.pull(f"{fake.host}/r")
        await store.close()
        metered.budget, metered.served = None, 0
        store = opened(tmp_path / "images")
        image = await store.pull(f"{fake.host}/r")
        assert metered.served < size * 0.3
        assert files_of(store, image.id) == files
        await store.snapshots.settled()
        assert [p.name for d in ("partials", "ingest") for p in (store.root / d).iterdir()] == []
        modes = {oct(path.stat().st_mode & 0o777) for path in Path(store.view(image).lower[0]).rglob("*")}
        assert modes == {"0o644", "0o755"}
        await store.close()
        assert files_of(opened(tmp_path / "images"), image.id) == files


@pytest.mark.parametrize("size", [100, 2 * MIB])
async def test_wrong_bytes_are_not_shown(tmp_path: Path, size: int) -> None:
    made = artifact({"f": os.urandom(size)})
    with Fake() as fake:
        fake.add(made, "latest")
        digest = next(d for d, data in made.blobs.items() if len(data) == size)
        fake.blobs[digest] = os.urandom(size)
        store = opened(tmp_path / "images")
        with pytest.raises(CriError, match="wrong content"):
            await store.pull(f"{fake.host}/r")
        assert not list(store.list())
        fake.blobs[digest] = made.blobs[digest]
        assert files_of(store, (await store.pull(f"{fake.host}/r")).id) == {"f": made.blobs[digest]}
        await store.close()


async def test_a_damaged_partial_is_fetched_again(tmp_path: Path) -> None:
    made = artifact({"f": os.urandom(4 * MIB)})
    metered = Metered(budget=2 * MIB)
    with Fake(hook=metered) as fake:
        fake.add(made, "latest")
        store = opened(tmp_path / "images")
        with pytest.raises(CriError):
            await store.pull(f"{fake.host}/r")
        (blob,) = (tmp_path / "images/partials").glob("*.blob")
        data = bytearray(blob.read_bytes())
        data[7] ^= 1
        blob.write_bytes(data)
        metered.budget = None
        image = await store.pull(f"{fake.host}/r")
        assert set(files_of(store, image.id)["f"]) and files_of(store, image.id)["f"] in made.blobs.values()
        await store.close()


async def test_of_an_index_without_platforms(tmp_path: Path) -> None:
    made = artifact({"f": b"data"})
    with Fake() as fake:
        fake.add(made)
        entry: dict[str, Any] = made.descriptor().to_json(artifactType="application/vnd.example.model")
        kind = "application/vnd.oci.image.index.v1+json"


        fake.manifests["latest"] = (kind, json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode())
        store = opened(tmp_path / "images")
        image = await store.pull(f"{fake.host}/r")
        assert image.artifact_type == "application/vnd.example.model" and files_of(store, image.id) == {"f": b"data"}
        await store.close()
