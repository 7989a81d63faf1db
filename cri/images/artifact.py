"""OCI artifacts: manifests whose blobs are files rather than layers (models, WebAssembly, policies), for use as volumes.

A file's name is the blob's ``org.opencontainers.image.title`` (ORAS, CRI-O) or ``org.cncf.model.filepath`` (ModelPack) annotation; a blob
without one is nothing that could be mounted, and is not fetched. All files of an artifact are one snapshot, so that everything else
(volumes, sub paths, user namespaces, garbage collection, durability) is the same as for images.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri.images.hosts import Endpoint
from cri.images.manifest import Descriptor, Manifest
from cri.images.progress import LayerProgress, Phase, Progress
from cri.images.registry import Attempt, EndpointError
from cri.images.snapshots import Meta
from cri.images.source import Source
from shim.errors import Failure
from shim.linux.process import boot_id

_PHASE: Final = "read artifact"
_DEPTH: Final = 32  # directories in a name


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


async def fetch(wanted: Iterable[File], manifest_digest: str, source: Source, pull: Progress, root: Path, parallel: int) -> Meta:
    """Download all files into the empty directory ``root``. Raises the registry's errors, or Failure of the disk."""
    limit = asyncio.Semaphore(parallel)
    every = tuple(wanted)

    async def one(file: File) -> None:
        async with limit:
            await _one(file, source, pull, root)

    tasks = [asyncio.create_task(one(file)) for file in every]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    size, inodes = await asyncio.to_thread(_measure, root)
    name = chain_id(manifest_digest)
    return Meta(name, name, manifest_digest, sum(file.descriptor.size for file in every), size, inodes, boot_id())


async def _one(file: File, source: Source, pull: Progress, root: Path) -> None:
    """Until the bytes are right, or every endpoint has served wrong ones."""
    file.progress.phase = Phase.DOWNLOADING
    path = root / file.name
    avoid: frozenset[str] = frozenset()
    try:
        _directories(root, path.parent)
        while True:
            # Nobody else sees this directory yet, and nothing in it is a link: a name leads where it says.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            sink = _Sink(file, pull, fd)
            try:
                await source.stream_blob(file.descriptor.digest, sink, avoid)
            finally:
                os.close(fd)
            if sink.verified():
                os.chmod(path, 0o644)
                break
            avoid |= sink.sources
    except OSError as error:
        raise Failure.wrap("pull artifact", "write", error, file.name) from error
    file.progress.phase = Phase.DONE


class _Sink:
    """A file's bytes: counted, hashed, written by a thread (a disk that is behind must not hold the daemon)."""

    def __init__(self, file: File, pull: Progress, fd: int) -> None:
        self._file, self._pull, self._fd = file, pull, fd
        self._algorithm = file.descriptor.digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self.offset = 0
        self.sources: frozenset[str] = frozenset()
        file.progress.fetched = 0

    @property
    def missing(self) -> int:
        return self._file.descriptor.size - self.offset

    async def write(self, endpoint: Endpoint, chunk: bytes) -> None:
        self.sources |= {endpoint.base}
        if len(chunk) > self.missing:
            raise EndpointError(Attempt(endpoint.base, f"sent more than the {self._file.descriptor.size} bytes of the blob", 200))
        self._hash.update(chunk)
        writing = asyncio.ensure_future(asyncio.to_thread(_write, self._fd, chunk))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])  # the fd is about to be closed, and its number to be somebody else's
            raise
        self.offset += len(chunk)
        self._file.progress.fetched = self.offset
        self._pull.arrived(self._file.progress, len(chunk))

    def verified(self) -> bool:
        return self._file.descriptor.digest == f"{self._algorithm}:{self._hash.hexdigest()}"


def _directories(root: Path, path: Path) -> None:
    """Readable by every user of a container, whatever the daemon's umask."""
    for directory in reversed([path, *path.parents]):
        if directory != root and directory.is_relative_to(root):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)


def _write(fd: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


def _measure(root: Path) -> tuple[int, int]:
    """(bytes on disk, inodes)."""
    found = [os.lstat(root)]
    for directory, names, more in os.walk(root):
        found += [os.lstat(os.path.join(directory, name)) for name in (*names, *more)]
    return sum(status.st_blocks * 512 for status in found), len(found)
