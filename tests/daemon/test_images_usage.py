"""ImageFsInfo against what is really on the disk."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import config
from cri.images.store import Images
from cri.images.usage import walk
from hack.images import Layer, assemble
from tests.daemon.harness import Node
from tests.registry import Fake, inside


@pytest.fixture(autouse=True)
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


async def test_reported_is_what_a_walk_finds(tmp_path: Path) -> None:
    """Files, links and directories of many sizes, and a part of a layer that a pull was cut in."""
    source = random.Random(1)
    store = Images(tmp_path / "images", config.Images(registry_dir=str(tmp_path), progress_timeout=config.Seconds(1)))
    store.load()
    with Fake() as fake:
        for n in range(4):
            layers = []
            for k in range(3):
                layer = Layer()
                for i in range(20):
                    layer.file(f"d{n}/{k}/{i}", source.randbytes(source.randrange(30_000)))
                    layer.symlink(f"l{n}/{k}/{i}", "x" * source.randrange(1, 120))
                layers.append(layer.finish())
            fake.add(assemble(layers), f"v{n}")
            await store.pull(f"{fake.host}/r:v{n}")
        cut = assemble([Layer().file("big", source.randbytes(3 << 20)).finish()], compression="none")
        fake.add(cut, "cut")
        fake.blobs[cut.layers[0].digest] = cut.blobs[cut.layers[0].digest][: 2 << 20]
        before = (await store.fs_info()).images
        with pytest.raises(Exception, match="early"):
            await store.pull(f"{fake.host}/r:cut")
        after = (await store.fs_info()).images
        assert 2 << 20 <= after.bytes - before.bytes < 3 << 20, "what is kept of the layer counts"
    await store.close()
    os.sync()
    real = walk(tmp_path / "images")
    reported = (await store.fs_info()).images
    # A tmpfs has no blocks for directories.
    assert abs(reported.bytes - real.bytes) < real.bytes * (0.05 if real.bytes % 4096 or _tmpfs(tmp_path) else 0.02), (reported, real)
    assert abs(reported.inodes - real.inodes) <= 25, "but for the store's own directories"
    began = time.process_time()
    for _ in range(20):
        await store.fs_info()
    assert (time.process_time() - began) / 20 < 0.02


def _tmpfs(path: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return max((m for m in mounts if str(path).startswith(m[1])), key=lambda m: len(m[1]))[2] == "tmpfs"
