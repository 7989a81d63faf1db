"""A pull: resolve the reference, fetch what is missing, unpack while it arrives, publish bottom up.

Each caller resolves with its own credentials, which is the registry's permission to have the image; from there pulls of the same
manifest are one piece of work, which is cancelled when nobody waits for it any more. Different images share layers in flight: a chain
id belongs to the pull that claimed it, others wait for it, and take over if it fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cri.images import artifact
from cri.images import manifest as manifests
from cri.images.auth import Credentials
from cri.images.hosts import endpoints
from cri.images.keyring import Keyring
from cri.images.layer import DISK, Layer, fetch
from cri.images.manifest import Index, Manifest, Platform
from cri.images.measures import Measures
from cri.images.model import config_from_json
from cri.images.partials import LIFE, WORTH, Partials
from cri.images.progress import LayerProgress, Phase, Progress
from cri.images.reference import Reference
from cri.images.registry import Document, Registry
from cri.images.snapshots import Meta, Snapshots, chain_ids
from cri.images.source import Source
from cri.images.unpack import Helper, Limits, Unpacker
from shim.errors import Failure
from shim.linux.process import boot_id

log = logging.getLogger("cri.images")

_PATIENCE = 5.0  # seconds
_NESTING = 4  # indexes in indexes


#: Called with the repository and the digests of what the reference names and of this platform's manifest.
Admit = Callable[[Source, tuple[str, str]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Pulled:
    """An image whose layers are all there."""

    id: str  # sha256 of the config
    document: Document  # the platform's manifest
    manifest: Manifest
    config: bytes
    chain_ids: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.document.body) + len(self.config) + sum(layer.size for layer in self.manifest.layers)


@dataclass(slots=True)
class _Work:
    """One manifest being pulled, and for how many."""

    task: asyncio.Task[Pulled]
    progress: Progress
    kept: list[str]  # chain ids counted in ``Pulls.keep``
    waiters: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What the configuration says about pulls."""

    registry_dir: Path | None
    parallel_pulls: int
    parallel_layers: int
    progress_timeout: float  # seconds
    user_agent: str = "cri-shim"
    auth_file: Path | None = None
    limits: Limits = field(default_factory=Limits)


