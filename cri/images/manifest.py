"""Manifests and indexes of the OCI image-spec and of Docker schema 2: parsing with every field checked, platform choice."""

from __future__ import annotations

import json
import platform as _platform
from dataclasses import dataclass
from typing import Any

from cri.images.reference import is_digest
from shim.errors import Failure

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_SCHEMA1 = ("application/vnd.docker.distribution.manifest.v1+json", "application/vnd.docker.distribution.manifest.v1+prettyjws")

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
ACCEPT = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST, "*/*;q=0.1"))
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)
_OCI_LAYER, _OCI_FOREIGN = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER, _DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar"
LAYERS = frozenset(
    {f"{base}{suffix}" for base in (_OCI_LAYER, _OCI_FOREIGN) for suffix in ("", "+gzip", "+zstd")}
    | {f"{base}{suffix}" for base in (_DOCKER_LAYER, _DOCKER_FOREIGN) for suffix in ("", ".gzip", ".zstd")}
)

# Annotations that name an artifact's file: image-spec's, and ModelPack's.
TITLES = ("org.opencontainers.image.title", "org.cncf.model.filepath")

MANIFEST_LIMIT = 4 << 20  # bytes; distribution-spec: registries should accept 4 MiB
CONFIG_LIMIT = 8 << 20
LAYER_LIMIT = 500  # overlayfs stacks at most 500 lower layers
INDEX_LIMIT = 4096
_PHASE = "read manifest"


@dataclass(frozen=True, slots=True)
class Platform:
    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(p for p in (self.os, self.architecture, self.variant) if p)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by digest. Its ``urls`` are never read: a foreign URL is somewhere else to leak credentials to (CVE-2020-15157)."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    title: str = ""  # of a file in an artifact


@dataclass(frozen=True, slots=True)
class Manifest:
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = ""  # not empty: no image, and its layers are blobs of any kind


@dataclass(frozen=True, slots=True)
class Index:
    media_type: str
    manifests: tuple[Descriptor, ...]


def parse(content_type: str, body: bytes) -> Manifest | Index:
    """The document, checked against the Content-Type it came with.

    CVE-2021-41190: one document may read as an index to one client and as a manifest to another, so the type is what the
    registry declared, the document must not contradict it, and fields of the other kind are refused.
    """
    declared = content_type.partition(";")[0].strip().lower()
    document = load(body, MANIFEST_LIMIT, "manifest")
    inner = document.get("mediaType")
    if inner is not None and not isinstance(inner, str):
        raise Failure(_PHASE, path="mediaType", message="not a string")
    if declared in DOCKER_SCHEMA1 or document.get("schemaVersion") == 1:
        raise Failure(
            _PHASE, message="Docker image manifest version 2, schema 1 is not supported", hint="push the image again with a current tool"
        )
    if document.get("schemaVersion") != 2:
        raise Failure(_PHASE, path="schemaVersion", message="not 2")
    if declared not in MANIFESTS + INDEXES:
        # Some registries answer application/json; then the document's own type is all there is.
        if declared not in ("", "application/json", "text/plain", "application/octet-stream") or not inner:
            raise Failure(_PHASE, message=f"media type {declared or 'none'!r} is no image manifest or index")
        declared = inner
    if inner and inner != declared:
        raise Failure(_PHASE, path="mediaType", message=f"document says {inner!r} but was served as {declared!r}")
    is_index = declared in INDEXES
    if is_index and ("layers" in document or "config" in document):
        raise Failure(_PHASE, message="an index that also has the fields of a manifest")
    if declared in MANIFESTS and ("manifests" in document or "fsLayers" in document):
        raise Failure(_PHASE, message="a manifest that also has the fields of an index")
    if is_index:
        entries = _list(document, "manifests", INDEX_LIMIT)
        return Index(declared, tuple(_descriptor(e, f"manifests[{i}]") for i, e in enumerate(entries)))
    if declared not in MANIFESTS:
        raise Failure(_PHASE, message=f"media type {declared!r} is no image manifest or index")
    return _manifest(declared, document)


def _manifest(media_type: str, document: dict[str, Any]) -> Manifest:
    config = _descriptor(document.get("config"), "config")
    if config.media_type not in CONFIGS and media_type == OCI_MANIFEST:
        return _artifact(media_type, document, config)
    if config.media_type not in CONFIGS:
        raise Failure(_PHASE, path="config.mediaType", message=f"{config.media_type!r}: not a container image")
    if config.size > CONFIG_LIMIT:
        raise Failure(_PHASE, path="config.size", message=f"{config.size} bytes, limit {CONFIG_LIMIT}")
    layers = tuple(_descriptor(e, f"layers[{i}]") for i, e in enumerate(_list(document, "layers", LAYER_LIMIT)))
    for i, layer in enumerate(layers):
        if layer.media_type not in LAYERS:
            raise Failure(_PHASE, path=f"layers[{i}].mediaType", message=f"{layer.media_type!r} is no layer")
    return Manifest(media_type, config, layers)


