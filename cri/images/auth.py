"""Registry credentials and the two challenge schemes, Basic and Bearer (distribution's token authentication), without any I/O.

A secret is bound to the registry it was given for. ``Credentials`` prints nothing of itself, and ``redact`` removes its secrets
from text that came from elsewhere before an error is built from it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

from cri.errors import InvalidArgument
from shim.errors import Failure

_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_PARAMETER = re.compile(r'\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|$)')
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9_-]*)(?:\s+(?=[A-Za-z0-9_-]+\s*=)|\s*(?:,|$))")
TOKEN_LIMIT = 64 << 10  # bytes of a token endpoint's answer


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client gave for one registry. Empty: anonymous."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    server: str = ""  # host[:port] they are for; "" is the registry of the reference

    def __bool__(self) -> bool:
        return bool(self.username or self.password or self.identity_token or self.registry_token)

    def allowed_at(self, host: str, domain: str, *, origin: bool) -> bool:
        """Whether an endpoint may see them: the registry itself, or the host the client named. Never a mirror nobody named."""
        if not self:
            return False
        if self.server:
            return _same(self.server, host) or (origin and _same(self.server, domain))
        return origin

    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()

    def redact(self, text: str) -> str:
        encoded = self.basic().removeprefix("Basic ") if self.username or self.password else ""
        for secret in (self.password, self.identity_token, self.registry_token, encoded):
            if len(secret) >= 3:
                text = text.replace(secret, "[redacted]")
        return text


ANONYMOUS = Credentials()


def from_fields(username: str, password: str, auth: str, server: str, identity_token: str, registry_token: str) -> Credentials:
    """CRI AuthConfig, field by field; ``auth`` is base64 of ``user:password``, as in Docker's config.json."""
    if auth and not (username or password):
        try:
            plain = base64.b64decode(auth, validate=True).decode()
        except (binascii.Error, ValueError):
            raise InvalidArgument("not base64 of user:password", field="auth.auth") from None
        username, colon, password = plain.partition(":")
        if not colon:
            raise InvalidArgument("not base64 of user:password", field="auth.auth")
        password = password.rstrip("\0")
    return Credentials(username, password, identity_token, registry_token, _host_of(server))


def _host_of(server: str) -> str:
    if not server:
        return ""
    return urlsplit(server if "://" in server else f"//{server}").netloc.rpartition("@")[2].lower()


def _same(a: str, b: str) -> bool:
    return a.lower() == b.lower() or (a.lower() in _HUB and b.lower() in _HUB)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header (RFC 9110 §11.6.1)."""

    scheme: str  # lower case
    parameters: dict[str, str]


def challenges(headers: list[str]) -> list[Challenge]:
    """All challenges of all headers; what does not parse is left out."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        while position < len(header) and (match := _SCHEME.match(header, position)):
            position = match.end()
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(header, position):
                value = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
                parameters[parameter[1].lower()] = value
                position = parameter.end()
            found.append(Challenge(match[1].lower(), parameters))
    return found


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """An HTTP request for a bearer token; ``body`` set means POST."""

    url: str
    headers: dict[str, str] = field(repr=False)
    body: str = field(default="", repr=False)


def token_request(challenge: Challenge, base: str, scope: str, credentials: Credentials) -> TokenRequest:
    """How to get a token for ``scope``. ``base`` is the endpoint that sent the challenge.

    The realm is the registry's choice, so a registry reached over TLS may not send the credentials on in the clear.
    """
    realm = challenge.parameters.get("realm", "")
    url = urlsplit(realm)
    if url.scheme not in ("http", "https") or not url.hostname or url.username:
        raise Failure("authenticate", "token", message="the registry's realm is not an http or https URL")
    if base.startswith("https:") and url.scheme != "https":
        raise Failure("authenticate", "token", path=realm, message="an https registry names a token server without TLS")
    service = challenge.parameters.get("service", "")
    query = [("service", service)] if service else []
    query.append(("scope", challenge.parameters.get("scope") or scope))
    if credentials.identity_token:
        form = [("grant_type", "refresh_token"), ("refresh_token", credentials.identity_token), ("client_id", "cri-shim"), *query]
        return TokenRequest(realm, {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form))
    headers = {}
    if credentials.username or credentials.password:
        headers["Authorization"] = credentials.basic()
        query.insert(0, ("account", credentials.username))
    return TokenRequest(f"{realm}{'&' if url.query else '?'}{urlencode(query)}", headers)


def token_of(body: bytes) -> tuple[str, float]:
    """The token in a token endpoint's answer and for how many seconds it holds (60 if it does not say)."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Failure("authenticate", "token", message="the token server's answer is not a JSON object")
    token = document.get("token") or document.get("access_token")
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise Failure("authenticate", "token", message="the token server's answer has no token")
    lifetime = document.get("expires_in")
    return token, float(lifetime) if isinstance(lifetime, (int, float)) and lifetime > 0 else 60.0


def scope_of(path: str) -> str:
    return f"repository:{path}:pull"
