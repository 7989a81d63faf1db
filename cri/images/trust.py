"""``images.signature_policy`` at work: what may be pulled, and what that is here may be run.

The policy and its keys are looked at before each decision and read again when they have changed. A policy that can no longer be read
lets nothing pass. Signatures found at a pull are kept with the image, so that a container can be judged without the registry, by the policy
as it is then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cri.errors import SignatureValidationFailed, StartError
from cri.images import policy as policies
from cri.images.model import Image, Signature
from cri.images.policy import Accept, BadPolicy, KeySource, Policy, Reject, Requirement, Sigstore
from cri.images.reference import BadReference, Reference
from cri.images.reference import parse as parse_reference

if TYPE_CHECKING:
    from cri.images.signature import Key, Source

log = logging.getLogger("cri.images")

_LIMIT = 1 << 20  # bytes of a policy or key file
_HINTS = {
    "name": "cosign signs a repository without its tag, which signedIdentity matchRepository accepts",
    "none": "the image was pulled when no policy wanted its signatures, or has none: sign it and pull it again",
}


@dataclass(frozen=True, slots=True)
class _Loaded:
    policy: Policy
    keys: dict[KeySource, Key]
    stamps: tuple[tuple[int, ...], ...]
    verdicts: dict[tuple[object, ...], str] = field(default_factory=dict)  # "" for yes


class Trust:
    """``path`` None: no policy, everything is allowed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._loaded: _Loaded | None = None

    def load(self) -> None:
        """At the start: a policy that cannot be enforced keeps the daemon from starting. Raises StartError."""
        try:
            self._current()
        except (BadPolicy, OSError) as error:
            raise StartError(f"images.signature_policy: {self._said(error)}") from error

    def summary(self) -> str:
        """For people."""
        loaded = self._checked()
        if loaded is None:
            return "no policy"
        return f"{len(loaded.policy.scopes)} scopes of registries, {len(loaded.keys)} keys"

    def wants_signatures(self, wanted: Reference) -> bool:
        loaded = self._checked()
        return loaded is not None and any(isinstance(r, Sigstore) for r in loaded.policy.match(wanted)[1])

    def refuse_early(self, wanted: Reference) -> None:
        """Raise for what no signature could help, before the registry is asked."""
        loaded = self._checked()
        if loaded is not None and (scope := loaded.policy.match(wanted)) and any(isinstance(r, Reject) for r in scope[1]):
            raise SignatureValidationFailed(self._text(wanted, scope[0], "it rejects the image"))

    async def admit(self, source: Source, wanted: Reference, digests: Collection[str]) -> tuple[Signature, ...]:
        """Raise SignatureValidationFailed unless the image that ``wanted`` has just been resolved to (``digests``: of the index and of the
        platform's manifest) may be pulled; the signatures it has."""
        if not self.wants_signatures(wanted):
            self.refuse_early(wanted)
            return ()
        from cri.images import signature

        found = [s for digest in dict.fromkeys(digests) for s in await signature.fetch(source, digest)]
        loaded = self._checked()  # it may have changed while the registry was asked
        if loaded is not None and (refusal := self._judge(loaded, wanted, digests, found)):
            raise SignatureValidationFailed(refusal, hint=_hint(refusal))
        return tuple(found)

    def admit_unsigned(self, wanted: Reference, digest: str) -> None:
        """The same for an image that comes without signatures, out of an archive."""
        loaded = self._checked()
        if loaded is not None and (refusal := self._judge(loaded, wanted, (digest,), ())):
            raise SignatureValidationFailed(refusal)

    def check(self, image: Image, signatures: Collection[Signature], asked: str) -> None:
        """Raise SignatureValidationFailed unless containers of the image may be made. ``asked`` is how the pod calls it; where that is only
        an id, one of the image's names must be allowed."""
        loaded = self._checked()
        if loaded is None:
            return
        verdict = loaded.verdicts.get((image.id, asked, *image.repo_tags, *image.repo_digests, len(signatures)))
        if verdict is None:
            verdict = self._verdict(loaded, image, signatures, asked)
            if len(loaded.verdicts) > 4096:
                loaded.verdicts.clear()
            loaded.verdicts[image.id, asked, *image.repo_tags, *image.repo_digests, len(signatures)] = verdict
        if verdict:
            raise SignatureValidationFailed(verdict, hint=_hint(verdict))

    def _verdict(self, loaded: _Loaded, image: Image, signatures: Collection[Signature], asked: str) -> str:
        digests = {image.manifest_digest, *(d.rpartition("@")[2] for d in image.repo_digests)}
        names = [parse_reference(n) for n in (*image.repo_tags, *image.repo_digests)]
        try:
            wanted = parse_reference(asked)
        except BadReference:
            wanted = None
        # The beginning of an id reads as a repository of the Hub, too: only a repository that the image is from counts.
        if wanted is not None and any(n.name == wanted.name for n in names):
            names = [wanted]
        refusals = [self._judge(loaded, name, digests, signatures) for name in names]
        if not refusals:
            return f"image {image.id}: policy {self._path}: it has no name that the policy could be asked about"
        return "" if "" in refusals else refusals[0]

    # -- judgement ----------------------------------------------------------------------------------------------------------

    def _judge(self, loaded: _Loaded, wanted: Reference, digests: Collection[str], signatures: Collection[Signature]) -> str:
        """Why not; empty if every requirement is met."""
        scope, requirements = loaded.policy.match(wanted)
        for requirement in requirements:
            if refusal := _unmet(requirement, loaded.keys, wanted, digests, signatures):
                return self._text(wanted, scope, refusal)
        return ""

    def _text(self, wanted: Reference, scope: str, why: str) -> str:
        return f"image {wanted}: policy {self._path}, {scope}: {why}"

    # -- the file -----------------------------------------------------------------------------------------------------------

    def _checked(self) -> _Loaded | None:
        try:
            return self._current()
        except (BadPolicy, OSError) as error:
            why = f"images.signature_policy: {self._said(error)}"
            raise SignatureValidationFailed(why, hint="until it is repaired, nothing passes") from error

    def _current(self) -> _Loaded | None:
        if self._path is None:
            return None
        paths = [self._path, *(Path(k.path) for k in self._loaded.keys if k.path)] if self._loaded else []
        if self._loaded is not None and self._loaded.stamps == _stamps(paths):
            return self._loaded
        first, self._loaded = self._loaded is None, None
        stamps = _stamps([self._path])
        policy = policies.parse(_read(self._path))
        keys, key_stamps = _keys(policy)
        self._loaded = _Loaded(policy, keys, stamps + key_stamps)
        if not first:
            log.info("signature policy read again: %s", self._path)
        return self._loaded

    def _said(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return f"{error.filename or self._path}: {error.strerror}"
        return f"{self._path}: {error}"


def _keys(policy: Policy) -> tuple[dict[KeySource, Key], tuple[tuple[int, ...], ...]]:
    sources = dict.fromkeys(k for r in policy.requirements() if isinstance(r, Sigstore) for k in r.keys)
    if not sources:
        return {}, ()
    from cri.images import signature  # cryptography: only where it is used

    stamps = _stamps([Path(k.path) for k in sources if k.path])
    found = {}
    for source in sources:
        try:
            found[source] = signature.load_key(source.path, _read(Path(source.path)) if source.path else source.pem)
        except signature.BadKey as error:
            raise BadPolicy(f"key {source.path or 'in keyData'}: {error}") from error
    return found, stamps


def _unmet(
    requirement: Requirement, keys: dict[KeySource, Key], wanted: Reference, digests: Collection[str], signatures: Collection[Signature]
) -> str:
    if isinstance(requirement, Accept):
        return ""
    if isinstance(requirement, Reject):
        return "it rejects the image"
    from cri.images import signature

    usable = [keys[k] for k in requirement.keys]
    reasons = []
    for number, each in enumerate(signatures, 1):
        if not any(key.made(each.signature, each.payload) for key in usable):
            reasons.append(f"signature {number}: not made with this key")
        elif (claim := signature.claim(each.payload)) is None:
            reasons.append(f"signature {number}: not a claim about an image")
        elif claim.digest not in digests:
            reasons.append(f"signature {number}: for {claim.digest}, not for this image")
        elif not requirement.identity.accepts(claim.reference, wanted):
            reasons.append(f"signature {number}: for the name {claim.reference[:200]!r} ({requirement.identity.type})")
        else:
            return ""
    why = "; ".join(reasons[:5]) or "no signature found"
    return f"no valid signature by {' or '.join(k.name for k in usable)}: {why} (this image is {', '.join(sorted(digests))})"


def _hint(refusal: str) -> str:
    if ": for the name " in refusal:
        return _HINTS["name"]
    return _HINTS["none"] if "no signature found" in refusal else ""


def _stamps(paths: Iterable[Path]) -> tuple[tuple[int, ...], ...]:
    facts = [os.stat(p) for p in paths]
    return tuple((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in facts)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        body = file.read(_LIMIT + 1)
    if len(body) > _LIMIT:
        raise BadPolicy(f"{path}: more than {_LIMIT} bytes")
    return body
