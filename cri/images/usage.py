"""How much disk images and containers take: recorded sums for layers, a cached walk for writable layers."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cri.images.snapshots import Snapshots

_FRESH = 10.0  # seconds; the kubelet asks for stats as often
_SMALL = 4096  # bytes a record or document occupies
_OWN_BYTES, _OWN_INODES = 3 * _SMALL, 4  # of a snapshot: its directory, fs and meta.json; and durable, which is empty
_DEPTH = 200
_BLOCK = 512  # unit of st_blocks


@dataclass(frozen=True, slots=True)
class Usage:
    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class FsInfo:
    """Both kinds live on one file system; the kubelet compares the mountpoint strings to tell a split one."""

    timestamp: int  # ns since the epoch
    mountpoint: str
    images: Usage
    containers: Usage


class Containers:
    """Usage of writable layers. A walk runs in a thread, at most one per container and not more often than every few seconds."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._cache: dict[str, tuple[float, Usage]] = {}
        self._walking: dict[str, asyncio.Task[Usage]] = {}
        self._threads = asyncio.Semaphore(1)

    async def of(self, container_id: str) -> tuple[int, int]:
        """(bytes, inodes); zero for a container without a layer."""
        then, usage = self._cache.get(container_id, (float("-inf"), Usage(0, 0)))
        if time.monotonic() - then > _FRESH:
            task = self._walking.get(container_id)
            if task is None:
                task = self._walking[container_id] = asyncio.create_task(self._measure(container_id))
                task.add_done_callback(lambda _: self._walking.pop(container_id, None))
            usage = await asyncio.shield(task)
        return usage.bytes, usage.inodes

    async def _measure(self, container_id: str) -> Usage:
        async with self._threads:
            usage = await asyncio.to_thread(walk, self._snapshots.upper(container_id))
        if container_id in self._snapshots.containers():
            self._cache[container_id] = (time.monotonic(), usage)
        else:
            self._cache.pop(container_id, None)
        return usage

    async def total(self) -> Usage:
        """Of all containers. Those gone meanwhile leave the cache."""
        live = self._snapshots.containers()
        for gone in self._cache.keys() - live:
            del self._cache[gone]
        measured = [await self.of(container_id) for container_id in live]
        return Usage(sum(b for b, _ in measured), sum(i for _, i in measured))


async def measure(root: Path, snapshots: Snapshots, containers: Containers, files: int) -> FsInfo:
    """Images from what unpacking recorded, with ``files`` small files beside them; containers measured."""
    layers = list(snapshots.all())
    images = Usage(
        sum(m.bytes for m in layers) + len(layers) * _OWN_BYTES + files * _SMALL,
        sum(m.inodes for m in layers) + len(layers) * _OWN_INODES + files,
    )
    return FsInfo(time.time_ns(), str(root), images, await containers.total())


def walk(top: Path) -> Usage:
    """Blocks and inodes below a directory that a running container changes. Every step is by descriptor and without following links,
    so nothing it renames leads out of it. One descriptor is open for each level, and levels below the 200th are not counted."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    seen: set[int] = set()
    size = inodes = 0
    try:
        stack = [(os.open(top, flags), list[str]())]
    except FileNotFoundError:
        return Usage(0, 0)
    try:
        size, inodes = _directory(stack[0], seen)
        while stack:
            fd, names = stack[-1]
            if not names or len(stack) > _DEPTH:
                os.close(fd)
                stack.pop()
                continue
            try:
                below = (os.open(names.pop(), flags, dir_fd=fd), list[str]())
            except OSError:
                continue  # gone or replaced meanwhile
            stack.append(below)
            more_size, more_inodes = _directory(below, seen)
            size, inodes = size + more_size, inodes + more_inodes
    finally:
        for fd, _ in stack:
            os.close(fd)
    return Usage(size, inodes)


def _directory(level: tuple[int, list[str]], seen: set[int]) -> tuple[int, int]:
    """(bytes, inodes) of a directory itself and of what in it is not one; the names of those that are go into ``level``."""
    fd, names = level
    size, inodes = os.fstat(fd).st_blocks * _BLOCK, 1
    with os.scandir(fd) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
                    continue
                facts = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if facts.st_nlink > 1:
                if facts.st_ino in seen:
                    continue
                seen.add(facts.st_ino)
            size, inodes = size + facts.st_blocks * _BLOCK, inodes + 1
    return size, inodes
