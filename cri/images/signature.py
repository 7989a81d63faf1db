"""cosign signatures in a registry: where they are, what they claim, and whether a key made them.

The signatures of ``sha256:<hex>`` are the layers of the manifest tagged ``sha256-<hex>.sig`` in the same repository: each blob is the
signed claim (containers' "simple signing" JSON), its annotation the signature. Loaded only where a policy asks for signatures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from cri.errors import ImageNotFound
from cri.images.manifest import MANIFEST_LIMIT, load
from cri.images.model import Signature
from cri.images.reference import is_digest

_MEDIA_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
_ANNOTATION = "dev.cosignproject.cosign/signature"
_TYPE = "cosign container image signature"
_COUNT, _PAYLOAD_LIMIT = 64, 64 << 10
_RSA_BITS = 2048


class Source(Protocol):
    """The repository an image comes from."""

    async def document(self, selector: str, *, capability: str = "pull") -> Any: ...

    async def small_blob(self, digest: str, size: int) -> bytes: ...


class BadKey(ValueError):
    """Not a public key this program can verify with."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key; ``name`` is what people call it."""

    name: str
    public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

    def made(self, signature: bytes, payload: bytes) -> bool:
        try:
            if isinstance(self.public, ec.EllipticCurvePublicKey):
                self.public.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
            elif isinstance(self.public, rsa.RSAPublicKey):
                self.public.verify(signature, payload, padding.PKCS1v15(), hashes.SHA256())
            else:
                self.public.verify(signature, payload)
        except InvalidSignature:
            return False
        return True


def load_key(name: str, pem: bytes) -> Key:
    try:
        found = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKey("not a public key in PEM") from error
    if not isinstance(found, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey)):
        raise BadKey("not an ECDSA, RSA or Ed25519 key")
    if isinstance(found, rsa.RSAPublicKey) and found.key_size < _RSA_BITS:
        raise BadKey(f"RSA with less than {_RSA_BITS} bits")
    if not name:
        der = found.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        name = f"keyData sha256:{hashlib.sha256(der).hexdigest()[:16]}"
    return Key(name, found)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a signature says: this digest is this reference."""

    reference: str
    digest: str


def claim(payload: bytes) -> Claim | None:
    """The claim of a payload, or None if it is not one for an image. Only to be believed once a key has verified the payload."""
    try:
        critical = json.loads(payload)["critical"]
        found = Claim(critical["identity"]["docker-reference"], critical["image"]["docker-manifest-digest"])
        kind = critical["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if kind != _TYPE or not isinstance(found.reference, str) or not isinstance(found.digest, str) or not is_digest(found.digest):
        return None
    return found


def tag_of(digest: str) -> str:
    return f"{digest.replace(':', '-')}.sig"


async def fetch(source: Source, digest: str) -> list[Signature]:
    """The signatures of a manifest or index; none is not an error, a registry that does not answer is."""
    try:
        document = await source.document(tag_of(digest))
    except ImageNotFound:
        return []
    layers = load(document.body, MANIFEST_LIMIT, "signature manifest").get("layers")
    found = []
    for layer in layers[:_COUNT] if isinstance(layers, list) else []:
        if (described := _described(layer)) is None:
            continue
        blob, size, signature = described
        found.append(Signature(await source.small_blob(blob, size), signature))
    return found


def _described(layer: object) -> tuple[str, int, bytes] | None:
    """Digest and size of the payload, and the signature; None for a layer that is something else."""
    if not isinstance(layer, dict) or layer.get("mediaType") != _MEDIA_TYPE:
        return None
    digest, size, annotations = layer.get("digest"), layer.get("size"), layer.get("annotations")
    if not isinstance(digest, str) or not is_digest(digest) or not isinstance(size, int) or not 0 < size <= _PAYLOAD_LIMIT:
        return None
    text = annotations.get(_ANNOTATION) if isinstance(annotations, dict) else None
    try:
        return (digest, size, base64.b64decode(text, validate=True)) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        return None
