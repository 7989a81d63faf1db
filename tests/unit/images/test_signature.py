import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import signature
from cri.images.signature import BadKey, Claim

DIGEST = "sha256:" + "a" * 64
GOOD = {
    "critical": {
        "identity": {"docker-reference": "reg.example/app"},
        "image": {"docker-manifest-digest": DIGEST},
        "type": "cosign container image signature",
    }
}


def test_claims() -> None:
    assert signature.claim(json.dumps(GOOD).encode()) == Claim("reg.example/app", DIGEST)
    for path, value in (("type", "atomic container signature"), ("image", {"docker-manifest-digest": "sha256:../x"}), ("identity", [])):
        bad = {"critical": {**GOOD["critical"], path: value}}
        assert signature.claim(json.dumps(bad).encode()) is None
    assert signature.claim(b"[" * 100_000) is None
    assert signature.tag_of(DIGEST) == f"sha256-{'a' * 64}.sig"


@given(st.binary(max_size=100) | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps({"critical": x}).encode()))
def test_any_payload_is_survived(payload: bytes) -> None:
    assert signature.claim(payload) is None


@pytest.mark.parametrize(
    "pem, why",
    [
        (b"", "not a public key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a public key in PEM"),
    ],
)
def test_keys_that_are_none(pem: bytes, why: str) -> None:
    with pytest.raises(BadKey, match=why):
        signature.load_key("k", pem)


def test_a_weak_key_is_refused() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa, x25519

    def pem(key: rsa.RSAPrivateKey | x25519.X25519PrivateKey) -> bytes:
        return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    with pytest.raises(BadKey, match="less than 2048 bits"):
        signature.load_key("k", pem(rsa.generate_private_key(65537, 1024)))
    with pytest.raises(BadKey, match="not an ECDSA, RSA or Ed25519 key"):
        signature.load_key("k", pem(x25519.X25519PrivateKey.generate()))
