import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import policy, reference
from cri.images.policy import Accept, BadPolicy, Identity, KeySource, Policy, Reject, Sigstore

ACCEPT, REJECT = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]


def made(default: Any = REJECT, **scopes: Any) -> Policy:
    return policy.parse(json.dumps({"default": default, "transports": {"docker": scopes}}).encode())


def test_the_most_specific_scope() -> None:
    names = [
        "reg.example/team/app:v1",
        "reg.example/team/app",
        "reg.example/team",
        "reg.example",
        "*.example",
        "",
    ]
    wanted = reference.parse("reg.example/team/app:v1")
    while names:
        found = made(**dict.fromkeys(names, ACCEPT), **{"reg.example:5000": REJECT, "reg.example/tea": REJECT, "*.other.example": REJECT})
        assert found.match(wanted) == (f"docker scope {names[0]!r}", (Accept(),))
        names.pop(0)
    assert made().match(wanted) == ("default", (Reject(),))
    digest = "sha256:" + "a" * 64
    assert made(**{f"reg.example/app@{digest}": ACCEPT}).match(reference.parse(f"reg.example/app@{digest}"))[1] == (Accept(),)
    assert made(**{"docker.io/library": ACCEPT}).match(reference.parse("busybox"))[1] == (Accept(),)
    assert made(**{"*.example:5000": ACCEPT}).match(reference.parse("a.b.example:5000/x"))[1] == (Accept(),)
    assert made(**{"*.example": ACCEPT}).match(reference.parse("example/x"))[1] == (Reject(),)


def test_keys() -> None:
    pem = base64.b64encode(b"PEM").decode()
    for fields, keys in (
        ({"keyPath": "/k"}, (KeySource("/k"),)),
        ({"keyPaths": ["/k", "/l"]}, (KeySource("/k"), KeySource("/l"))),
        ({"keyData": pem}, (KeySource(pem=b"PEM"),)),
        ({"keyDatas": [pem]}, (KeySource(pem=b"PEM"),)),
    ):
        assert made([{"type": "sigstoreSigned", **fields}]).default == (Sigstore(keys, Identity()),)


def test_requirements_of_other_transports_are_nobody_s_here() -> None:
    gpg = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]
    found = policy.parse(json.dumps({"default": REJECT, "transports": {"atomic": {"host:5000/x": gpg}, "dir": {"": ACCEPT}}}).encode())
    assert found.scopes == {} and found.default == (Reject(),)


@pytest.mark.parametrize(
    "text, where",
    [
        ("", "not JSON"),
        ("[]", "policy: not an object"),
        ("{}", "default: missing"),
        ('{"default": []}', "default: not a list"),
        ('{"default": [{"type": "reject"}], "x": 1}', "policy.x: not known"),
        ('{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}', "default: twice"),
        ('{"default": [{"type": "reject", "x": 1}]}', r"default\[0\].x: not known"),
        ('{"default": [{}]}', r"default\[0\].type: None"),
        ('{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]}', r"'signedBy' \(GPG\) is not supported"),
        ('{"default": [{"type": "sigstoreSigned"}]}', "exactly one of"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/k", "keyData": "eA=="}]}', "exactly one of"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "k"}]}', "not an absolute path"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/k", "x": 1}]}', "x: not known"),
        ('{"default": [{"type": "sigstoreSigned", "keyData": "!"}]}', "not base64"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/k", "fulcio": {}}]}', "fulcio: certificates"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/k", "rekorPublicKeyPath": "/r"}]}', "rekorPublicKeyPath: cert"),
        ('{"default": [{"type": "reject"}], "transports": {"docker": {"reg.example/": [{"type": "reject"}]}}}', "'reg.example/': not host"),
        ('{"default": [{"type": "reject"}], "transports": {"docker": {"busybox": [{"type": "reject"}]}}}', "'busybox': not host"),
        ('{"default": [{"type": "reject"}], "transports": {"docker": {"Reg.example/A": [{"type": "reject"}]}}}', "not host"),
        ('{"default": [{"type": "reject"}], "transports": {"docker": {"https://reg.example": [{"type": "reject"}]}}}', "not host"),
        ('{"default": [{"type": "reject"}], "transports": {"docker": {"*.a.example/x": [{"type": "reject"}]}}}', "not host"),
        ('{"default": [{"type": "reject"}], "transports": {"oci": {"/x": [{"type": "bad"}]}}}', "transports.oci.'/x'"),
    ],
)
def test_what_cannot_be_enforced_is_an_error(text: str, where: str) -> None:
    with pytest.raises(BadPolicy, match=where):
        policy.parse(text.encode())


