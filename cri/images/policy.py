"""containers-policy.json(5), the part of it that speaks of registries: parsing, and which requirements an image has to meet. Pure.

Everything that is not understood is an error: a policy of which a part is passed over protects less than its author believes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cri.images import reference
from cri.images.reference import BadReference, Reference


class BadPolicy(ValueError):
    """The document is not a policy this program can enforce; the message names the field and why."""


@dataclass(frozen=True, slots=True)
class Accept:
    """insecureAcceptAnything"""


@dataclass(frozen=True, slots=True)
class Reject:
    """reject"""


@dataclass(frozen=True, slots=True)
class Identity:
    """signedIdentity: which reference a signature must have been made for. ``a`` and ``b`` are the type's own fields."""

    type: str = "matchRepoDigestOrExact"
    a: str = ""
    b: str = ""

    def accepts(self, signed: str, wanted: Reference) -> bool:
        """Whether a signature for the reference ``signed`` counts for ``wanted``."""
        try:
            name, full = _signed(signed)
        except BadReference:
            return False
        match self.type:
            case "matchExact":
                return full == str(wanted)
            case "matchRepository":
                return name == wanted.name
            case "exactReference":
                return full == _signed(self.a)[1]
            case "exactRepository":
                return name == _signed(self.a)[0]
            case "remapIdentity":
                return _digest_or_exact(name, full, _remapped(wanted, self.a, self.b))
        return _digest_or_exact(name, full, wanted)


@dataclass(frozen=True, slots=True)
class KeySource:
    """A public key in a file, or as PEM in the policy."""

    path: str = ""
    pem: bytes = b""


@dataclass(frozen=True, slots=True)
class Sigstore:
    """sigstoreSigned: a cosign signature by one of the keys."""

    keys: tuple[KeySource, ...]
    identity: Identity


_KINDS = ("insecureAcceptAnything", "reject", "signedBy", "signedBaseLayer", "sigstoreSigned")
Requirement = Accept | Reject | Sigstore


@dataclass(frozen=True, slots=True)
class Policy:
    default: tuple[Requirement, ...]
    scopes: dict[str, tuple[Requirement, ...]]  # of the docker transport; "" is its own default

    def match(self, wanted: Reference) -> tuple[str, tuple[Requirement, ...]]:
        """The most specific scope and its requirements, all of which must be met."""
        for scope in _scopes(wanted):
            if scope in self.scopes:
                return f"docker scope {scope!r}", self.scopes[scope]
        return "default", self.default

    def requirements(self) -> Iterator[Requirement]:
        for each in (self.default, *self.scopes.values()):
            yield from each


def parse(body: bytes) -> Policy:
    try:
        document = json.loads(body, object_pairs_hook=_no_repetition)
    except BadPolicy:
        raise
    except (ValueError, RecursionError) as error:
        raise BadPolicy(f"not JSON: {error}") from error
    document = _object(document, "policy", {"default", "transports"})
    if "default" not in document:
        raise BadPolicy("default: missing")
    scopes: dict[str, tuple[Requirement, ...]] = {}
    for transport, table in _object(document.get("transports") or {}, "transports").items():
        for scope, requirements in _object(table, f"transports.{transport}").items():
            where = f"transports.{transport}.{scope!r}"
            if transport == "docker":
                scopes[_scope(scope, where)] = _requirements(requirements, where)
            else:
                _named(requirements, where)
    return Policy(_requirements(document["default"], "default"), scopes)


# -- scopes -----------------------------------------------------------------------------------------------------------------


def _scopes(wanted: Reference) -> Iterator[str]:
    yield str(wanted)
    name = wanted.name
    while name:
        yield name
        name = name.rpartition("/")[0]
    host = wanted.domain
    while "." in host:
        host = host.partition(".")[2]
        yield f"*.{host}"
    yield ""


def _scope(scope: str, where: str) -> str:
    """A misspelt scope protects nothing, so one that can never match is an error."""
    if not scope:
        return scope
    host = scope.removeprefix("*.")
    try:
        if host != scope:
            known = "/" not in host and reference.parse(f"x.{host}/a").domain == f"x.{host}"
        elif "/" in scope and ("@" in scope or ":" in scope.rpartition("/")[2]):
            known = str(reference.parse(scope)) == scope
        else:
            known = reference.parse(f"{scope}/a").name == f"{scope}/a" or reference.parse(f"{scope}/a/b").name == f"{scope}/a/b"
    except BadReference:
        known = False
    if not known:
        raise BadPolicy(f"{where}: not host[:port], host[:port]/path, such a path with a tag or digest, or *.domain, in full")
    return scope


# -- requirements -----------------------------------------------------------------------------------------------------------


def _requirements(value: object, where: str) -> tuple[Requirement, ...]:
    if not isinstance(value, list) or not value:
        raise BadPolicy(f"{where}: not a list with at least one requirement")
    return tuple(_requirement(item, f"{where}[{i}]") for i, item in enumerate(value))


def _named(value: object, where: str) -> None:
    """Requirements for places that no image here comes from: they may be of any kind there is."""
    if not isinstance(value, list) or not value:
        raise BadPolicy(f"{where}: not a list with at least one requirement")
    for i, item in enumerate(value):
        if (kind := _object(item, f"{where}[{i}]").get("type")) not in _KINDS:
            raise BadPolicy(f"{where}[{i}].type: {kind!r} is not a requirement")


