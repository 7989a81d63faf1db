"""Snapshots: one directory per chain id, the writable layers of containers, and the recipes that stack them.

    snapshots/<hex of chain id>/{fs/, meta.json, durable}     an unpacked layer; complete once it has this name
    ingest/<hex>.<random>/                                    being unpacked; deleted at start
    containers-rw/<container>/{upper/, work/, uses.json}      a container's own layer and the chain ids below it
    trash/                                                    renamed away, being deleted

A rename publishes a snapshot, so a process that dies leaves none half done. A machine that dies may: file data is written back later
than the rename. Hence ``durable``, made after a syncfs(2) in the background of the pull; at start after a reboot (the boot id in
meta.json is another one) a snapshot without it is deleted, and its images with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cri.images import files
from cri.images.manifest import LAYER_LIMIT
from cri.state import trees
from shim.errors import Failure
from shim.linux.process import boot_id
from shim.oci.bundle import Recipe

log = logging.getLogger("cri.images")

_EMPTY = "empty"  # overlayfs wants one lower directory even for an image without layers
# Below every image: what containers get mounted on. A file or directory made in the writable layer instead costs 0.1 to 0.4 ms each on ext4
# (more where many have just been deleted), and would be there to delete. An image that has the path hides this one.
_TARGETS = f"{_EMPTY}/targets"
_TARGET_FILES = ("etc/hosts", "etc/hostname", "etc/resolv.conf")
_TARGET_DIRECTORIES = ("dev", "etc", "proc", "sys")


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a committed snapshot."""

    chain_id: str
    diff_id: str
    blob: str  # digest of the compressed layer it was made from
    blob_size: int
    bytes: int  # on disk
    inodes: int
    boot: str
    version: int = 1


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """Chain ids, bottom first (image-spec config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(f"sha256:{hashlib.sha256(f'{chain[-1]} {diff_id}'.encode()).hexdigest()}" if chain else diff_id)
    return tuple(chain)


def name_of(chain_id: str) -> str:
    """The directory name of a chain id. The bottom one is a diff id and may use another algorithm."""
    algorithm, _, digits = chain_id.partition(":")
    return digits if algorithm == "sha256" else f"{algorithm}-{digits}"


class Snapshots:
    """The directories under ``root``; all synchronous parts are a few system calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory, self._ingest = root / "snapshots", root / "ingest"
        self._writable, self._trash = root / "containers-rw", root / "trash"
        self._known: dict[str, Meta] = {}
        self._elsewhere: dict[str, tuple[Meta, Path]] = {}  # in additional stores
        self._uses: dict[str, tuple[str, ...]] = {}  # container id → chain ids
        self._durable: set[str] = set()
        self._deleting: set[asyncio.Task[None]] = set()

    # -- start --------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Make the layout, repair its modes (CVE-2021-41103), drop what a crash left, read what there is."""
        for directory in (self.root, self.directory, self._ingest, self._writable, self._trash):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        for name in (_EMPTY, _TARGETS):
            self._make(self.directory / name / "fs")
        for name in _TARGET_DIRECTORIES:
            self._make(self.directory / _TARGETS / "fs" / name)
        for name in _TARGET_FILES:
            file = self.directory / _TARGETS / "fs" / name
            file.touch(0o644)
            file.chmod(0o644)
        boot = boot_id()
        for path in self._ingest.iterdir():
            self._discard(path)
        for path in self.directory.iterdir():
            if path.name == _EMPTY:
                continue
            meta = files.read_json(path / "meta.json", Meta)
            durable = (path / "durable").exists()
            if meta is None or name_of(meta.chain_id) != path.name or not (durable or meta.boot == boot):
                self._discard(path)
                continue
            self._known[meta.chain_id] = meta
            if durable:
                self._durable.add(meta.chain_id)
        for path in self._writable.iterdir():
            uses = files.read_json(path / "uses.json", tuple[str, ...])
            if uses is None:
                self._discard(path)
            else:
                self._uses[path.name] = uses

    # -- layers -------------------------------------------------------------------------------------------------------------

    def get(self, chain_id: str) -> Meta | None:
        elsewhere = self._elsewhere.get(chain_id)
        return self._known.get(chain_id) or (elsewhere[0] if elsewhere else None)

    def all(self) -> Iterable[Meta]:
        """Those that are kept here."""
        return self._known.values()

    def adopt(self, meta: Meta, directory: Path) -> None:
        """A layer that lies in somebody else's store: used as it is, never changed."""
        self._elsewhere.setdefault(meta.chain_id, (meta, directory))

    def place(self, chain_id: str) -> str:
        """The directory of a layer, seen from ``directory``: a name, or an absolute path."""
        if chain_id not in self._known and chain_id in self._elsewhere:
            return str(self._elsewhere[chain_id][1])
        return name_of(chain_id)

    def begin(self, chain_id: str) -> Path:
        """A private directory with an empty ``fs`` to unpack into."""
        path = self._ingest / f"{name_of(chain_id)}.{secrets.token_hex(4)}"
        try:
            path.mkdir(mode=0o700)
            (path / "fs").mkdir(mode=0o755)
            (path / "fs").chmod(0o755)
        except OSError as error:
            self._discard(path)
            raise Failure.wrap("unpack layer", "make directory", error, str(path)) from error
        return path

    def commit(self, path: Path, meta: Meta) -> None:
        """Publish an unpacked layer under its chain id."""
        try:
            files.write_json(path / "meta.json", meta)
            path.rename(self.directory / name_of(meta.chain_id))
        except OSError as error:
            raise Failure.wrap("commit snapshot", "write", error, str(path)) from error
        self._known[meta.chain_id] = meta

    def abandon(self, path: Path) -> None:
        """Give up a directory from ``begin``."""
        self._discard(path)

    def not_durable(self) -> tuple[str, ...]:
        return tuple(c for c in self._known if c not in self._durable)

    def mark_durable(self, chains: Iterable[str]) -> None:
        """Called after a syncfs that began when ``chains`` were committed already."""
        for chain_id in chains:
            if chain_id in self._known:
                (self.directory / name_of(chain_id) / "durable").touch(mode=0o600)
                self._durable.add(chain_id)

    def remove_except(self, wanted: Collection[str]) -> int:
        """Delete snapshots that neither ``wanted`` nor a container needs; returns how many."""
        used = set(wanted).union(*self._uses.values())
        doomed = [c for c in self._known if c not in used]
        # Topmost first: after a crash in the middle no chain has a hole below a layer that is still there.
        for chain_id in reversed(doomed):
            del self._known[chain_id]
            self._durable.discard(chain_id)
            self._discard(self.directory / name_of(chain_id))
        return len(doomed)

    # -- containers ---------------------------------------------------------------------------------------------------------

    def view(self, chains: Sequence[str]) -> Recipe:
        """The image read-only."""
        return Recipe(type="overlay", lower=self._lowers(chains))

    def prepare(self, container_id: str, chains: Sequence[str], also: Iterable[str] = ()) -> Recipe:
        """A writable layer of ``container_id`` on top of the image; it keeps ``also`` other chain ids, until it is released."""
        lowers = self._lowers(chains)
        below = (str(self.directory / _TARGETS / "fs"),) if len(lowers) < LAYER_LIMIT else ()
        path = self._writable / container_id
        try:
            path.mkdir(mode=0o700)
            used = tuple(dict.fromkeys((*chains, *also)))
            self._uses[container_id] = used  # from here on garbage collection spares them
            files.write_json(path / "uses.json", used)
            upper, work = path / "upper", path / "work"
            work.mkdir(mode=0o700)
            upper.mkdir(mode=0o755)
            # The merged root directory shows the upper one's attributes.
            facts = os.stat(lowers[0])
            os.chown(upper, facts.st_uid, facts.st_gid)
            upper.chmod(facts.st_mode & 0o7777)
        except OSError as error:
            raise Failure.wrap("prepare container root", "writable layer", error, str(path)) from error
        # "volatile": nothing of the layer is synced, also not by the container's fsync. It is never mounted a second time, and after
        # a power cut its container is gone. See hack/decisions/volatile-layers.md.
        return Recipe(type="overlay", lower=(*lowers, *below), upper=str(upper), work=str(work), options=("volatile",))

    def release(self, container_id: str) -> tuple[str, ...]:
        """Give a container's layer back and return the chain ids it used; nothing happens if it has none."""
        self._discard(self._writable / container_id)
        return self._uses.pop(container_id, ())

    def upper(self, container_id: str) -> Path:
        return self._writable / container_id / "upper"

    def containers(self) -> frozenset[str]:
        return frozenset(self._uses)

    @staticmethod
    def _make(directory: Path) -> None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        directory.chmod(0o755)

    def _lowers(self, chains: Sequence[str]) -> tuple[str, ...]:
        missing = [c for c in chains if self.get(c) is None]
        if missing:
            raise Failure("prepare container root", path=missing[0], message="snapshot is missing", hint="pull the image again")
        names = [self.place(c) for c in reversed(chains)] or [_EMPTY]
        return tuple(str(self.directory / name / "fs") for name in names)

    # -- deletion -----------------------------------------------------------------------------------------------------------

    def _discard(self, path: Path) -> None:
        """Out of sight at once, deleted in the background: a big tree takes seconds."""
        try:
            path.rename(self._trash / secrets.token_hex(8))
        except FileNotFoundError:
            return
        except OSError as error:
            raise Failure.wrap("delete snapshot", "rename", error, str(path)) from error

    def empty_trash(self) -> None:
        """Start to delete what was discarded."""
        if any(self._trash.iterdir()):
            task = asyncio.get_running_loop().create_task(asyncio.to_thread(_delete, self._trash))
            self._deleting.add(task)
            task.add_done_callback(self._deleting.discard)

    async def settled(self) -> None:
        """Wait until what was being deleted is gone."""
        await asyncio.gather(*self._deleting)


def _delete(trash: Path) -> None:
    for path in trash.iterdir():
        try:
            if path.is_dir():
                trees.delete(path)
            else:
                path.unlink(missing_ok=True)  # a partial layer
        except OSError as error:
            # Another deletion may be at the same tree; what neither removes is tried again at the next.
            log.warning("discarded layer %s is not deleted yet: %s", path.name, error)