@pytest.mark.parametrize(
    "identity, why",
    [
        ({"type": "x"}, "signedIdentity.type: 'x'"),
        ({"type": []}, r"signedIdentity.type: \[\]"),
        ({"type": "exactReference", "dockerReference": "a.b/c"}, "must have a tag"),
        ({"type": "exactRepository", "dockerRepository": "a.b/c:d"}, "must not have a tag"),
        ({"type": "exactRepository"}, "dockerRepository: not a string"),
        ({"type": "remapIdentity", "prefix": "a.b", "signedPrefix": "B/"}, "signedPrefix: not host"),
        ({"type": "remapIdentity", "prefix": "a.b/c:v1", "signedPrefix": "d.e"}, "must be a host"),
        ({"type": "remapIdentity", "prefix": "*.b", "signedPrefix": "d.e"}, "must be a host"),
        ({"type": "matchExact", "x": 1}, "x: not known"),
    ],
)
def test_identities_that_cannot_be_enforced(identity: object, why: str) -> None:
    with pytest.raises(BadPolicy, match=why):
        made([{"type": "sigstoreSigned", "keyPath": "/k", "signedIdentity": identity}])


DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    "identity, signed, wanted, accepted",
    [
        (Identity(), "reg.example/app:v1", "reg.example/app:v1", True),
        (Identity(), "reg.example/app:v2", "reg.example/app:v1", False),
        (Identity(), "reg.example/app", "reg.example/app:latest", False),
        (Identity(), "reg.example/app:v1", f"reg.example/app@{DIGEST}", True),
        (Identity(), "reg.example/app", f"reg.example/app@{DIGEST}", False),
        (Identity(), f"reg.example/app@sha256:{'b' * 64}", f"reg.example/app@{DIGEST}", True),
        (Identity(), f"reg.example/app:v1@{DIGEST}", "reg.example/app:v1", False),
        (Identity("matchExact"), f"reg.example/app:v1@{DIGEST}", f"reg.example/app@{DIGEST}", False),
        (Identity("matchRepository"), f"reg.example/app:v1@{DIGEST}", "reg.example/app:v2", True),
        (Identity(), "reg.example/other", f"reg.example/app@{DIGEST}", False),
        (Identity("matchExact"), "reg.example/app:v1", f"reg.example/app@{DIGEST}", False),
        (Identity("matchExact"), f"reg.example/app@{DIGEST}", f"reg.example/app@{DIGEST}", True),
        (Identity("matchExact"), "busybox", "docker.io/library/busybox:latest", False),
        (Identity("matchExact"), "busybox:1", "docker.io/library/busybox:1", True),
        (Identity("matchRepository"), "reg.example/app", "reg.example/app:v1", True),
        (Identity("matchRepository"), "reg.example/app:other", "reg.example/app:v1", True),
        (Identity("matchRepository"), "reg.example/app2", "reg.example/app:v1", False),
        (Identity("matchRepository"), "", "reg.example/app:v1", False),
        (Identity("matchRepository"), "a" * 64, "reg.example/app:v1", False),
        (Identity("exactReference", "reg.example/app:v1"), "reg.example/app:v1", "mirror.example/app:v9", True),
        (Identity("exactReference", "reg.example/app:v1"), "reg.example/app:v2", "mirror.example/app:v2", False),
        (Identity("exactRepository", "reg.example/app"), "reg.example/app:v2", "mirror.example/app:v1", True),
        (Identity("exactRepository", "reg.example/app"), "mirror.example/app:v1", "mirror.example/app:v1", False),
        (Identity("remapIdentity", "mirror.example", "reg.example"), "reg.example/a/b:v1", "mirror.example/a/b:v1", True),
        (Identity("remapIdentity", "mirror.example", "reg.example"), "reg.example/a/b:v2", "mirror.example/a/b:v1", False),
        (Identity("remapIdentity", "mirror.example/a", "reg.example"), "reg.example/b:v1", "mirror.example/ab:v1", False),
        (Identity("remapIdentity", "mirror.example", "reg.example"), "reg.example:5000/a:v1", "mirror.example:5000/a:v1", False),
        (Identity("remapIdentity", "mirror.example/a", "reg.example/b"), "reg.example/b:v1", "mirror.example/a:v1", True),
        (Identity("remapIdentity", "mirror.example/a:v", "reg.example/b:w"), "reg.example/b:w1", "mirror.example/a:v1", False),
        (Identity("remapIdentity", "mirror.example", "reg.example/x"), "other.example/a:v1", "other.example/a:v1", True),
    ],
)
def test_identities(identity: Identity, signed: str, wanted: str, accepted: bool) -> None:
    assert identity.accepts(signed, reference.parse(wanted)) is accepted


_WORDS = st.sampled_from(["default", "transports", "docker", "type", "reject", "sigstoreSigned", "keyPath", "*.a", "signedIdentity"])


@given(st.recursive(st.none() | st.integers() | _WORDS, lambda x: st.lists(x, max_size=3) | st.dictionaries(_WORDS, x, max_size=4)))
def test_any_document_is_survived(document: object) -> None:
    for body in (document, {"default": document}, {"default": REJECT, "transports": {"docker": {"": document}}}):
        try:
            policy.parse(json.dumps(body).encode())
        except BadPolicy:
            pass


@given(st.text(max_size=60))
def test_any_signed_name_is_survived(text: str) -> None:
    assert not Identity().accepts(text, reference.parse("reg.example/app:v1")) or text == "reg.example/app:v1"
