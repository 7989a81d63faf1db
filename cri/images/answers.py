"""What answers and failures of a registry say, as one line for people; nothing of it is trusted."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

_USERINFO = re.compile(r"//[^/\s]*@")
_PORTS = {"http": 80, "https": 443}


def summary(status: int, body: bytes) -> str:
    """Status and the registry's own error codes; its free text is cut and stripped of control characters."""
    try:
        document = json.loads(body)
        errors = [f"{e.get('code', '')}: {e.get('message', '')}" for e in document["errors"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        errors = []
    text = "".join(c if c.isprintable() else " " for c in "; ".join(errors))[:200]
    return f"HTTP {status} {text}".rstrip()


def reason(error: BaseException) -> str:
    """The system's own words where it has some."""
    inner = getattr(error, "os_error", None) or error
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return _USERINFO.sub("//", text)[:200]  # the client's errors quote a proxy's URL with its password


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what credentials are bound to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