class Pulls:
    """All pulls of a store. ``keep`` counts the chain ids of those that run."""

    def __init__(self, snapshots: Snapshots, options: Options, platform: Platform, known: Callable[[str], bytes | None]) -> None:
        """``known(digest)`` is an image config that is stored already."""
        self._snapshots, self._options, self._platform, self._known = snapshots, options, platform, known
        self._slots = asyncio.Semaphore(options.parallel_pulls)
        self._work: dict[str, _Work] = {}  # by manifest digest
        self._claims: dict[str, asyncio.Future[None]] = {}  # by chain id; resolved whatever the outcome
        self._resolving: list[Progress] = []
        self._background: set[asyncio.Task[None]] = set()
        self._flushing, self._flush_waiting = asyncio.Lock(), False
        self._helper = Helper()
        self._partials = Partials(snapshots.root / "partials", snapshots.abandon)
        self.keep: Counter[str] = Counter()
        self.measures = Measures(self.progress)
        self.freed: Callable[[], None] = lambda: None  # called when there may be something to collect that nothing else announces

    def load(self) -> None:
        """Read what earlier pulls left to go on from. The snapshots are loaded already."""
        self._partials.load()

    def spared(self) -> set[str]:
        """Chain ids that garbage collection must leave: of pulls that run, and of those that were cut short not long ago."""
        return set(self.keep) | self._partials.chain_ids()

    def kept(self) -> tuple[int, int]:
        """(bytes, inodes) of layers that have not arrived whole."""
        return self._partials.usage()

    def progress(self) -> list[Progress]:
        return [*self._resolving, *(w.progress for w in self._work.values())]

    async def pull(self, reference: Reference, credentials: Credentials, admit: Admit, done: Callable[[Pulled, str], None]) -> None:
        """Pull, and call ``done(pulled, digest the reference resolved to)`` while its snapshots are still kept. ``admit`` raises if the
        image that the reference was resolved to may not be had."""
        registry = Registry(
            reference,
            endpoints(self._options.registry_dir, reference.domain),
            credentials,
            progress_timeout=self._options.progress_timeout,
            user_agent=self._options.user_agent,
            keyring=Keyring(self._options.auth_file),
        )
        await self.take(registry, reference.selector, str(reference), admit, done)

    async def take(self, source: Source, selector: str, name: str, admit: Admit, done: Callable[[Pulled, str], None]) -> None:
        """The same from any source, which is closed in the end. ``name`` is what people call it."""
        progress = Progress([name])
        self._resolving.append(progress)
        try:
            top, chosen, manifest = await self._resolve(source, selector)
            await admit(source, (top.digest, chosen.digest))
        except BaseException:
            await source.close()
            raise
        finally:
            self._resolving.remove(progress)
        work = self._work.get(chosen.digest)
        if work is None:
            work = self._begin(source, chosen, manifest, progress)
        else:
            await source.close()
            if name not in work.progress.references:
                work.progress.references.append(name)
        work.waiters += 1
        try:
            done(await asyncio.shield(work.task), top.digest)
        finally:
            work.waiters -= 1
            if not work.waiters:
                self._end(work, chosen.digest)

    def _begin(self, source: Source, document: Document, manifest: Manifest, progress: Progress) -> _Work:
        kept: list[str] = []
        task = asyncio.create_task(self._fetch(source, document, manifest, progress, kept), name=f"pull {progress.references[0]}")
        task.add_done_callback(lambda _: self.measures.finished(progress))
        task.add_done_callback(lambda _: self._spawn(source.close()))
        self._work[document.digest] = _Work(task, progress, kept)
        return self._work[document.digest]

    def _end(self, work: _Work, digest: str) -> None:
        """Nobody waits any more: cancel it if it is not done, and let go of its snapshots and partials, of the latter only if it is
        complete or there is no room for them."""
        work.task.cancel()
        if self._work.get(digest) is work:
            del self._work[digest]
        self.keep.subtract(work.kept)
        self.keep = +self.keep
        error = work.task.exception() if work.task.done() and not work.task.cancelled() else None
        full = isinstance(error, Failure) and error.errno in DISK
        if full or (work.task.done() and not work.task.cancelled() and error is None):
            self._partials.end(digest, full=full)
        else:
            asyncio.get_running_loop().call_later(LIFE + 1, self._expire)
        if full:
            self.freed()

    def _expire(self) -> None:
        if self._partials.expire(self._work):
            self.freed()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # Nobody waits for it; what it would have marked durable is only trusted until the next reboot.
            log.warning("background work of pulls: %s", error)

    async def _resolve(self, source: Source, selector: str) -> tuple[Document, Document, Manifest]:
        """(what the selector names, the manifest for this platform, the same parsed)."""
        top = document = await source.document(selector, capability="resolve")
        for _ in range(_NESTING):
            parsed = manifests.parse(document.media_type, document.body)
            if isinstance(parsed, Manifest):
                return top, document, parsed
            document = await self._choose(source, parsed)
        raise Failure("choose platform", message=f"indexes nested more than {_NESTING} deep")

    async def _choose(self, source: Source, index: Index) -> Document:
        chosen = manifests.choose(index, self._platform)
        document = await source.document(chosen.digest)
        declared = document.media_type.partition(";")[0].strip().lower()
        if declared in manifests.MANIFESTS + manifests.INDEXES and declared != chosen.media_type:
            raise Failure("read manifest", message=f"served as {declared!r}, the index says {chosen.media_type!r}")
        return Document(chosen.media_type, document.digest, document.body)

    # -- one manifest -------------------------------------------------------------------------------------------------------

    async def _fetch(self, source: Source, document: Document, manifest: Manifest, progress: Progress, kept: list[str]) -> Pulled:
        progress.phase = Phase.WAITING
        async with self._slots:
            progress.phase = Phase.DOWNLOADING
            if manifest.artifact_type:
                return await self._artifact(source, document, manifest, progress, kept)
            config = self._known(manifest.config.digest)
            if config is None:
                self._helper.start()  # a new image needs it: it starts while the config travels
                config = await source.small_blob(manifest.config.digest, manifest.config.size)
            layers = self._plan(manifest, config, progress, kept)
            if any(self._snapshots.get(layer.chain_id) is None for layer in layers):
                chains, blobs = tuple(x.chain_id for x in layers), tuple(x.descriptor.digest for x in layers)
                if source.remote:
                    self._partials.begin(document.digest, chains, blobs)
                async with self._helper.lease() as unpacker:
                    await self._layers(source, layers, unpacker)
                self._spawn(self._make_durable())
            progress.phase = Phase.DONE
            chains = tuple(layer.chain_id for layer in layers)
            return Pulled(f"sha256:{hashlib.sha256(config).hexdigest()}", document, manifest, config, chains)

    async def _artifact(self, source: Source, document: Document, manifest: Manifest, progress: Progress, kept: list[str]) -> Pulled:
        """The files of an artifact, as one snapshot."""
        files = artifact.files(manifest)
        chain = artifact.chain_id(document.digest)
        self.keep.update((chain,))
        kept.append(chain)
        progress.layers = [file.progress for file in files]
        if self._snapshots.get(chain) is None:
            if source.remote:
                self._partials.begin(document.digest, (chain,), tuple(file.descriptor.digest for file in files))
            path = self._snapshots.begin(chain)
            try:
                fetch = artifact.Fetch(source, progress, path / "fs", self._partials)
                self._snapshots.commit(path, await fetch.all(files, document.digest, self._options.parallel_layers))
            except BaseException:
                self._snapshots.abandon(path)
                self._snapshots.empty_trash()
                raise
            self._spawn(self._make_durable())
        else:
            for layer in progress.layers:
                layer.phase = Phase.EXISTS
        progress.phase = Phase.DONE
        named = replace(manifest, layers=tuple(file.descriptor for file in files))
        return Pulled(f"sha256:{hashlib.sha256(document.body).hexdigest()}", document, named, b"", (chain,))

    def _plan(self, manifest: Manifest, config: bytes, progress: Progress, kept: list[str]) -> list[Layer]:
        """The layers by chain id, from now on spared by garbage collection."""
        parsed = manifests.load(config, manifests.CONFIG_LIMIT, "image config")
        _check_platform(parsed, self._platform)
        config_from_json(parsed)  # what cannot be recorded is not worth downloading
        diffs = manifests.diff_ids(parsed, len(manifest.layers))
        chains = chain_ids(diffs)
        self.keep.update(chains)
        kept.extend(chains)
        layers = [
            Layer(descriptor, diff, chain, progress, LayerProgress(descriptor.digest, descriptor.size))
            for descriptor, diff, chain in zip(manifest.layers, diffs, chains, strict=True)
        ]
        for layer in layers:
            if self._snapshots.get(layer.chain_id) is not None:
                layer.progress.phase = Phase.EXISTS
        progress.layers = [layer.progress for layer in layers]
        return layers

    async def _layers(self, source: Source, layers: list[Layer], unpacker: Unpacker) -> None:
        """Fetch the missing layers side by side, publish them bottom up."""
        mine: dict[str, asyncio.Future[None]] = {}
        for layer in layers:  # all at once, before anything is awaited: so that two pulls never wait for each other
            self._claim(layer.chain_id, mine)
        limit = asyncio.Semaphore(self._options.parallel_layers)
        tasks = [asyncio.create_task(self._obtain(source, unpacker, layer, mine, limit)) for layer in layers]
        try:
            for position, layer in enumerate(layers):
                await _first_failure(tasks, tasks[position])
                await self._publish(unpacker, layers, position)
                _release(self._claims, mine, layer.chain_id)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            for layer in layers:
                _release(self._claims, mine, layer.chain_id)
                if layer.path is not None:
                    self._snapshots.abandon(layer.path)
            self._snapshots.empty_trash()

    def _claim(self, chain_id: str, mine: dict[str, asyncio.Future[None]]) -> bool:
        if self._snapshots.get(chain_id) is None and chain_id not in self._claims:
            self._claims[chain_id] = mine[chain_id] = asyncio.get_running_loop().create_future()
        return chain_id in mine

    async def _obtain(
        self, source: Source, unpacker: Unpacker, layer: Layer, mine: dict[str, asyncio.Future[None]], limit: asyncio.Semaphore
    ) -> None:
        """Return when the layer is published by somebody, or unpacked by us."""
        while self._snapshots.get(layer.chain_id) is None:
            if self._claim(layer.chain_id, mine):
                async with limit:
                    await fetch(layer, source, unpacker, self._snapshots, self._partials, self._options.limits)
                return
            await asyncio.wait([self._claims[layer.chain_id]])
        layer.progress.phase = Phase.EXISTS

    async def _publish(self, unpacker: Unpacker, layers: list[Layer], position: int) -> None:
        layer = layers[position]
        if layer.path is None or layer.unpacked is None:
            return
        if layer.unpacked.implicit:
            below = [self._snapshots.place(lower.chain_id) for lower in reversed(layers[:position])]
            await unpacker.settle(layer.number, layer.path / "fs", self._snapshots.directory, below)
        if self._snapshots.get(layer.chain_id) is None:
            self._snapshots.commit(
                layer.path,
                Meta(
                    chain_id=layer.chain_id,
                    diff_id=layer.diff_id,
                    blob=layer.descriptor.digest,
                    blob_size=layer.descriptor.size,
                    bytes=layer.unpacked.bytes,
                    inodes=layer.unpacked.inodes,
                    boot=boot_id(),
                ),
            )
            layer.path = None
            if layer.descriptor.size >= WORTH:
                self._partials.drop(layer.descriptor.digest)

    async def _make_durable(self) -> None:
        """syncfs after a pull. Pulls that end while one waits for its turn are covered by that one."""
        if self._flush_waiting:
            return
        self._flush_waiting = True
        async with self._flushing, self._helper.lease() as unpacker:
            self._flush_waiting = False
            chains = self._snapshots.not_durable()
            await unpacker.sync(self._snapshots.directory)
            self._snapshots.mark_durable(chains)

    async def close(self) -> None:
        """Cancel what is in flight and wait for it."""
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A flush of a slow disk is not worth waiting for: what it would have marked is only trusted until the next reboot.
        for _ in range(2):  # the second time for what was cancelled after the first
            if self._background:
                await asyncio.wait(set(self._background), timeout=_PATIENCE)
            for background in self._background:
                background.cancel()
        await self._helper.close()


def _release(claims: dict[str, asyncio.Future[None]], mine: dict[str, asyncio.Future[None]], chain_id: str) -> None:
    future = mine.pop(chain_id, None)
    if future is not None:
        del claims[chain_id]
        future.set_result(None)


async def _first_failure(tasks: list[asyncio.Task[None]], wanted: asyncio.Task[None]) -> None:
    """Wait for one task, but fail as soon as any of them does."""
    pending = {t for t in tasks if not t.done()}
    for task in tasks:
        if task.done():
            task.result()
    while not wanted.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def _check_platform(config: dict[str, Any], wanted: Platform) -> None:
    """A single manifest comes without a platform; its config has one."""
    system, machine = config.get("os") or "linux", config.get("architecture") or wanted.architecture
    if (system, machine) != (wanted.os, wanted.architecture):
        raise Failure("choose platform", message=f"the image is for {system}/{machine}, this node is {wanted.os}/{wanted.architecture}")
