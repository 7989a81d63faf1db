"""Measurements of layers: none is waited for long, none is repeated too soon, one at a time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from cri.stats.layers import Layers


def container(name: str, finished_at: int = 0) -> Any:
    return SimpleNamespace(id=name, facts=SimpleNamespace(finished_at=finished_at))


class Disk:
    """Stands in for the walk: how it takes time is what is tested."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = seconds or {}
        self.calls: list[str] = []
        self.at_once = self.most = 0

    async def __call__(self, container_id: str) -> tuple[int, int]:
        self.calls.append(container_id)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds.get(container_id, 0))
        self.at_once -= 1
        return 100, 2


async def test_the_first_measurement_is_waited_for() -> None:
    disk = Disk()
    layers = Layers(disk, "/d")
    members = [container(str(n)) for n in range(50)]
    await layers.first(members)
    for each in members * 2:
        layer = layers.get(each)
        assert layer is not None
        assert (layer.bytes, layer.inodes) == (100, 2)
    assert (len(disk.calls), disk.most) == (50, 1)
    layers.close()


async def test_but_not_for_long() -> None:
    disk = Disk({"huge": 0.5})
    layers = Layers(disk, "/d")
    huge, small = container("huge"), container("small")
    began = time.monotonic()
    await layers.first([huge, small])
    assert time.monotonic() - began < 0.4
    assert layers.get(huge) is None
    await asyncio.sleep(0.6)
    assert layers.get(huge) is not None
    assert layers.get(small) is not None
    assert disk.calls == ["huge", "small"]
    layers.close()


async def test_long_walks_are_rare(monkeypatch: Any) -> None:
    monkeypatch.setattr("cri.stats.layers._INTERVAL", 0.0)
    disk = Disk({"slow": 0.02})
    layers = Layers(disk, "/d")
    slow, ended = container("slow"), container("ended", finished_at=1)
    await layers.first([slow, ended])
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        layers.get(slow)
        layers.get(ended)
        await asyncio.sleep(0.01)
    assert disk.calls == ["slow", "ended"]  # the one is not due for 0.4 s, the other does not change any more
    layers.close()


async def test_what_is_removed_meanwhile_is_not_kept() -> None:
    disk = Disk({"gone": 0.15})
    layers = Layers(disk, "/d")
    gone = container("gone")
    await layers.first([gone])
    layers.forget("gone")
    await asyncio.sleep(0.1)
    assert layers._known == {}
    layers.close()
