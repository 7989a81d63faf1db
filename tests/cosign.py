"""Signs images as cosign does, with openssl, and pushes the signatures where cosign does."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hack.images import Assembled, Descriptor
from tests.registry import DockerRegistry

Kind = Literal["ecdsa", "rsa", "ed25519"]
_GENERATE = {
    "ecdsa": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "rsa": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
    "ed25519": ("-algorithm", "ED25519"),
}


@dataclass(frozen=True)
class Signer:
    """A key pair in files."""

    private: Path
    public: Path
    kind: Kind

    @classmethod
    def make(cls, directory: Path, name: str = "cosign", kind: Kind = "ecdsa") -> Signer:
        made = cls(directory / f"{name}.key", directory / f"{name}.pub", kind)
        _openssl("genpkey", *_GENERATE[kind], "-out", str(made.private))
        _openssl("pkey", "-in", str(made.private), "-pubout", "-out", str(made.public))
        return made

    def sign(self, payload: bytes) -> bytes:
        if self.kind != "ed25519":
            return _openssl("dgst", "-sha256", "-sign", str(self.private), stdin=payload)
        message = self.private.with_suffix(".message")  # pkeyutl wants to know the length
        message.write_bytes(payload)
        return _openssl("pkeyutl", "-sign", "-rawin", "-inkey", str(self.private), "-in", str(message))


def _openssl(*arguments: str, stdin: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *arguments], input=stdin, check=True, capture_output=True, timeout=20).stdout


def payload(reference: str, digest: str) -> bytes:
    critical = {
        "identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature",
    }
    return json.dumps({"critical": critical, "optional": None}).encode()


def signature_image(*signed: tuple[bytes, bytes]) -> Assembled:
    """The manifest of (payload, signature) pairs."""
    kind, blobs, layers = "application/vnd.oci.image.manifest.v1+json", {}, []
    config = b'{"architecture":"","os":"","config":{},"rootfs":{"type":"layers","diff_ids":[]}}'
    for body, signature in signed:
        blobs[_digest(body)] = body
        described = Descriptor("application/vnd.dev.cosign.simplesigning.v1+json", _digest(body), len(body))
        layers.append(described.to_json(annotations={"dev.cosignproject.cosign/signature": base64.b64encode(signature).decode()}))
    blobs[_digest(config)] = config
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": Descriptor("application/vnd.oci.image.config.v1+json", _digest(config), len(config)).to_json(),
        "layers": layers,
    }
    return Assembled(kind, json.dumps(manifest).encode(), blobs)


def sign(registry: DockerRegistry, name: str, digest: str, *signers: Signer, reference: str = "", claimed: str = "") -> None:
    """Sign ``digest`` of a repository. By default as cosign does: for the repository without tag; ``reference`` and ``claimed`` (the
    digest in the claim) may say something else."""
    repository = name.partition(":")[0]
    body = payload(reference or f"{registry.host}/{repository}", claimed or digest)
    registry.push(signature_image(*((body, s.sign(body)) for s in signers)), f"{repository}:{digest.replace(':', '-')}.sig")


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
