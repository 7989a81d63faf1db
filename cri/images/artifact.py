"""OCI artifacts: manifests whose blobs are files rather than layers (models, WebAssembly, policies), for use as volumes.

A file's name is the blob's ``org.opencontainers.image.title`` (ORAS, CRI-O) or ``org.cncf.model.filepath`` (ModelPack) annotation; a blob
without one is nothing that could be mounted, and is not fetched. All files of an artifact are one snapshot, so that everything else
(volumes, sub paths, user namespaces, garbage collection, durability) is the same as for images.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri.images.answers import Attempt, EndpointError
from cri.images.hosts import Endpoint
from cri.images.manifest import Descriptor, Manifest
from cri.images.partials import Partials
from cri.images.progress import LayerProgress, Phase, Progress
from cri.images.snapshots import Meta
from cri.images.source import Source
from shim.errors import Failure
from shim.linux.process import boot_id

_PHASE: Final = "read artifact"
_DEPTH: Final = 32  # directories in a name
_READ: Final = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class File:
    """A blob that has a name."""

    name: str  # relative, clean
    descriptor: Descriptor
    progress: LayerProgress


def chain_id(manifest_digest: str) -> str:
    """What the artifact's snapshot is called; no layer can have this name, because none hashes to it."""
    return f"sha256:{hashlib.sha256(f'artifact {manifest_digest}'.encode()).hexdigest()}"


def files(manifest: Manifest) -> tuple[File, ...]:
    """The blobs with names. The names come from whoever made the artifact: Failure for one that is no place below a directory, for two
    that are the same, for one that is both file and directory, and if there is none at all."""
    found: dict[str, File] = {}
    for i, descriptor in enumerate(manifest.layers):
        if descriptor.title:
            name = _clean(descriptor.title, f"layers[{i}]")
            if name in found:
                raise Failure(_PHASE, path=f"layers[{i}]", message=f"a second file is called {name!r:.200}")
            found[name] = File(name, descriptor, LayerProgress(descriptor.digest, descriptor.size))
    for name in found:
        parent = name.rpartition("/")[0]
        while parent:
            if parent in found:
                raise Failure(_PHASE, message=f"{parent!r:.200} is a file and a directory")
            parent = parent.rpartition("/")[0]
    if not found:
        raise Failure(
            _PHASE,
            message=f"no blob of this {manifest.artifact_type!r:.100} has a name",
            hint="files are named by the annotation org.opencontainers.image.title",
        )
    return tuple(found.values())


