"""Which proxy a URL is fetched through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY as Go's programs (kubelet, containerd, CRI-O) read them.

Not urllib's reading, which knows no address ranges in NO_PROXY and takes a suffix of a name for a match.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from shim.errors import Failure

_PORTS = {"http": 80, "https": 443}


def proxy_for(url: str, environ: Mapping[str, str]) -> str | None:
    """The proxy's URL, with its user and password if it has some; None: connect directly. Failure: a proxy that cannot be used."""
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
    name = f"{parts.scheme}_proxy"
    # The lower-case spelling wins, as in curl; CGI's HTTP_PROXY, which a client can set, is no concern of a daemon.
    proxy = (environ.get(name) or environ.get(name.upper()) or "").strip()
    if not proxy or _loopback(host) or bypassed(host, port, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        found = urlsplit(proxy)
        usable = found.scheme in _PORTS and bool(found.hostname) and found.port != 0
    except ValueError:
        usable = False
    if not usable:
        # Not the text itself: it may hold a password.
        raise Failure("choose proxy", path=name.upper(), message="not a URL of an http or https proxy")
    return proxy


def bypassed(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names the host: ``*``, an address, a range (10.0.0.0/8), a domain with all below it, ``.domain`` or
    ``*.domain`` for those below it only; each but a range may have a port."""
    address = _address(host)
    for entry in (e.strip().lower() for e in no_proxy.split(",")):
        if entry == "*":
            return True
        if "/" in entry:
            if address is not None and _inside(address, entry):
                return True
            continue
        name, wanted = _split_port(entry)
        if not name or (wanted and wanted != port):
            continue
        if address is not None:
            if _address(name) == address:
                return True
        elif name.startswith((".", "*.")):
            if host.lower().endswith(name.removeprefix("*")):
                return True
        elif host.lower() == name or host.lower().endswith(f".{name}"):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int]:
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, int(rest[1:]) if rest[:1] == ":" and rest[1:].isdecimal() else 0
    name, colon, port = entry.rpartition(":")
    if colon and ":" not in name and port.isascii() and port.isdecimal():
        return name, int(port[:6])
    return entry, 0


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address, entry: str) -> bool:
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)