def _artifact(media_type: str, document: dict[str, Any], config: Descriptor) -> Manifest:
    """image-spec manifest.md, "Guidelines for Artifact Usage": the type is ``artifactType``, before 1.1 the config's."""
    kind = document.get("artifactType") or config.media_type
    if not isinstance(kind, str):
        raise Failure(_PHASE, path="artifactType", message="not a string")
    blobs = _list(document, "layers", INDEX_LIMIT)
    return Manifest(media_type, config, tuple(_descriptor(e, f"layers[{i}]") for i, e in enumerate(blobs)), kind)


def diff_ids(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    """``rootfs.diff_ids`` of an image config, one for each layer of its manifest."""
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if found is None and layers == 0:
        return ()
    if not isinstance(found, list) or not all(isinstance(d, str) and is_digest(d) for d in found):
        raise Failure("read image config", path="rootfs.diff_ids", message="not a list of digests")
    if len(found) != layers:
        raise Failure("read image config", path="rootfs.diff_ids", message=f"{len(found)} diff ids for {layers} layers")
    return tuple(found)


def load(body: bytes, limit: int, what: str) -> dict[str, Any]:
    """A JSON object of at most ``limit`` bytes."""
    if len(body) > limit:
        raise Failure(f"read {what}", message=f"{len(body)} bytes, limit {limit}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure(f"read {what}", message=f"not JSON: {type(error).__name__}") from error
    if not isinstance(document, dict):
        raise Failure(f"read {what}", message="not a JSON object")
    return document


def host_platform() -> Platform:
    """This machine, in Go's names."""
    machine = _platform.machine()
    table = {
        "x86_64": ("amd64", ""),
        "aarch64": ("arm64", "v8"),
        "armv7l": ("arm", "v7"),
        "armv6l": ("arm", "v6"),
        "ppc64le": ("ppc64le", ""),
        "s390x": ("s390x", ""),
        "riscv64": ("riscv64", ""),
        "loongarch64": ("loong64", ""),
    }
    architecture, variant = table.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def choose(index: Index, wanted: Platform) -> Descriptor:
    """The best entry for ``wanted``: exact variant, then no variant, then older variants this machine can run; the first among equals."""
    best: tuple[int, Descriptor] | None = None
    for entry in index.manifests:
        if entry.media_type not in MANIFESTS + INDEXES:
            continue
        rank = _rank(entry.platform, wanted)
        if rank is not None and (best is None or rank < best[0]):
            best = (rank, entry)
    if best is None:
        offered = sorted({str(e.platform) for e in index.manifests if e.platform and e.platform.os != "unknown"})
        raise Failure("choose platform", message=f"no image for {wanted}; the index has {', '.join(offered) or 'none'}")
    return best[1]


def _rank(offer: Platform | None, wanted: Platform) -> int | None:
    if offer is None:
        return 100  # no platform at all: usable when nothing says it fits
    if (offer.os, offer.architecture) != (wanted.os, wanted.architecture):
        return None
    default = {"arm64": "v8", "arm": "v7", "amd64": "v1"}.get(wanted.architecture, "")
    want, have = wanted.variant or default, offer.variant or default
    if want == have:
        return 0 if offer.variant == wanted.variant else 1
    if want[:1] == have[:1] == "v" and want[1:].isdigit() and have[1:].isdigit() and int(have[1:]) < int(want[1:]):
        return 1 + int(want[1:]) - int(have[1:])
    return None


def _list(document: dict[str, Any], name: str, limit: int) -> list[Any]:
    found = document.get(name)
    if not isinstance(found, list):
        raise Failure(_PHASE, path=name, message="not a list")
    if len(found) > limit:
        raise Failure(_PHASE, path=name, message=f"{len(found)} entries, limit {limit}")
    return found


def _descriptor(raw: object, where: str) -> Descriptor:
    if not isinstance(raw, dict):
        raise Failure(_PHASE, path=where, message="not an object")
    media_type, digest, size = raw.get("mediaType"), raw.get("digest"), raw.get("size")
    if not isinstance(media_type, str) or not media_type:
        raise Failure(_PHASE, path=f"{where}.mediaType", message="not a string")
    if not isinstance(digest, str) or not is_digest(digest):
        raise Failure(_PHASE, path=f"{where}.digest", message="not a digest")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Failure(_PHASE, path=f"{where}.size", message="not a size in bytes")
    return Descriptor(media_type, digest, size, _platform_of(raw.get("platform"), where), _title(raw.get("annotations"), where))


def _title(annotations: object, where: str) -> str:
    if annotations is None:
        return ""
    if not isinstance(annotations, dict):
        raise Failure(_PHASE, path=f"{where}.annotations", message="not an object")
    title = next((annotations[name] for name in TITLES if annotations.get(name)), "")
    if not isinstance(title, str):
        raise Failure(_PHASE, path=f"{where}.annotations", message="not strings")
    return title


def _platform_of(raw: object, where: str) -> Platform | None:
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise Failure(_PHASE, path=f"{where}.platform", message="not an object")
    parts = [raw.get(k) or "" for k in ("os", "architecture", "variant")]
    if not all(isinstance(p, str) for p in parts):
        raise Failure(_PHASE, path=f"{where}.platform", message="not strings")
    return Platform(*parts)