def _requirement(value: object, where: str) -> Requirement:
    kind = _object(value, where).get("type")
    if kind == "insecureAcceptAnything":
        _object(value, where, {"type"})
        return Accept()
    if kind == "reject":
        _object(value, where, {"type"})
        return Reject()
    if kind == "sigstoreSigned":
        return _sigstore(_object(value, where), where)
    if kind in ("signedBy", "signedBaseLayer"):
        raise BadPolicy(f"{where}.type: {kind!r} (GPG) is not supported; sigstoreSigned with a key is")
    raise BadPolicy(f"{where}.type: {kind!r} is not a requirement")


def _sigstore(value: dict[str, Any], where: str) -> Sigstore:
    for name in ("fulcio", "pki", "rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData", "rekorPublicKeyDatas"):
        if name in value:
            raise BadPolicy(f"{where}.{name}: certificates and transparency logs are not supported; keyPath and keyData are")
    _object(value, where, {"type", "keyPath", "keyPaths", "keyData", "keyDatas", "signedIdentity"})
    given = [name for name in ("keyPath", "keyPaths", "keyData", "keyDatas") if name in value]
    if len(given) != 1:
        raise BadPolicy(f"{where}: exactly one of keyPath, keyPaths, keyData and keyDatas must be there")
    name = given[0]
    plural = name.endswith("s")
    texts = value[name] if plural else [value[name]]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise BadPolicy(f"{where}.{name}: not {'a list of strings' if plural else 'a string'}")
    keys = []
    for text in texts:
        if name.startswith("keyPath"):
            if not text.startswith("/") or "\0" in text:
                raise BadPolicy(f"{where}.{name}: {text!r} is not an absolute path")
            keys.append(KeySource(path=text))
        else:
            try:
                keys.append(KeySource(pem=base64.b64decode(text, validate=True)))
            except (binascii.Error, ValueError):
                raise BadPolicy(f"{where}.{name}: not base64") from None
    return Sigstore(tuple(keys), _identity(value.get("signedIdentity"), f"{where}.signedIdentity"))


_IDENTITIES: dict[object, tuple[str, ...]] = {
    "matchExact": (),
    "matchRepoDigestOrExact": (),
    "matchRepository": (),
    "exactReference": ("dockerReference",),
    "exactRepository": ("dockerRepository",),
    "remapIdentity": ("prefix", "signedPrefix"),
}


def _identity(value: object, where: str) -> Identity:
    if value is None:
        return Identity()
    kind = _object(value, where).get("type")
    names = _IDENTITIES.get(kind) if isinstance(kind, str) else None
    if names is None:
        raise BadPolicy(f"{where}.type: {kind!r} is not an identity")
    fields = _object(value, where, {"type", *names})
    texts = []
    for name in names:
        text = fields.get(name)
        if not isinstance(text, str) or not text:
            raise BadPolicy(f"{where}.{name}: not a string")
        if kind == "remapIdentity":
            if _scope(text, f"{where}.{name}").startswith("*") or "@" in text or ("/" in text and ":" in text.rpartition("/")[2]):
                raise BadPolicy(f"{where}.{name}: {text!r} must be a host, a namespace or a repository")
        else:
            try:
                bare = _signed(text)[0] == _signed(text)[1]
            except BadReference as error:
                raise BadPolicy(f"{where}.{name}: {error}") from error
            if bare == (kind == "exactReference"):
                raise BadPolicy(f"{where}.{name}: {text!r} must {'have' if bare else 'not have'} a tag or digest")
        texts.append(text)
    return Identity(str(kind), *texts)


# -- references -------------------------------------------------------------------------------------------------------------


def _signed(text: str) -> tuple[str, str]:
    """(repository, the whole) of a reference as signatures and policies write it; both are the same if it names neither tag nor digest."""
    parsed = reference.parse(text)
    head, _, digest = text.partition("@")
    tag = head.rpartition("/")[2].partition(":")[2]
    return parsed.name, parsed.name + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def _digest_or_exact(name: str, full: str, wanted: Reference) -> bool:
    # A digest was chosen with care: any signature of it in this repository will do, but one that names nothing in the repository.
    return name == wanted.name != full if wanted.digest else full == str(wanted)


def _remapped(wanted: Reference, prefix: str, to: str) -> Reference:
    whole = str(wanted)
    # Behind a host, ":" begins a port, which makes it another host.
    if not whole.startswith(prefix) or whole[len(prefix) : len(prefix) + 1] not in (("/", ":", "@") if "/" in prefix else ("/",)):
        return wanted
    try:
        return reference.parse(to + whole[len(prefix) :])
    except BadReference:
        return wanted


# -- JSON -------------------------------------------------------------------------------------------------------------------


def _object(value: object, where: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadPolicy(f"{where}: not an object")
    if known is not None and (unknown := set(value) - known):
        raise BadPolicy(f"{where}.{min(unknown)}: not known here")
    return value


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may disagree about which of two equal keys counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        raise BadPolicy(f"{next(k for k in keys if keys.count(k) > 1)}: twice in one object")
    return found
