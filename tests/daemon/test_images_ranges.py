"""Large layers over several connections, from registries that give each connection its share, and from those that lie about ranges."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.images import ranges
from cri.images.store import Images
from hack.images import Assembled, Layer, assemble
from tests.daemon.harness import Node
from tests.registry import Fake, inside

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_pieces(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ranges, "AFTER", 0.2)
    monkeypatch.setattr(ranges, "WORTH", 2 * MIB)
    monkeypatch.setattr(ranges, "PIECE", MIB)
    with inside(node.netns):
        yield


class Slow:
    """A hook of ``Fake``: blobs at 10 MiB/s for each connection. ``most`` is how many were served at a time."""

    def __init__(self, image: Assembled, lie: str = "") -> None:
        self.digest, self.body, self.lie = image.layers[0].digest, image.blobs[image.layers[0].digest], lie
        self.now = self.most = 0
        self.asked: list[str] = []

    def __call__(self, handler: Any, path: str) -> bool:
        if self.digest not in path:
            return False
        wanted = handler.headers.get("Range", "")
        self.asked.append(wanted)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first or 0), int(last) + 1 if last else len(self.body)
        if self.lie == "start" and last:
            start += 5
        if self.lie == "ignores" and last:
            start, end, wanted = 0, len(self.body), ""
        if self.lie == "short" and last:
            end -= 100
        handler.send_response(206 if wanted else 200)
        if wanted:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.body)}")
        elif self.lie != "silent":
            handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for position in range(start, end, MIB // 8):
                handler.wfile.write(self.body[position : min(end, position + MIB // 8)])
                time.sleep(0.0125)
        except OSError:
            handler.close_connection = True
        finally:
            self.now -= 1
        return True


def image_of(megabytes: int) -> Assembled:
    return assemble([Layer().file("f", os.urandom(megabytes * MIB)).finish()], level=1)


async def pulled(tmp_path: Path, image: Assembled, slow: Slow) -> Images:
    store = Images(tmp_path / "images", config.Images(progress_timeout=config.Seconds(5)))
    store.load()
    with Fake(hook=slow) as fake:
        fake.add(image, "latest")
        assert (await store.pull(f"{fake.host}/r")).id == image.id
    await store.close()
    assert ranges.BUDGET.left == 3
    return store


async def test_slow_connections_are_joined(tmp_path: Path) -> None:
    image = image_of(16)
    slow = Slow(image)
    await pulled(tmp_path, image, slow)
    assert slow.most >= 3 and slow.asked[0] == "" and len(slow.asked) > 5
    pieces = sorted(tuple(map(int, a.removeprefix("bytes=").split("-"))) for a in slow.asked[1:])
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(pieces)) and pieces[-1][1] == len(slow.body) - 1


@pytest.mark.parametrize("lie", ["start", "ignores", "short"])
async def test_lies_about_ranges(tmp_path: Path, lie: str) -> None:
    """The blob arrives all the same, on one connection, and is asked for in pieces once only."""
    image = image_of(6)
    slow = Slow(image, lie)
    await pulled(tmp_path, image, slow)
    assert len([a for a in slow.asked if a and not a.endswith("-")]) <= 4


async def test_not_where_it_does_not_help(tmp_path: Path) -> None:
    """From a registry that does not say it takes ranges; for what is nearly there."""
    image = image_of(6)
    slow = Slow(image, "silent")
    await pulled(tmp_path, image, slow)
    assert slow.asked == [""]
    image = image_of(2)
    slow = Slow(image)
    (tmp_path / "two").mkdir()
    await pulled(tmp_path / "two", image, slow)
    assert slow.asked == [""]
