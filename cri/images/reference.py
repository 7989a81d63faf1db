"""Image references: the grammar of distribution/reference, normalised the way Docker and containerd do.

``busybox`` is ``docker.io/library/busybox:latest``; a reference with a tag and a digest keeps only the digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEX_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
_DIGEST = re.compile(r"(sha256|sha384|sha512):([0-9a-f]+)", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_NAME_LIMIT = 255

DEFAULT_DOMAIN = "docker.io"


class BadReference(ValueError):
    """The text is not an image reference; the message names the part and the rule."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised reference. Exactly one of ``tag`` and ``digest`` is set."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.path}"

    @property
    def selector(self) -> str:
        """What the registry's manifests endpoint takes."""
        return self.digest or self.tag

    def with_digest(self, digest: str) -> str:
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def is_digest(text: str) -> bool:
    """A digest of a known algorithm with lower-case hex of exactly its length (CVE-2024-3727: it becomes a file name)."""
    match = _DIGEST.fullmatch(text)
    return match is not None and len(match[2]) == _HEX_LENGTHS[match[1]]


def is_image_id(text: str) -> bool:
    """``sha256:<hex>`` or the 64 hex digits alone."""
    return _ID.fullmatch(text.removeprefix("sha256:")) is not None


def parse(text: str) -> Reference:
    """The normalised reference, or BadReference."""
    if not text:
        raise BadReference("image reference is empty")
    if len(text) > 1024:
        raise BadReference("image reference is longer than 1024 characters")
    if is_image_id(text):
        raise BadReference(f"{text!r} is an image id, not a reference")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise BadReference(f"{_short(text)}: digest is not sha256, sha384 or sha512 with lower-case hex of its length")
    # A colon after the last slash separates a tag; before it, a port.
    head, colon, tag = rest.rpartition(":")
    if colon and "/" not in tag:
        rest = head
        if _TAG.fullmatch(tag) is None:
            raise BadReference(f"{_short(text)}: tag is not one word character followed by up to 127 of [A-Za-z0-9_.-]")
    else:
        tag = ""
    domain, path = _split_domain(rest)
    if _DOMAIN.fullmatch(domain) is None:
        raise BadReference(f"{_short(text)}: {_short(domain)} is not a host name")
    for component in path.split("/"):
        if _PATH.fullmatch(component) is None:
            raise BadReference(
                f"{_short(text)}: repository component {_short(component)} must be lower-case letters and digits with separators"
            )
    if len(path) > _NAME_LIMIT:
        raise BadReference(f"{_short(text)}: repository is longer than {_NAME_LIMIT} characters")
    if digest:
        return Reference(domain, path, digest=digest)
    return Reference(domain, path, tag=tag or "latest")


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        first, rest = DEFAULT_DOMAIN, name
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
