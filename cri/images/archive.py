"""Image archives to import: OCI layouts and docker archives (``docker save``), as directories or tar files, read as a ``Source``.

A docker archive has no manifest. One is made from what it has, the same each time: a layer that is not compressed has its diff id for a
digest, so nothing needs to be hashed for it before it is unpacked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cri.images import manifest as manifests
from cri.images import reference
from cri.images.answers import EndpointError
from cri.images.hosts import Endpoint
from cri.images.manifest import Descriptor, Index, Platform
from cri.images.members import Member, Members, compressed, open_members
from cri.images.reference import BadReference, is_digest
from cri.images.registry import Document, Sink
from shim.errors import Failure

_PHASE = "read archive"
_NAME, _REF_NAME = "io.containerd.image.name", "org.opencontainers.image.ref.name"
_CHUNK = 1 << 20
_IMAGES = 1000
_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_LAYERS = {b"\x1f\x8b": f"{_LAYER}.gzip", b"\x28\xb5": f"{_LAYER}.zstd"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Packed:
    """One image of an archive."""

    digest: str  # of its manifest or index
    names: tuple[str, ...] = ()  # normalised references with a tag
    tag: str = ""  # what it is called where the archive gives no repository
    original: bool = True  # the manifest is the registry's, not one made here


class Archive:
    """A Source. ``open`` it and ``close`` it, once more for each ``share``; ``images`` are what it holds."""

    remote = False

    def __init__(self, members: Members) -> None:
        self._members = members
        self._users = 1
        self._types: dict[str, str] = {}
        self._documents: dict[str, bytes] = {}  # made here
        self._blobs: dict[str, str] = {}  # digest → name, where that does not follow from it
        self.images: list[Packed] = []

    @classmethod
    async def open(cls, path: Path, scratch: Path, platform: Platform) -> Archive:
        """Raises Failure for what is neither of the two formats."""
        opening = asyncio.ensure_future(asyncio.to_thread(open_members, path, scratch))
        try:
            archive = cls(await asyncio.shield(opening))
        except asyncio.CancelledError:
            opening.add_done_callback(_close)  # the thread goes on
            raise
        try:
            await archive._thread(archive._read, platform)
        except BaseException:
            await archive.close()
            raise
        return archive

    def share(self) -> Archive:
        """For one more who will close it."""
        self._users += 1
        return self

    async def close(self) -> None:
        self._leave()

    def _leave(self, _: object = None) -> None:
        self._users -= 1
        if not self._users:
            self._members.close()

    async def _thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """In a thread, which keeps the files open until it is done, also when nobody waits for it any more."""
        self._users += 1
        task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
        task.add_done_callback(self._leave)
        return await asyncio.shield(task)

    # -- contents -----------------------------------------------------------------------------------------------------------

    def _read(self, platform: Platform) -> None:
        if self._members.find("index.json") is not None:
            self.images = list(self._layout(platform))
        elif self._members.find("manifest.json") is not None:
            self.images = [self._docker(entry, i) for i, entry in enumerate(self._list("manifest.json"))]
        else:
            raise self._wrong("neither index.json (an OCI layout) nor manifest.json (a docker archive) is in it")
        if not self.images:
            raise self._wrong("there is no image in it")

    def _layout(self, platform: Platform) -> Iterator[Packed]:
        document = manifests.load(self._file("index.json", manifests.MANIFEST_LIMIT), manifests.MANIFEST_LIMIT, "index.json")
        body = json.dumps({**document, "mediaType": manifests.OCI_INDEX}).encode()
        index = manifests.parse(manifests.OCI_INDEX, body)
        assert isinstance(index, Index)
        groups: dict[str, list[Descriptor]] = {}
        for entry, raw in zip(index.manifests, document["manifests"], strict=True):
            if entry.media_type in manifests.MANIFESTS + manifests.INDEXES:
                annotations = raw.get("annotations")
                annotations = annotations if isinstance(annotations, dict) else {}
                groups.setdefault(str(annotations.get(_NAME) or annotations.get(_REF_NAME) or ""), []).append(entry)
        for name, entries in groups.items():
            # One name for several entries: each for a platform, as an index has them.
            chosen = entries[0] if len(entries) == 1 else manifests.choose(Index(manifests.OCI_INDEX, tuple(entries)), platform)
            self._types[chosen.digest] = chosen.media_type
            if "/" in name or ":" in name:
                yield Packed(chosen.digest, (self._name(name),))
            else:
                yield Packed(chosen.digest, tag=name)

    def _docker(self, entry: object, number: int) -> Packed:
        where = f"manifest.json[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
            raise self._wrong(f"{where}.Config: not a string")
        names, files = entry.get("RepoTags") or [], entry.get("Layers")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise self._wrong(f"{where}.RepoTags: not a list of strings")
        if not isinstance(files, list) or not all(isinstance(f, str) for f in files) or len(files) > manifests.LAYER_LIMIT:
            raise self._wrong(f"{where}.Layers: not a list of at most {manifests.LAYER_LIMIT} strings")
        for text in (entry["Config"], *files):
            if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                raise self._wrong(f"{where}: a name with NUL or a lone surrogate")
        config = self._file(entry["Config"], manifests.CONFIG_LIMIT)
        diffs = manifests.diff_ids(manifests.load(config, manifests.CONFIG_LIMIT, "image config"), len(files))
        layers = [self._layer(name, diff) for name, diff in zip(files, diffs, strict=True)]
        described = self._made(manifests.DOCKER_CONFIG, config)
        document = {"schemaVersion": 2, "mediaType": manifests.DOCKER_MANIFEST, "config": described, "layers": layers}
        made = self._made(manifests.DOCKER_MANIFEST, json.dumps(document).encode())
        return Packed(str(made["digest"]), tuple(self._name(n) for n in names), original=False)

    def _layer(self, name: str, diff_id: str) -> dict[str, Any]:
        member = self._members.find(name)
        if member is None:
            raise self._wrong(f"{name!r:.200} is not in it")
        head = member.read(0, 4)
        digest, media_type = diff_id, _LAYER
        if compressed(head):
            digest, media_type = _hash(member), _LAYERS[head[:2]]
        self._blobs[digest] = name
        return {"mediaType": media_type, "digest": digest, "size": member.size}

    def _made(self, media_type: str, body: bytes) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        self._documents[digest], self._types[digest] = body, media_type
        return {"mediaType": media_type, "digest": digest, "size": len(body)}

    def _name(self, text: str) -> str:
        try:
            found = reference.parse(text)
        except BadReference as error:
            raise self._wrong(f"name of an image: {error}") from error
        return str(found) if found.tag else f"{found.name}@{found.digest}"

    # -- Source -------------------------------------------------------------------------------------------------------------

    async def document(self, selector: str, *, capability: str = "pull") -> Document:
        body = await self.small_blob(selector, manifests.MANIFEST_LIMIT)
        return Document(self._types.get(selector, ""), selector, body)

    async def small_blob(self, digest: str, size: int) -> bytes:
        if digest in self._documents:
            return self._documents[digest]
        body = await self._thread(self._file, self._path(digest), size)
        algorithm = digest.partition(":")[0]
        if f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}" != digest:
            raise self._wrong(f"the content of {digest} has another digest")
        return body

    async def stream_blob(self, digest: str, sink: Sink, avoid: frozenset[str] = frozenset()) -> None:
        place = Endpoint(self._members.path)
        if place.base in avoid:
            raise self._wrong(f"the content of {digest} has another digest")
        member = await self._thread(self._members.find, self._path(digest))
        if member is None:
            raise self._wrong(f"{digest} is not in it")
        try:
            while chunk := await self._thread(member.read, sink.offset, _CHUNK):
                await sink.write(place, chunk)
        except EndpointError as error:
            raise self._wrong(f"{digest}: {error}") from error
        except OSError as error:
            raise Failure.wrap(_PHASE, "read", error, self._members.path) from error
        if sink.missing:
            raise self._wrong(f"{digest} ends {sink.missing} bytes early")

    # -- files --------------------------------------------------------------------------------------------------------------

    def _path(self, digest: str) -> str:
        return self._blobs.get(digest) or f"blobs/{digest.replace(':', '/')}"

    def _file(self, name: str, limit: int) -> bytes:
        member = self._members.find(name)
        if member is None:
            raise self._wrong(f"{name!r:.200} is not in it")
        if member.size > limit:
            raise self._wrong(f"{name!r:.200} has {member.size} bytes, limit {limit}")
        body = b""
        while len(body) < member.size and (chunk := member.read(len(body), member.size)):
            body += chunk
        return body

    def _list(self, name: str) -> list[Any]:
        try:
            found = json.loads(self._file(name, manifests.MANIFEST_LIMIT))
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"{name}: not JSON") from error
        if not isinstance(found, list) or len(found) > _IMAGES:
            raise self._wrong(f"{name}: not a list of at most {_IMAGES} images")
        return found

    def _wrong(self, why: str) -> Failure:
        return Failure(_PHASE, path=self._members.path, message=why)


def _close(opening: asyncio.Future[Members]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _hash(member: Member) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := member.read(offset, _CHUNK):
        digest.update(chunk)
        offset += len(chunk)
    return f"sha256:{digest.hexdigest()}"


def with_name(packed: Packed, name: str) -> tuple[str, ...]:
    """The names an image gets: its own, or ``name`` (a repository, or a whole reference) instead. Raises BadReference."""
    if not name:
        return packed.names
    given = reference.parse(name)
    bare = "@" not in name and ":" not in name.rpartition("/")[2]
    if given.digest or is_digest(name):
        raise BadReference(f"{name!r:.200}: a digest cannot be given to an image")
    if not bare:
        return (str(given),)
    tags = [reference.parse(n).tag for n in packed.names] or [packed.tag or "latest"]
    return tuple(str(reference.parse(f"{given.name}:{tag}")) for tag in tags if tag)
