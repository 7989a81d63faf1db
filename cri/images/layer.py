"""One layer: its bytes from the registry, hashed as they pass, into the unpack helper."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cri.images.answers import Attempt, EndpointError
from cri.images.hosts import Endpoint
from cri.images.manifest import Descriptor
from cri.images.partials import Partials
from cri.images.progress import LayerProgress, Phase, Progress
from cri.images.snapshots import Snapshots
from cri.images.source import Source
from cri.images.unpack import Feed, Kept, Limits, Unpacked, Unpacker
from shim.errors import Failure

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
_READ = 1 << 20


@dataclass(slots=True)
class Layer:
    """A layer of one pull. ``path`` set: unpacked there by us as number ``number`` of the helper, not yet published."""

    descriptor: Descriptor
    diff_id: str
    chain_id: str
    pull: Progress
    progress: LayerProgress
    path: Path | None = None
    unpacked: Unpacked | None = None
    number: int = 0


async def fetch(layer: Layer, source: Source, unpacker: Unpacker, snapshots: Snapshots, partials: Partials, limits: Limits) -> None:
    """Download and unpack until the bytes are right or every endpoint has served wrong ones; sets ``layer.path``."""
    avoid: frozenset[str] = frozenset()
    while True:
        path = snapshots.begin(layer.chain_id)
        kept = partials.take(layer.descriptor.digest, layer.descriptor.size) if source.remote else None
        try:
            wrong = await _attempt(layer, path, source, unpacker, limits, avoid, kept)
        except Failure as error:
            where = f"{layer.descriptor.digest} {error.path}".strip()
            raise Failure("unpack layer", error.operation, errno=error.errno, path=where, message=error.message) from error
        finally:
            if kept is not None:
                os.close(kept.fd)
            if layer.path is None:
                snapshots.abandon(path)
        if wrong is None:
            return
        partials.drop(layer.descriptor.digest)
        avoid |= wrong


async def _attempt(
    layer: Layer, path: Path, source: Source, unpacker: Unpacker, limits: Limits, avoid: frozenset[str], kept: Kept | None
) -> frozenset[str] | None:
    """Set ``layer.path`` and return None if the digest was right; else the endpoints to blame: none, if it may have been ``kept``."""
    layer.progress.phase = Phase.DOWNLOADING
    feed = await unpacker.unpack(path / "fs", layer.descriptor.size, layer.diff_id.partition(":")[0], limits, kept)
    try:
        sink = _Sink(layer, feed)
        if kept is not None and kept.size:
            await sink.resume(kept)
        await source.stream_blob(layer.descriptor.digest, sink, avoid)
        feed.close()
        if not sink.verified():
            return frozenset() if kept is not None and kept.size else sink.sources
        layer.progress.phase = Phase.UNPACKING
        unpacked = await feed.done
        if unpacked.diff_id != layer.diff_id:
            raise Failure("unpack layer", message=f"diff id is {unpacked.diff_id}, config says {layer.diff_id}")
        layer.path, layer.unpacked, layer.number = path, unpacked, feed.number
        layer.progress.phase = Phase.DONE
        return None
    finally:
        await unpacker.abandon(feed)


class _Sink:
    """A layer's bytes on their way into the helper: counted, hashed, compared."""

    def __init__(self, layer: Layer, feed: Feed) -> None:
        self._layer, self._feed = layer, feed
        self._algorithm = layer.descriptor.digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self._feeding = True
        self.offset = 0
        self.sources: frozenset[str] = frozenset()
        layer.progress.fetched = 0

    async def resume(self, kept: Kept) -> None:
        """Go on behind what an earlier pull kept. It is hashed like what arrives; the helper reads it by itself."""

        def read() -> None:
            buffer = memoryview(bytearray(_READ))
            while self.offset < kept.size:
                count = os.preadv(kept.fd, [buffer[: kept.size - self.offset]], self.offset)
                if not count:
                    raise Failure("unpack layer", "read partial", message="is shorter than it was")
                self._hash.update(buffer[:count])
                self.offset += count

        await asyncio.to_thread(read)
        self._layer.progress.fetched = self.offset

    @property
    def missing(self) -> int:
        return self._layer.descriptor.size - self.offset

    async def write(self, endpoint: Endpoint, chunk: bytes) -> None:
        self.sources |= {endpoint.base}
        if len(chunk) > self.missing:
            raise EndpointError(Attempt(endpoint.base, f"sent more than the {self._layer.descriptor.size} bytes of the blob", 200))
        self._hash.update(chunk)
        self.offset += len(chunk)
        self._layer.progress.fetched = self.offset
        self._layer.pull.arrived(self._layer.progress, len(chunk))
        if self._feeding and not await self._feed.write(chunk):
            await self._stopped()

    async def _stopped(self) -> None:
        """The helper gave up on the archive. Unless the disk is at fault, read on: only the digest can tell whether these were the
        image's bytes (its fault) or the endpoint's invention (then another is asked)."""
        self._feeding = False
        try:
            await asyncio.shield(self._feed.done)
        except Failure as error:
            if error.errno in DISK:
                raise

    def verified(self) -> bool:
        return self._layer.descriptor.digest == f"{self._algorithm}:{self._hash.hexdigest()}"
