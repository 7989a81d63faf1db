"""What answers and failures of a registry say, as one line for people, and bodies of bounded length; nothing of it is trusted."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cri.images.hosts import Endpoint

if TYPE_CHECKING:
    import aiohttp

_ERROR_LIMIT = 4 << 10  # bytes of an error body that are read
_USERINFO = re.compile(r"//[^/\s]*@")
_PORTS = {"http": 80, "https": 443}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")


@dataclass(frozen=True, slots=True)
class Attempt:
    """Why one endpoint did not help. ``status`` 0: no HTTP answer at all."""

    base: str
    why: str
    status: int = 0
    tls: bool = False


class EndpointError(Exception):
    """One endpoint failed in a way that lets the next be asked."""

    def __init__(self, attempt: Attempt, retry_after: float | None = None) -> None:
        super().__init__(attempt.why)
        self.attempt, self.retry_after = attempt, retry_after


def range_start(response: aiohttp.ClientResponse, endpoint: Endpoint) -> int:
    """Where the body begins in the blob: 0 for a 200, whatever was asked for."""
    if response.status != 206:
        return 0
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None:
        raise EndpointError(Attempt(endpoint.base, "answers 206 without a usable Content-Range", 206))
    return int(match[1])


async def read_whole(response: aiohttp.ClientResponse, limit: int, endpoint: Endpoint) -> bytes:
    """The whole body, or an EndpointError as soon as it is longer than ``limit`` (CVE-2023-25153)."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise EndpointError(Attempt(endpoint.base, f"sent more than {limit} bytes", response.status))
    return bytes(body)


async def refused(endpoint: Endpoint, response: aiohttp.ClientResponse) -> EndpointError:
    body = await response.content.read(_ERROR_LIMIT)
    attempt = Attempt(endpoint.base, summary(response.status, body), response.status)
    return EndpointError(attempt, delay(response.headers.get("Retry-After", "")))


def delay(text: str) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 10.2.3: a number, or a date)."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


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