def _clean(title: str, where: str) -> str:
    parts = [part for part in title.split("/") if part not in ("", ".")]
    printable = title.isprintable() and not any("\ud800" <= c <= "\udfff" for c in title)
    if title.startswith("/") or ".." in parts or not parts or title.endswith("/") or not printable:
        raise Failure(_PHASE, path=where, message=f"{title!r:.200} is not the name of a file below a directory")
    if len(parts) > _DEPTH or any(len(part.encode()) > 255 for part in parts):
        raise Failure(_PHASE, path=where, message=f"{title!r:.200} is too long or too deep")
    return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Fetch:
    """One artifact on its way into the empty directory ``root``."""

    source: Source
    pull: Progress
    root: Path
    partials: Partials

    async def all(self, wanted: Iterable[File], manifest_digest: str, parallel: int) -> Meta:
        """Download every file. Raises the registry's errors, or Failure of the disk."""
        limit = asyncio.Semaphore(parallel)
        every = tuple(wanted)

        same: dict[str, list[File]] = {}
        for file in every:
            same.setdefault(file.descriptor.digest, []).append(file)

        async def one(file: File, others: list[File]) -> None:
            async with limit:
                await self._one(file)
                self._link(file, others)

        tasks = [asyncio.create_task(one(first, others)) for first, *others in same.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        size, inodes = await asyncio.to_thread(_measure, self.root)
        name = chain_id(manifest_digest)
        return Meta(name, name, manifest_digest, sum(file.descriptor.size for file in every), size, inodes, boot_id())

    async def _one(self, file: File) -> None:
        """Until the bytes are right, or every endpoint has served wrong ones."""
        file.progress.phase = Phase.DOWNLOADING
        path, digest = self.root / file.name, file.descriptor.digest
        avoid: frozenset[str] = frozenset()
        try:
            _directories(self.root, path.parent)
            while (blame := await self._attempt(file, path, avoid)) is not None:
                avoid |= blame
                if self.source.remote:
                    self.partials.drop(digest)
        except OSError as error:
            raise Failure.wrap("pull artifact", "write", error, file.name) from error
        file.progress.phase = Phase.DONE

    def _link(self, file: File, others: list[File]) -> None:
        """The same blob under more names."""
        try:
            for other in others:
                _directories(self.root, (self.root / other.name).parent)
                os.link(self.root / file.name, self.root / other.name)
                other.progress.phase = Phase.EXISTS
        except OSError as error:
            raise Failure.wrap("pull artifact", "link", error, file.name) from error

    async def _attempt(self, file: File, path: Path, avoid: frozenset[str]) -> frozenset[str] | None:
        """None if the file is there; else the endpoints to blame: none, if it may have been what an earlier pull left."""
        kept = self.partials.take(file.descriptor.digest, file.descriptor.size) if self.source.remote else None
        # Nobody else sees this directory yet, and nothing in it is a link: a name leads where it says.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = kept.fd if kept is not None else os.open(path, flags, 0o644)
        try:
            sink = _Sink(file, self.pull, fd)
            if kept is not None and kept.size:
                await sink.resume(kept.size)
            await self.source.stream_blob(file.descriptor.digest, sink, avoid)
            if not sink.verified():
                return frozenset() if kept is not None and kept.size else sink.sources
            os.fchmod(fd, 0o644)
            if kept is not None:
                os.link(self.partials.path(file.descriptor.digest), path)
            return None
        finally:
            os.close(fd)


class _Sink:
    """A file's bytes: counted, hashed, written by a thread (a disk that is behind must not hold the daemon)."""

    def __init__(self, file: File, pull: Progress, fd: int) -> None:
        self._file, self._pull, self._fd = file, pull, fd
        self._algorithm = file.descriptor.digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self.offset = 0
        self.sources: frozenset[str] = frozenset()
        file.progress.fetched = 0

    async def resume(self, size: int) -> None:
        """Go on behind what an earlier pull kept. It is hashed like what arrives."""

        def read() -> None:
            while self.offset < size:
                data = os.pread(self._fd, min(_READ, size - self.offset), self.offset)
                if not data:
                    raise Failure("pull artifact", "read partial", path=self._file.name, message="is shorter than it was")
                self._hash.update(data)
                self.offset += len(data)

        await _finished(asyncio.to_thread(read))
        self._file.progress.fetched = self.offset

    @property
    def missing(self) -> int:
        return self._file.descriptor.size - self.offset

    async def write(self, endpoint: Endpoint, chunk: bytes) -> None:
        self.sources |= {endpoint.base}
        if len(chunk) > self.missing:
            raise EndpointError(Attempt(endpoint.base, f"sent more than the {self._file.descriptor.size} bytes of the blob", 200))
        self._hash.update(chunk)
        await _finished(asyncio.to_thread(_write, self._fd, chunk, self.offset))
        self.offset += len(chunk)
        self._file.progress.fetched = self.offset
        self._pull.arrived(self._file.progress, len(chunk))

    def verified(self) -> bool:
        return self._file.descriptor.digest == f"{self._algorithm}:{self._hash.hexdigest()}"


async def _finished(work: Coroutine[None, None, None]) -> None:
    """A thread's work, waited for even by who is cancelled: the fd is about to be closed, and its number to be somebody else's."""
    running = asyncio.ensure_future(work)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _directories(root: Path, path: Path) -> None:
    """Readable by every user of a container, whatever the daemon's umask."""
    for directory in reversed([path, *path.parents]):
        if directory != root and directory.is_relative_to(root):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)


def _write(fd: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _measure(root: Path) -> tuple[int, int]:
    """(bytes on disk, inodes)."""
    found = [os.lstat(root)]
    for directory, names, more in os.walk(root):
        found += [os.lstat(os.path.join(directory, name)) for name in (*names, *more)]
    return sum(status.st_blocks * 512 for status in found), len(found)
