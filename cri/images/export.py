"""Archives of images, made from their snapshots. Runs in the command, as root, not in the daemon.

The store keeps layers unpacked and nothing of how their archives were put together, so each is written anew: members by name, hard
links, attributes and nanoseconds kept, whiteouts as the image-spec has them. Such a layer has a diff id of its own, and the image
therefore an id of its own; importing and exporting that one again changes nothing any more.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from cri.images import manifest as manifests
from cri.images.layertar import write_layer

Format = Literal["oci-archive", "oci-dir", "docker-archive"]
Compression = Literal["gzip", "zstd", "none"]
_TYPE = "application/vnd.oci.image.layer.v1.tar"
_TYPES = {"gzip": f"{_TYPE}+gzip", "zstd": f"{_TYPE}+zstd", "none": _TYPE}
_REF_NAME, _NAME = "org.opencontainers.image.ref.name", "io.containerd.image.name"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. ``id`` differs from the image's own where its layers had to be made anew."""

    id: str
    digest: str  # of the manifest; empty for a docker archive
    size: int


class _Blob:
    """A blob on its way to the disk: hashed before and after compression."""

    def __init__(self, file: IO[bytes], compression: Compression) -> None:
        self.file = file
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self.size = 0
        self._compressor: Any = None
        if compression == "gzip":
            self._compressor = _gzip(_Raw(self))
        elif compression == "zstd":
            import zstandard

            raw: Any = _Raw(self)
            self._compressor = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)

    def write(self, data: bytes) -> int:
        self._plain.update(data)
        if self._compressor is None:
            self.pass_on(data)
        else:
            self._compressor.write(data)
        return len(data)

    def pass_on(self, data: bytes) -> None:
        self._packed.update(data)
        self.size += len(data)
        self.file.write(data)

    def finish(self) -> None:
        if self._compressor is not None:
            self._compressor.close()
        self.file.flush()

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._plain.hexdigest()}"

    @property
    def digest(self) -> str:
        return f"sha256:{self._packed.hexdigest()}"


def _gzip(raw: Any) -> Any:
    """Without name and time, so that the same content has the same digest."""
    try:
        from isal import igzip
    except ImportError:  # no wheel for this machine
        import gzip

        return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)
    make: Any = igzip.IGzipFile
    return make(filename="", mode="wb", compresslevel=2, fileobj=raw, mtime=0)


class _Raw(io.RawIOBase):
    """The end of a compressor."""

    def __init__(self, blob: _Blob) -> None:
        self._blob = blob

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._blob.pass_on(bytes(data))
        return len(data)


def export(target: Path, format: Format, compression: Compression, config: bytes, layers: Sequence[str], names: Sequence[str]) -> Exported:
    """Write the image of these ``layers`` (directories, bottom first) to ``target``, which must not exist. Raises OSError."""
    if format == "oci-dir":
        os.mkdir(target, 0o755)
        try:
            return _oci(_Directory(target), compression, config, layers, names)
        except BaseException:
            _remove(target)
            raise
    temporary = target.with_name(f".{target.name[:64]}.{os.getpid()}")
    try:
        with open(temporary, "xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            store = _Tar(archive, target.parent)
            made = _docker(store, config, layers, names) if format == "docker-archive" else _oci(store, compression, config, layers, names)
        os.link(temporary, target)  # unlike rename, not over a file that somebody has made meanwhile
        return made
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _oci(store: _Directory | _Tar, compression: Compression, config: bytes, layers: Sequence[str], names: Sequence[str]) -> Exported:
    written = list(_layers(store, compression, layers, lambda blob: f"blobs/sha256/{blob.digest[7:]}"))
    config = _config(config, [b.diff_id for b in written])
    described = [{"mediaType": _TYPES[compression], "digest": b.digest, "size": b.size} for b in written]
    config_digest = _sha256(config)
    store.put(f"blobs/sha256/{config_digest[7:]}", config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifests.OCI_MANIFEST,
        "config": {"mediaType": manifests.OCI_CONFIG, "digest": config_digest, "size": len(config)},
        "layers": described,
    }
    body = json.dumps(manifest).encode()
    digest = _sha256(body)
    store.put(f"blobs/sha256/{digest[7:]}", body)
    entry = {"mediaType": manifests.OCI_MANIFEST, "digest": digest, "size": len(body)}
    # ref.name is the tag alone for skopeo and umoci, which look for an image by it; containerd's annotation has the whole name.
    entries = [{**entry, "annotations": {_NAME: n, _REF_NAME: n.rpartition(":")[2]}} for n in names] or [entry]
    store.put("index.json", json.dumps({"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": entries}).encode())
    store.put("oci-layout", _LAYOUT)
    return Exported(config_digest, digest, len(body) + len(config) + sum(b.size for b in written))


def _docker(store: _Tar, config: bytes, layers: Sequence[str], names: Sequence[str]) -> Exported:
    written = list(_layers(store, "none", layers, lambda blob: f"{blob.digest[7:]}/layer.tar"))
    config = _config(config, [b.diff_id for b in written])
    name = f"{_sha256(config)[7:]}.json"
    store.put(name, config)
    # Docker's own short names for its Hub.
    tags = [n.removeprefix("docker.io/library/").removeprefix("docker.io/") for n in names]
    entry = {"Config": name, "RepoTags": tags, "Layers": [f"{b.digest[7:]}/layer.tar" for b in written]}
    store.put("manifest.json", json.dumps([entry]).encode())
    return Exported(_sha256(config), "", len(config) + sum(b.size for b in written))


def _layers(store: _Directory | _Tar, compression: Compression, layers: Sequence[str], name: Any) -> Iterator[_Blob]:
    for directory in layers:
        with store.scratch() as file:
            blob = _Blob(file, compression)
            write_layer(directory, blob)
            blob.finish()
            store.keep(name(blob), file)
            yield blob


def _config(config: bytes, diff_ids: list[str]) -> bytes:
    """The config with the diff ids that its layers now have; to the byte the same if they have not changed."""
    document = json.loads(config)
    if document.get("rootfs", {}).get("diff_ids", []) == diff_ids:
        return config
    document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    return json.dumps(document).encode()


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# -- where it goes ----------------------------------------------------------------------------------------------------------


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path
        (path / "blobs" / "sha256").mkdir(parents=True)

    def scratch(self) -> IO[bytes]:
        return open(self._path / "blobs" / "sha256" / "unfinished", "w+b")

    def keep(self, name: str, file: IO[bytes]) -> None:
        os.rename(self._path / "blobs" / "sha256" / "unfinished", self._path / name)

    def put(self, name: str, data: bytes) -> None:
        (self._path / name).write_bytes(data)


class _Tar:
    """Each layer is in a nameless file first: a tar header comes before the data, and wants size and name."""

    def __init__(self, archive: tarfile.TarFile, scratch: Path) -> None:
        self._archive, self._scratch = archive, scratch
        self._there: set[str] = set()

    def scratch(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._scratch)

    def keep(self, name: str, file: IO[bytes]) -> None:
        size = file.tell()
        file.seek(0)
        self._add(name, size, file)

    def put(self, name: str, data: bytes) -> None:
        self._add(name, len(data), io.BytesIO(data))

    def _add(self, name: str, size: int, file: IO[bytes]) -> None:
        if name in self._there:
            return
        self._there.add(name)
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        self._archive.addfile(info, file)


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
