"""What an image is to the rest of the daemon: a frozen record, written as JSON by the store, read by the CRI mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shim.errors import Failure


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The runtime part of an image's config (OCI image-spec config.md, ``config``)."""

    user: str = ""  # "uid", "name", "uid:gid", "name:group"
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()  # sorted
    exposed_ports: tuple[str, ...] = ()  # "80/tcp", sorted
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """One image in the store. ``id`` is the digest of its config: the one image id every RPC answers with."""

    id: str  # "sha256:<hex>"
    repo_tags: tuple[str, ...] = ()  # "docker.io/library/busybox:latest"
    repo_digests: tuple[str, ...] = ()  # "docker.io/library/busybox@sha256:<hex>"
    size: int = 0  # bytes fetched: manifest + config + compressed layers, as containerd counts it
    config: ImageConfig = field(default_factory=ImageConfig)
    chain_ids: tuple[str, ...] = ()  # bottom first
    pinned: bool = False
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str = ""  # RFC 3339, as the config says
    manifest_digest: str = ""  # of the manifest of this platform
    pulled_at: int = 0  # ns since the epoch
    artifact_type: str = ""  # not empty: an OCI artifact, which can only be a volume; ``id`` is the manifest's digest then

    @property
    def ref(self) -> str:
        """What ContainerStatus.image_ref says: the first repo digest, else the id (as containerd)."""
        return self.repo_digests[0] if self.repo_digests else self.id


@dataclass(frozen=True, slots=True)
class Signature:
    """A signed claim about an image, as the registry had it; nothing in it is believed before a key has verified it."""

    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """What is on disk about one image. Everything in it can be read with ``cat``."""

    image: Image
    manifest_type: str
    config_digest: str
    layers: tuple[str, ...]  # digests of the compressed layers, bottom first
    signatures: tuple[Signature, ...] = ()  # found when a policy wanted them
    version: int = 1


def config_from_json(document: dict[str, Any]) -> ImageConfig:
    """The runtime config of a whole image config document; a wrong type or an unusable string is a Failure naming the field."""
    raw = document.get("config")
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise Failure("read image config", path="config", message="not an object")
    labels = raw.get("Labels") or {}
    if not isinstance(labels, dict):
        raise Failure("read image config", path="config.Labels", message="not an object")
    return ImageConfig(
        user=_text(raw.get("User"), "config.User"),
        env=_texts(raw.get("Env"), "config.Env"),
        entrypoint=_texts(raw.get("Entrypoint"), "config.Entrypoint"),
        cmd=_texts(raw.get("Cmd"), "config.Cmd"),
        working_dir=_text(raw.get("WorkingDir"), "config.WorkingDir"),
        volumes=_keys(raw.get("Volumes"), "config.Volumes"),
        exposed_ports=_keys(raw.get("ExposedPorts"), "config.ExposedPorts"),
        labels={_text(k, "config.Labels"): _text(v, f"config.Labels[{k!r}]") for k, v in labels.items()},
        stop_signal=_text(raw.get("StopSignal"), "config.StopSignal"),
    )


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Failure("read image config", path=where, message="not a string")
    # These strings become execve arguments and protobuf strings: NUL and lone surrogates fit neither.
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise Failure("read image config", path=where, message="contains NUL or is not valid Unicode")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Failure("read image config", path=where, message="not a list")
    return tuple(_text(item, f"{where}[{i}]") for i, item in enumerate(value))


def _keys(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list):  # some builders write lists; Docker accepts them
        return tuple(sorted(_texts(value, where)))
    if not isinstance(value, dict):
        raise Failure("read image config", path=where, message="not an object")
    return tuple(sorted(_text(k, where) for k in value))
