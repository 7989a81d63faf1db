"""What a pull that was cut short leaves for the next one, over restarts of the daemon.

    partials/<algorithm>-<hex>.blob    a compressed layer as far as it came; whole until its layer is published, then gone
    partials/<hex of manifest>.json    the pull they belong to, and the layers it has published already; its mtime is the last try

A partial proves nothing: its bytes are hashed again from the first when a pull goes on from it. What no pull came back to for an hour
is deleted, and so is all of a pull that found the disk full.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from cri.images import files
from cri.images.unpack import Kept
from shim.errors import Failure

LIFE = 3600.0  # seconds after the last try
WORTH = 1 << 20  # bytes; a smaller layer is sooner fetched again than kept
_BLOB, _PULL = ".blob", ".json"


class Intent(msgspec.Struct, frozen=True):
    """A pull that has begun and not ended."""

    chain_ids: tuple[str, ...]
    blobs: tuple[str, ...]
    version: int = 1


class Partials:
    """``discard(path)`` moves a file out of the way, to be deleted later: deleting a large one takes a while."""

    def __init__(self, directory: Path, discard: Callable[[Path], None]) -> None:
        self._directory, self._discard = directory, discard
        self._pulls: dict[str, Intent] = {}  # by manifest digest
        self._no_room: set[str] = set()  # blobs of pulls that found the disk full: without their partials they may fit

    def load(self) -> None:
        """Read what there is; what belongs to no pull, or is too old, goes."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._directory.chmod(0o700)
        for path in self._directory.glob(f"*{_PULL}"):
            intent = None if path.name.startswith(".") else files.read_json(path, Intent)
            if intent is None:
                path.unlink()
            else:
                self._pulls[path.name.removesuffix(_PULL).replace("-", ":", 1)] = intent
        self.expire(())
        named = {_name(blob) for intent in self._pulls.values() for blob in intent.blobs}
        for path in self._directory.iterdir():
            if path.suffix != _PULL and path.name not in named:
                self._discard(path)

    def chain_ids(self) -> set[str]:
        """Layers that are published for pulls that have not ended."""
        return {chain_id for intent in self._pulls.values() for chain_id in intent.chain_ids}

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) on disk."""
        size = inodes = 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                size, inodes = size + entry.stat(follow_symlinks=False).st_blocks * 512, inodes + 1
        return size, inodes

    # -- pulls

    def begin(self, manifest: str, chain_ids: tuple[str, ...], blobs: tuple[str, ...]) -> None:
        intent = Intent(chain_ids, blobs)
        if self._pulls.get(manifest) == intent:
            os.utime(self._path(manifest))
            return
        self._pulls[manifest] = intent
        try:
            files.write_json(self._path(manifest), intent)
        except OSError as error:
            raise Failure.wrap("pull", "record partials", error, str(self._directory)) from error

    def end(self, manifest: str, *, full: bool = False) -> None:
        """The pull is complete, or found the disk ``full``: then nothing is kept of it, this time and the next."""
        intent = self._pulls.pop(manifest, None)
        if intent is None:
            return
        self._no_room = self._no_room.union(intent.blobs) if full else self._no_room.difference(intent.blobs)
        self._path(manifest).unlink(missing_ok=True)
        named = {blob for other in self._pulls.values() for blob in other.blobs}
        for blob in intent.blobs:
            if blob not in named:
                self.drop(blob)

    def expire(self, running: object) -> bool:
        """End pulls that nobody has tried again; whether there were any. ``running`` contains those that somebody waits for."""
        old = [m for m in self._pulls if m not in running and self._age(m) > LIFE]  # type: ignore[operator]
        for manifest in old:
            self.end(manifest)
        return bool(old)

    def _age(self, manifest: str) -> float:
        try:
            return time.time() - self._path(manifest).stat().st_mtime
        except FileNotFoundError:
            return LIFE + 1

    def _path(self, manifest: str) -> Path:
        return self._directory / (manifest.replace(":", "-") + _PULL)

    # -- blobs

    def take(self, blob: str, size: int) -> Kept | None:
        """The file of a layer of ``size`` bytes, with what there is of it. None: not worth it, or somebody else is writing it. It is
        locked until the last copy of the descriptor is closed, so also for as long as an abandoned child still writes."""
        if size < WORTH or blob in self._no_room:
            return None
        try:
            fd = os.open(self._directory / _name(blob), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Failure.wrap("pull", "open partial", error, str(self._directory / _name(blob))) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            have = os.fstat(fd).st_size
            if have > size:
                os.ftruncate(fd, 0)
                have = 0
            return Kept(fd, have)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise

    def path(self, blob: str) -> Path:
        """Of the file that ``take`` opened."""
        return self._directory / _name(blob)

    def drop(self, blob: str) -> None:
        """Its layer is published, or its bytes are wrong."""
        self._discard(self._directory / _name(blob))


def _name(blob: str) -> str:
    return blob.replace(":", "-") + _BLOB
