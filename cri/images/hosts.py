"""``registry_dir``: containerd's hosts.toml layout, read anew at every pull, so that a change needs no restart.

``<dir>/<host>[:<port>]/hosts.toml``, then ``<dir>/_default/hosts.toml``. Without either the registry is asked over HTTPS; on this
machine's loopback also over HTTP when TLS fails, as containerd does.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import ssl
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cri.images.reference import DEFAULT_DOMAIN
from shim.errors import Failure

_PHASE = "read hosts.toml"
_KEYS = {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
CAPABILITIES = frozenset({"pull", "resolve"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to ask for a registry's content. ``origin``: the registry itself (or ``server``), where credentials may go."""

    base: str  # "https://host[:port]/v2", no slash at the end
    capabilities: frozenset[str] = CAPABILITIES
    origin: bool = False
    skip_verify: bool = False
    ca: tuple[str, ...] = ()  # files
    client: tuple[tuple[str, str], ...] = ()  # (certificate file, key file or "")
    headers: tuple[tuple[str, str], ...] = ()
    only_after_tls_failure: bool = False
    dial_timeout: float = 30.0  # seconds

    @property
    def host(self) -> str:
        """``host[:port]``, lower case."""
        return urlsplit(self.base).netloc.lower()

    def __repr__(self) -> str:  # configured headers may carry a token
        return f"Endpoint({self.base!r})"

    def ssl_context(self) -> ssl.SSLContext:
        """The context for its files as they are now; loading the system's authorities takes 15 ms, so unchanged ones are shared."""
        paths = [*self.ca, *(p for pair in self.client for p in pair if p), ssl.get_default_verify_paths().cafile or ""]
        try:
            stamps = tuple(os.stat(p).st_mtime_ns for p in paths if p)
            return _context(self.ca, self.client, self.skip_verify, stamps)
        except (OSError, ssl.SSLError) as error:
            raise Failure("load registry certificates", path=self.base, message=str(error)) from error


@functools.lru_cache(maxsize=32)
def _context(ca: tuple[str, ...], client: tuple[tuple[str, str], ...], skip_verify: bool, stamps: tuple[int, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in ca:
        context.load_verify_locations(cafile=path)
    for certificate, key in client:
        context.load_cert_chain(certificate, key or None)
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def endpoints(registry_dir: Path | None, domain: str) -> tuple[Endpoint, ...]:
    """Where to look for content of ``domain``, in order: mirrors, then the registry itself."""
    path = _find(registry_dir, domain)
    if path is None:
        return _default(domain)
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise Failure(_PHASE, path=str(path), message=str(error)) from error
    return parse(document, domain, path)


def parse(document: dict[str, Any], domain: str, path: Path) -> tuple[Endpoint, ...]:
    """The endpoints of one hosts.toml. Unknown keys are errors: a misspelt ``skip_verify`` must not pass silently."""
    top = {k: v for k, v in document.items() if k not in ("server", "host")}
    mirrors = document.get("host", {})
    if not isinstance(mirrors, dict):
        raise Failure(_PHASE, path=str(path), message="host is not a table")
    found = []
    for base, table in mirrors.items():
        if not isinstance(table, dict):
            raise Failure(_PHASE, path=str(path), message=f"host.{base!r} is not a table")
        found.append(_endpoint(base, table, path, origin=_same_registry(base, domain)))
    server = document.get("server")
    if server is not None and not isinstance(server, str):
        raise Failure(_PHASE, path=str(path), message="server is not a string")
    if server or top:
        base = server or _default(domain)[0].base
        last: tuple[Endpoint, ...] = (_endpoint(base, top, path, origin=True),)
    else:
        last = _default(domain)
    if found and server:
        # Listing the server among the hosts configures it; asking it twice would only delay the error.
        known = {e.base for e in found}
        found = [replace(e, origin=True) if e.base == last[0].base else e for e in found]
        last = tuple(e for e in last if e.base not in known)
    return tuple(found) + last


def _find(registry_dir: Path | None, domain: str) -> Path | None:
    if registry_dir is None:
        return None
    host, _, port = domain.rpartition(":") if domain.rpartition(":")[2].isdigit() else (domain, "", "")
    names = [domain, f"{host}_{port}_", host, "_default"] if port else [domain, "_default"]
    for name in names:
        path = registry_dir / name / "hosts.toml"
        if path.is_file():
            return path
    return None


def _default(domain: str) -> tuple[Endpoint, ...]:
    host = "registry-1.docker.io" if domain == DEFAULT_DOMAIN else domain
    secure = Endpoint(f"https://{host}/v2", origin=True)
    if not is_loopback(host):
        return (secure,)
    return (secure, Endpoint(f"http://{host}/v2", origin=True, only_after_tls_failure=True))


def is_loopback(host: str) -> bool:
    """``localhost``, 127.0.0.0/8 or ::1, with or without a port."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same_registry(base: str, domain: str) -> bool:
    host = urlsplit(base if "://" in base else f"https://{base}").netloc.lower()
    return host == ("registry-1.docker.io" if domain == DEFAULT_DOMAIN else domain.lower())


def _endpoint(base: str, table: dict[str, Any], path: Path, *, origin: bool) -> Endpoint:
    where = f"{path}: {base}"
    unknown = set(table) - _KEYS
    if unknown:
        raise Failure(_PHASE, path=where, message=f"unknown key {sorted(unknown)[0]!r}", hint=f"known: {', '.join(sorted(_KEYS))}")
    url = urlsplit(base if "://" in base else f"https://{base}")
    if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
        raise Failure(_PHASE, path=where, message="not an http or https URL")
    prefix = url.path.rstrip("/")
    if not table.get("override_path") and not prefix.endswith("/v2"):
        prefix += "/v2"
    return Endpoint(
        base=f"{url.scheme}://{url.netloc}{prefix}",
        capabilities=frozenset(_strings(table.get("capabilities", list(CAPABILITIES)), f"{where}: capabilities")),
        origin=origin,
        skip_verify=table.get("skip_verify") is True,
        ca=tuple(str(path.parent / p) for p in _strings(table.get("ca", []), f"{where}: ca")),
        client=_client(table.get("client", []), path, where),
        headers=_headers(table.get("header", {}), where),
        dial_timeout=_seconds(table.get("dial_timeout", "30s"), where),
    )


def _strings(value: object, where: str) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
        raise Failure(_PHASE, path=where, message="not a string or a list of strings")
    return found


def _client(value: object, path: Path, where: str) -> tuple[tuple[str, str], ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise Failure(_PHASE, path=where, message="client is not a file or a list of files")
    pairs = []
    for item in items:
        parts = [item] if isinstance(item, str) else item
        if not isinstance(parts, list) or not 1 <= len(parts) <= 2 or not all(isinstance(p, str) for p in parts):
            raise Failure(_PHASE, path=where, message="client entries are a file or [certificate, key]")
        files = [str(path.parent / p) if p else "" for p in parts]
        pairs.append((files[0], files[1] if len(files) > 1 else ""))
    return tuple(pairs)


def _headers(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise Failure(_PHASE, path=where, message="header is not a table")
    return tuple((str(name), text) for name, texts in value.items() for text in _strings(texts, f"{where}: header.{name}"))


def _seconds(value: object, where: str) -> float:
    if isinstance(value, str):
        for suffix, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
            number = value.removesuffix(suffix)
            if number != value and number.replace(".", "", 1).isdigit():
                return float(number) * factor
    raise Failure(_PHASE, path=where, message='dial_timeout is not a duration such as "30s"')
