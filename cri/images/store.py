"""The images of this node: records, names, pulls, removal, and the roots of containers.

    records/<hex of id>.json       one per image
    documents/<hex of sha256>      manifests and configs as served

A record is written after its documents and snapshots and deleted before them, so that whatever instruction a crash comes at, a record
that can be read has all it speaks of; ``load`` checks that, and drops the record otherwise, for the kubelet to pull again.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cri import config as configuration
from cri.errors import FailedPrecondition, ImageNotFound, InvalidArgument
from cri.images import auth, files, manifest, reference
from cri.images.model import Image, Record, Signature, config_from_json
from cri.images.pull import Options, Pulled, Pulls
from cri.images.reference import BadReference, Reference
from cri.images.shared import Shared, intact
from cri.images.snapshots import Snapshots
from cri.images.source import Source
from cri.images.trust import Trust
from cri.images.usage import Containers, FsInfo, Usage, measure
from shim.errors import Failure
from shim.oci.bundle import Recipe

log = logging.getLogger("cri.images")

_SIGNATURES = 256  # kept with an image
_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})", re.ASCII)  # what crictl shows of an id is 13 digits


class Images:
    """The image store. Create one, ``load`` it, and ``close`` it; only the event loop touches it."""

    def __init__(self, root: Path, config: configuration.Images, *, platform: manifest.Platform | None = None) -> None:
        self.root = root
        self._records_dir, self._documents_dir = root / "records", root / "documents"
        self._records: dict[str, Record] = {}
        self._names: dict[str, str] = {}  # every tag and digest → id
        self._pinned = config.pinned
        self.trust = Trust(Path(config.signature_policy) if config.signature_policy else None)
        self.snapshots = Snapshots(root)
        self._shared = Shared(config.additional_stores)
        options = Options(
            registry_dir=Path(config.registry_dir) if config.registry_dir else None,
            parallel_pulls=config.max_parallel_pulls,
            parallel_layers=config.max_parallel_layers,
            progress_timeout=float(config.progress_timeout),
            auth_file=Path(config.auth_file) if config.auth_file else None,
        )
        self.platform = platform or manifest.host_platform()
        self.pulls = Pulls(self.snapshots, options, self.platform, self._known_config)
        self.pulls.freed = self._collect
        self._usage = Containers(self.snapshots)

    # -- life ---------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the store, and repair it: abandoned parts go, records that lost something go."""
        self.trust.load()
        self.snapshots.load()
        self._shared.load(self.snapshots)
        self.pulls.load()
        for directory in (self._records_dir, self._documents_dir):
            directory.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)
        found = []
        for path in self._records_dir.iterdir():
            record = files.read_json(path, Record) if path.suffix == ".json" and not path.name.startswith(".") else None
            if record is None or not self._whole(record):
                log.warning("image record dropped: %s is not whole", path)
                path.unlink()
                continue
            found.append(record)
        # A crash between two writes may leave a tag in two records: the later pull has it.
        for record in sorted(found, key=lambda r: r.image.pulled_at):
            self._put(record)
        self._collect()

    async def close(self) -> None:
        """Cancel pulls and wait for background work."""
        await self.pulls.close()
        await self.snapshots.settled()

    def _whole(self, record: Record) -> bool:
        documents = (record.config_digest, record.image.manifest_digest)
        return all(intact(self._own(d), d) for d in documents) and all(self.snapshots.get(c) is not None for c in record.image.chain_ids)

    # -- look-up ------------------------------------------------------------------------------------------------------------

    def get(self, ref: str) -> Image | None:
        """By id, tag or digest (normalised), or by a unique beginning of an id; None if there is none."""
        record = self._find(ref)
        return self._seen(record) if record else None

    def list(self) -> Iterator[Image]:
        """All images, oldest first; those of additional stores at the end."""
        found = (*self._records.values(), *(r for i, r in self._shared.records.items() if i not in self._records))
        return (self._seen(r) for r in found)

    def _find(self, ref: str) -> Record | None:
        if reference.is_image_id(ref):
            return self._record(ref if ":" in ref else f"sha256:{ref}")
        try:
            name = str(reference.parse(ref))
        except BadReference:
            name = ""
        if known := self._names.get(name) or self._shared.names.get(name):
            return self._record(known)
        match = _PREFIX.fullmatch(ref)
        if match is None:
            return None
        matches = [i for i in {*self._records, *self._shared.records} if i.startswith(f"sha256:{match[1]}")]
        if len(matches) > 1:
            raise InvalidArgument(f"image id {ref!r} is ambiguous: {len(matches)} begin so")
        return self._record(matches[0]) if matches else None

    def _record(self, image_id: str) -> Record | None:
        return self._records.get(image_id) or self._shared.records.get(image_id)

    def _seen(self, record: Record) -> Image:
        """The image as others see it: with the names it has in additional stores, unless they are another image's here, and pinned if
        it is, or if it could not be removed anyway."""
        image, shared = record.image, self._shared.records.get(record.image.id)
        if shared is not None:
            tags = {t for t in shared.image.repo_tags if self._names.get(t, image.id) == image.id}
            digests = dict.fromkeys((*image.repo_digests, *shared.image.repo_digests))
            only = image.id not in self._records
            image = replace(image, repo_tags=tuple(sorted({*(() if only else image.repo_tags), *tags})), repo_digests=tuple(digests))
            image = replace(image, pinned=True) if only else image
        names = (image.id, *image.repo_tags, *image.repo_digests)
        pinned = any(fnmatch.fnmatchcase(name, _normal(p)) for p in self._pinned for name in names)
        return replace(image, pinned=True) if pinned else image

    def details(self, image: Image) -> dict[str, Any]:
        """For verbose status: the config and manifest as served, chain id and where the layers lie."""
        record = self._known(image)
        return {
            "chainID": image.chain_ids[-1] if image.chain_ids else "",
            "configPath": str(self._path(record.config_digest)),
            "imageSpec": self._document(record.config_digest),
            "manifest": self._document(image.manifest_digest),
            "snapshots": list(self.snapshots.view(image.chain_ids).lower),
            **({"artifactType": image.artifact_type} if image.artifact_type else {}),
        }

    def _known(self, image: Image) -> Record:
        record = self._record(image.id)
        if record is None:
            raise ImageNotFound(f"image {image.id} was removed")
        return record

    def _own(self, digest: str) -> Path:
        return self._documents_dir / digest.partition(":")[2]

    def _path(self, digest: str) -> Path:
        own = self._own(digest)
        return own if own.exists() else self._shared.document(digest) or own

    def _document(self, digest: str) -> Any:
        return json.loads(self._path(digest).read_bytes())

    def _known_config(self, digest: str) -> bytes | None:
        path = self._path(digest)
        return path.read_bytes() if intact(path, digest) else None

    # -- verbs --------------------------------------------------------------------------------------------------------------

    async def pull(self, ref: str, credentials: auth.Credentials = auth.ANONYMOUS) -> Image:
        """Pull an image; two pulls of one image share the work. Always asks the registry: that is the permission to have it."""
        with self.pulls.measures.pull():
            try:
                parsed = reference.parse(ref)
            except BadReference as error:
                raise InvalidArgument(str(error), field="image.image") from None
            image = await self._pull(parsed, credentials)
            record = self._record(image.id)
            return self._seen(record) if record else image  # somebody may have removed it by now

    async def _pull(self, parsed: Reference, credentials: auth.Credentials) -> Image:
        self.trust.refuse_early(parsed)
        signatures: list[Signature] = []
        added: list[Image] = []

        async def admit(registry: Source, digests: tuple[str, str]) -> None:
            signatures.extend(await self.trust.admit(registry, parsed, digests))

        def done(pulled: Pulled, digest: str) -> None:
            added.append(self.add(pulled, str(parsed) if parsed.tag else "", parsed.with_digest(digest), signatures))

        with self.collected():
            await self.pulls.pull(parsed, credentials, admit, done)
        return added[0]

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Around what makes an image: if it fails, what was published for it and is nobody's now goes. A full disk needs the room."""
        try:
            yield
        except BaseException:
            self._collect()
            raise

    def require_trusted(self, image: Image, asked: str) -> None:
        """Raise SignatureValidationFailed if the policy, as it is now, forbids to run the image, which the client calls ``asked``."""
        self.trust.check(image, self._signatures(image.id), asked)

    def _signatures(self, image_id: str) -> tuple[Signature, ...]:
        found = (self._records.get(image_id), self._shared.records.get(image_id))
        return tuple(s for r in found if r is not None for s in r.signatures)

    def add(self, pulled: Pulled, tag: str, digest: str, signatures: Collection[Signature] = ()) -> Image:
        """Record an image whose layers are here, under one more ``tag`` and repository ``digest``; either may be empty."""
        kind = pulled.manifest.artifact_type
        document = {} if kind else json.loads(pulled.config)
        known = self._records.get(pulled.id)
        tags = set(known.image.repo_tags if known else ())
        digests = list(known.image.repo_digests if known else ())
        if tag:
            tags.add(tag)
        if digest and digest not in digests:
            digests.append(digest)
        image = Image(
            id=pulled.id,
            repo_tags=tuple(sorted(tags)),
            repo_digests=tuple(digests),
            size=pulled.size,
            config=config_from_json(document),
            chain_ids=pulled.chain_ids,
            architecture=_string(document, "architecture"),
            os=_string(document, "os"),
            variant=_string(document, "variant"),
            created=_string(document, "created"),
            manifest_digest=pulled.document.digest,
            pulled_at=time.time_ns(),
            artifact_type=kind,
        )
        # An artifact's config says nothing, and two artifacts may have the same.
        config_digest = image.manifest_digest if kind else pulled.manifest.config.digest
        try:
            for name, body in {config_digest: pulled.config, image.manifest_digest: pulled.document.body}.items():
                if not intact(self._own(name), name):
                    files.write(self._own(name), body)
        except OSError as error:
            raise Failure.wrap("record image", "write", error, str(self._documents_dir)) from error
        kept = tuple(dict.fromkeys((*signatures, *(known.signatures if known else ()))))[:_SIGNATURES]
        record = Record(image, pulled.manifest.media_type, config_digest, tuple(layer.digest for layer in pulled.manifest.layers), kept)
        self._save(record)
        self._put(record)
        return image

    async def remove(self, ref: str) -> None:
        """Remove an image with all its names (CRI: by any of them). Removing nothing succeeds. Containers keep their layers."""
        record = self._find(ref)
        if record is None:
            return
        if record.image.id not in self._records:
            where = self._shared.place(record.image.id)
            raise FailedPrecondition(f"image {ref!r} is in the read-only store {where}", hint="it is pinned; remove it there")
        self._record_path(record.image.id).unlink(missing_ok=True)
        del self._records[record.image.id]
        self._names = {name: i for name, i in self._names.items() if i != record.image.id}
        self._collect()

    async def prepare(self, image: Image, container_id: str, shown: Collection[Image] = ()) -> Recipe:
        """A writable root for a container, which also keeps the images that are ``shown`` in it as volumes."""
        for one in (image, *shown):
            self._known(one)
        return self.snapshots.prepare(container_id, image.chain_ids, [c for one in shown for c in one.chain_ids])

    def view(self, image: Image) -> Recipe:
        """The image read-only, for an image volume of a container that was prepared with it."""
        return self.snapshots.view(image.chain_ids)

    async def release(self, container_id: str) -> None:
        """Give a container's root back (idempotent) and what only it still used."""
        chains = self.snapshots.release(container_id)
        if any(r.image.chain_ids == chains for r in (*self._records.values(), *self._shared.records.values())):
            self.snapshots.empty_trash()  # the usual case: its image is still here, so no layer goes with it
        else:
            self._collect()

    async def sweep(self, live: Collection[str]) -> None:
        """Release every root whose container is not in ``live``; for recovery."""
        for container_id in self.snapshots.containers() - set(live):
            self.snapshots.release(container_id)
        self._collect()

    async def usage(self, container_id: str) -> tuple[int, int]:
        """(bytes, inodes) of a container's writable layer."""
        return await self._usage.of(container_id)

    async def fs_info(self) -> FsInfo:
        """Usage of the image and container file systems."""
        documents = sum(1 for _ in self._documents_dir.iterdir())
        found = await measure(self.root, self.snapshots, self._usage, documents + len(self._records))
        size, inodes = self.pulls.kept()
        return replace(found, images=Usage(found.images.bytes + size, found.images.inodes + inodes))

    # -- records ------------------------------------------------------------------------------------------------------------

    def _record_path(self, image_id: str) -> Path:
        return self._records_dir / f"{image_id.partition(':')[2]}.json"

    def _save(self, record: Record) -> None:
        try:
            files.write_json(self._record_path(record.image.id), record)
        except OSError as error:
            raise Failure.wrap("record image", "write", error, str(self._records_dir)) from error

    def _put(self, record: Record) -> None:
        """Take a record in; its tags move here from the images that had them."""
        mine = record.image.id
        for tag in record.image.repo_tags:
            other = self._names.get(tag, mine)
            if other != mine:
                loser = self._records[other]
                left = tuple(t for t in loser.image.repo_tags if t != tag)
                self._records[other] = replace(loser, image=replace(loser.image, repo_tags=left))
                self._save(self._records[other])
            self._names[tag] = mine
        for digest in record.image.repo_digests:
            self._names[digest] = mine
        self._records[mine] = record

    def _collect(self) -> None:
        """Delete what no image, container or pull refers to."""
        wanted = {c for r in self._records.values() for c in r.image.chain_ids} | self.pulls.spared()
        self.snapshots.remove_except(wanted)
        documents = {d.partition(":")[2] for r in self._records.values() for d in (r.config_digest, r.image.manifest_digest)}
        for path in self._documents_dir.iterdir():
            if path.name not in documents:
                path.unlink()
        self.snapshots.empty_trash()


def _normal(pattern: str) -> str:
    """A pin from the configuration: a reference like any other, or a pattern with ``*``."""
    try:
        return str(reference.parse(pattern))
    except BadReference:
        return pattern


def _string(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) and value.isprintable() else ""
