"""``images.additional_stores``: image stores of other cri-shims, read-only. Their images are listed and run, their layers used in place.

Nothing in them is ever written, locked or deleted, and they are read once, at the start: whoever owns one must not remove an image
from it while it is in use here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cri.errors import StartError
from cri.images import files
from cri.images.model import Record
from cri.images.snapshots import Meta, Snapshots, name_of
from shim.linux.process import boot_id

log = logging.getLogger("cri.images")

_KEY = "images.additional_stores"


@dataclass(frozen=True, slots=True)
class _Store:
    path: Path  # the one with records, documents and snapshots

    def document(self, digest: str) -> Path:
        return self.path / "documents" / digest.partition(":")[2]


class Shared:
    """The images of all additional stores; of one that is in several, the first store's counts."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._stores: list[_Store] = []
        self.records: dict[str, Record] = {}
        self.names: dict[str, str] = {}  # tags and digests → id
        self._where: dict[str, _Store] = {}  # by image id

    def load(self, snapshots: Snapshots) -> None:
        """Read them, and tell ``snapshots`` of their layers. Raises StartError for one that cannot be used."""
        for path in self._paths:
            store = _Store(check(path))
            try:
                for meta, directory in _layers(store.path / "snapshots"):
                    snapshots.adopt(meta, directory)
                self._take(store, snapshots)
            except OSError as error:
                raise StartError(f"{_KEY}: {error.filename or path}: {error.strerror}") from error
            self._stores.append(store)

    def _take(self, store: _Store, snapshots: Snapshots) -> None:
        found = []
        for path in (store.path / "records").iterdir():
            record = files.read_json(path, Record) if path.suffix == ".json" and not path.name.startswith(".") else None
            if record is None:
                continue
            documents = (record.config_digest, record.image.manifest_digest)
            if not all(intact(store.document(d), d) for d in documents) or any(snapshots.get(c) is None for c in record.image.chain_ids):
                log.warning("image left out: %s in %s is not whole", record.image.id, store.path)
                continue
            found.append(record)
        for record in sorted(found, key=lambda r: r.image.pulled_at):
            if record.image.id not in self.records:
                self.records[record.image.id] = record
                self._where[record.image.id] = store
        for record in sorted(found, key=lambda r: r.image.pulled_at, reverse=True):
            for name in (*record.image.repo_tags, *record.image.repo_digests):
                self.names.setdefault(name, record.image.id)

    def document(self, digest: str) -> Path | None:
        """The file of a manifest or config in one of the stores."""
        return next((p for s in self._stores if (p := s.document(digest)).exists()), None)

    def place(self, image_id: str) -> str:
        """The store that has the image, for messages; empty if none has."""
        store = self._where.get(image_id)
        return str(store.path) if store else ""


def intact(path: Path, digest: str) -> bool:
    """Whether a document is what its name says: a power cut may have left it empty."""
    algorithm = digest.partition(":")[0]
    try:
        return f"{algorithm}:{hashlib.new(algorithm, path.read_bytes()).hexdigest()}" == digest
    except FileNotFoundError:
        return False


def check(path: str) -> Path:
    """The directory with the store: ``path`` itself, or ``images`` in it where it is a whole root. Nobody but root may write to it."""
    for candidate in (Path(path), Path(path, "images")):
        if (candidate / "records").is_dir() and (candidate / "snapshots").is_dir():
            break
    else:
        why = "is not an image store of cri-shim" if os.path.isdir(path) else "no such directory"
        raise StartError(f"{_KEY}: {path}: {why} (is it mounted?)")
    for directory in (candidate, *(candidate / n for n in ("records", "documents", "snapshots"))):
        try:
            facts = directory.stat()
        except OSError as error:
            raise StartError(f"{_KEY}: {directory}: {error.strerror}") from error
        if facts.st_uid != 0 or stat.S_IMODE(facts.st_mode) & 0o022:
            raise StartError(f"{_KEY}: {directory}: others than root can change it")
    return candidate


def _layers(directory: Path) -> Iterator[tuple[Meta, Path]]:
    boot = boot_id()
    for path in directory.iterdir():
        meta = files.read_json(path / "meta.json", Meta)
        if meta is None or name_of(meta.chain_id) != path.name:
            continue
        if (path / "durable").exists() or meta.boot == boot:
            yield meta, path
        else:
            log.warning("layer left out: %s may have lost data in a power cut", path)
