"""The pull half of the distribution spec over aiohttp: manifests and blobs of one repository, through its endpoints in order.

Each failure of an endpoint is kept; when all have failed the error names every one of them with its reason. Redirects are
followed here, not by the HTTP client, so that no header of ours leaves the origin it was made for (CVE-2020-15157).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from cri.errors import AccessDenied, CriError, ImageNotFound, RegistryUnavailable, Unknown
from cri.images import answers, auth, manifest, ranges
from cri.images.answers import Attempt, EndpointError, range_start, read_whole, refused
from cri.images.auth import Credentials
from cri.images.hosts import Endpoint
from cri.images.keyring import Keyring
from cri.images.proxy import proxy_for
from cri.images.reference import Reference
from shim.errors import Failure

if TYPE_CHECKING:
    import aiohttp

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECT_LIMIT = 8
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_BROKEN = 1  # stands for a status where the connection broke after it was made
_TRIES = 3  # without progress, per endpoint
_MAX_DELAY = 30.0  # seconds

T = TypeVar("T")


class Sink(Protocol):
    """Where a blob goes. It keeps its own hash; ``offset`` is how many bytes it has taken, ``missing`` how many are still to come."""

    @property
    def offset(self) -> int: ...

    @property
    def missing(self) -> int: ...

    async def write(self, endpoint: Endpoint, chunk: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as served, its digest computed here."""

    media_type: str
    digest: str
    body: bytes


class Registry:
    """One repository at its endpoints, with the credentials of one client. Use as an async context manager."""

    remote = True

    def __init__(
        self,
        reference: Reference,
        endpoints: tuple[Endpoint, ...],
        credentials: Credentials,
        *,
        progress_timeout: float,
        user_agent: str,
        keyring: Keyring | None = None,
    ) -> None:
        """``keyring`` is asked where ``credentials``, which came with the request, may not go or are none."""
        self.reference, self.endpoints, self.credentials = reference, endpoints, credentials
        self._keyring = keyring or Keyring(None)
        self._secrets = [credentials]  # what no error may show
        self._timeout, self._agent = progress_timeout, user_agent
        self._sessions: dict[Endpoint | None, aiohttp.ClientSession] = {}
        self._authorization: dict[Endpoint, tuple[str, float]] = {}  # header value, monotonic time of expiry
        self._locks: dict[Endpoint, asyncio.Lock] = {}
        self._plain: set[str] = set()  # hosts that answered in plain HTTP after TLS had failed

    async def __aenter__(self) -> Registry:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    async def document(self, selector: str, *, capability: str = "pull") -> Document:
        """The manifest or index for a tag or digest; verified against the digest when it is one."""

        async def fetch(endpoint: Endpoint) -> Document:
            url = f"{endpoint.base}/{self.reference.path}/manifests/{selector}"
            async with self._get(endpoint, url, {"Accept": manifest.ACCEPT}) as response:
                body = await read_whole(response, manifest.MANIFEST_LIMIT, endpoint)
                return self._verified(endpoint, selector, response, body)

        return await self._each(f"manifest {selector}", fetch, capability=capability)

    def _verified(self, endpoint: Endpoint, selector: str, response: aiohttp.ClientResponse, body: bytes) -> Document:
        algorithm = selector.partition(":")[0] if ":" in selector else "sha256"
        digest = f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"
        if ":" in selector and digest != selector:
            raise EndpointError(Attempt(endpoint.base, f"served a manifest with digest {digest}", response.status))
        said = response.headers.get("Docker-Content-Digest", digest)
        if said.partition(":")[0] == algorithm and said != digest:
            raise EndpointError(Attempt(endpoint.base, f"said digest {said[:80]} and served {digest}", response.status))
        return Document(response.headers.get("Content-Type", ""), digest, body)

    async def small_blob(self, digest: str, size: int) -> bytes:
        """A blob that fits in memory (the image config), verified."""

        async def fetch(endpoint: Endpoint) -> bytes:
            async with self._get(endpoint, self._blob_url(endpoint, digest), {}) as response:
                body = await read_whole(response, size, endpoint)
            found = f"{digest.partition(':')[0]}:{hashlib.new(digest.partition(':')[0], body).hexdigest()}"
            if found != digest:
                raise EndpointError(Attempt(endpoint.base, f"served {len(body)} bytes with digest {found} for {digest}", 200))
            return body

        return await self._each(f"blob {digest}", fetch)

    async def stream_blob(self, digest: str, sink: Sink, avoid: frozenset[str] = frozenset()) -> None:
        """Stream a blob into ``sink`` from its current offset. A cut connection goes on at the next try where it stopped; endpoints
        whose base is in ``avoid`` (they served wrong bytes before) are not asked."""

        splitting = True

        async def fetch(endpoint: Endpoint) -> None:
            nonlocal splitting
            if endpoint.base in avoid:
                raise EndpointError(Attempt(endpoint.base, "served wrong content before", 200))
            offset = sink.offset
            if offset and not sink.missing:
                return  # the connection broke after the last byte
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            split = False
            async with self._get(endpoint, self._blob_url(endpoint, digest), headers) as response:
                skip, pace = offset - range_start(response, endpoint), ranges.Pace()
                ranged = response.status == 206 or response.headers.get("Accept-Ranges", "").strip().lower() == "bytes"
                async for chunk in self._chunks(response, endpoint):
                    if skip >= len(chunk):
                        skip -= len(chunk)
                        continue
                    await pace.write(sink, endpoint, chunk[skip:] if skip else chunk)
                    skip = 0
                    if splitting and ranged and sink.missing > ranges.WORTH and ranges.BUDGET.left and pace.slow():
                        split = True
                        break
            if split:
                splitting = False  # not again, if it fails
                await ranges.rest(sink, endpoint, partial(self._piece, endpoint, digest))
                splitting = True
            if sink.missing:
                raise EndpointError(Attempt(endpoint.base, f"ended {sink.missing} bytes early", 200))

        def position() -> int:
            return sink.offset

        await self._each(f"blob {digest}", fetch, progress=position)

    async def _piece(self, endpoint: Endpoint, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from ``start`` up to ``end`` of a blob."""
        async with self._get(endpoint, self._blob_url(endpoint, digest), {"Range": f"bytes={start}-{end - 1}"}) as response:
            if response.status != 206 or range_start(response, endpoint) != start:
                raise EndpointError(Attempt(endpoint.base, f"answers HTTP {response.status} and another range than asked for", _BROKEN))
            async for chunk in self._chunks(response, endpoint):
                start += len(chunk)
                if start > end:
                    raise EndpointError(Attempt(endpoint.base, "sent more than the range asked for", _BROKEN))
                yield chunk
        if start < end:
            raise EndpointError(Attempt(endpoint.base, f"ended a range {end - start} bytes early", _BROKEN))

    def _blob_url(self, endpoint: Endpoint, digest: str) -> str:
        return f"{endpoint.base}/{self.reference.path}/blobs/{digest}"

    async def _each(
        self,
        what: str,
        fetch: Callable[[Endpoint], Awaitable[T]],
        *,
        capability: str = "pull",
        progress: Callable[[], int] = lambda: 0,
    ) -> T:
        """The first success, endpoint by endpoint; failures that may pass are tried again, without limit while bytes arrive."""
        attempts: list[Attempt] = []
        for endpoint in self.endpoints:
            known_plain = endpoint.host in self._plain
            after_tls = endpoint.only_after_tls_failure
            if capability not in endpoint.capabilities or (after_tls and not (known_plain or (attempts and attempts[-1].tls))):
                continue
            if known_plain and not after_tls:
                continue  # it had no TLS a moment ago; asking again for each document was a quarter of a small pull
            tries, reached = 0, progress()
            while True:
                try:
                    result = await fetch(endpoint)
                    if after_tls:
                        self._plain.add(endpoint.host)
                    return result
                except EndpointError as error:
                    tries = 0 if progress() > reached else tries + 1
                    reached = progress()
                    if error.attempt.status not in _RETRY_STATUS | {_BROKEN} or tries >= _TRIES:
                        attempts.append(error.attempt)
                        break
                    await asyncio.sleep(min(_MAX_DELAY, error.retry_after if error.retry_after is not None else 0.2 * 2**tries))
        raise self._failure(what, attempts)

    def _failure(self, what: str, attempts: list[Attempt]) -> CriError:
        asked = "; ".join(f"{a.base}: {a.why}" for a in attempts) or "no configured endpoint has this capability"
        text = f"pull {self.reference}: {what}: {asked}"
        for credentials in self._secrets:
            text = credentials.redact(text)
        # With a plain-HTTP fallback the TLS failure before it says nothing about the image.
        telling = [a for a in attempts if not a.tls] or attempts
        statuses = {a.status for a in telling}
        if statuses and statuses <= {404}:
            return ImageNotFound(text)
        if statuses & {401, 403}:
            return AccessDenied(f"{text}: pull access denied", hint="check the image name and the pull secret")
        if statuses and all(s in (0, _BROKEN) or s >= 500 or s == 429 for s in statuses):
            return RegistryUnavailable(text)
        return Unknown(text)

    @asynccontextmanager
    async def _get(self, endpoint: Endpoint, url: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """A 2xx answer to a GET of the endpoint, after authentication and redirects; everything else is an EndpointError."""
        import aiohttp

        try:
            async with AsyncExitStack() as stack:
                yield await self._authenticated(stack, endpoint, url, headers)
        except aiohttp.ClientConnectorCertificateError as error:
            raise EndpointError(Attempt(endpoint.base, f"certificate: {error.certificate_error}", tls=False)) from error
        except aiohttp.ClientSSLError as error:
            raise EndpointError(Attempt(endpoint.base, f"tls: {answers.reason(error)}", tls=True)) from error
        except ssl.SSLError as error:
            raise EndpointError(Attempt(endpoint.base, f"tls: {answers.reason(error)}", tls=True)) from error
        except aiohttp.ClientHttpProxyError as error:
            raise EndpointError(Attempt(endpoint.base, f"the proxy answers HTTP {error.status}")) from error
        except TimeoutError as error:
            why = f"no progress for {self._timeout:g} s" if not isinstance(error, aiohttp.ConnectionTimeoutError) else "connect: timed out"
            raise EndpointError(Attempt(endpoint.base, why)) from error
        except aiohttp.ClientConnectorError as error:
            raise EndpointError(Attempt(endpoint.base, f"connect: {answers.reason(error)}")) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EndpointError(Attempt(endpoint.base, f"connection: {answers.reason(error)}", _BROKEN)) from error

    async def _authenticated(self, stack: AsyncExitStack, endpoint: Endpoint, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        for retry in (False, True):
            sent = {**dict(endpoint.headers), **headers, **self._authorized(endpoint)}
            response = await self._follow(stack, endpoint, url, sent)
            # Where a redirect led may not ask for the registry's credentials, nor name a token server for them.
            at_home = answers.origin(str(response.url)) == answers.origin(url)
            if response.status == 401 and at_home and not retry and await self._answer_challenge(endpoint, response, sent):
                response.release()
                continue
            if response.status in (200, 206):
                return response
            raise await refused(endpoint, response)
        raise AssertionError("unreachable")

    async def _follow(self, stack: AsyncExitStack, endpoint: Endpoint, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        session, home = self._session(endpoint), urlsplit(url)
        for _ in range(_REDIRECT_LIMIT):
            proxy = _proxy(endpoint, url)
            response = await stack.enter_async_context(session.get(url, headers=headers, allow_redirects=False, proxy=proxy))
            if response.status not in _REDIRECTS:
                return response
            target = urljoin(url, response.headers.get("Location", ""))
            there = urlsplit(target)
            if there.scheme not in ("http", "https") or not there.hostname or there.username:
                raise EndpointError(Attempt(endpoint.base, "redirects to something that is not an http or https URL", response.status))
            if home.scheme == "https" and there.scheme == "http":
                raise EndpointError(Attempt(endpoint.base, f"redirects from https to http at {there.netloc}", response.status))
            if (there.scheme, there.netloc) != (home.scheme, home.netloc):
                # Another origin gets no credential, none of the configured headers and no client certificate.
                headers = {k: v for k, v in headers.items() if k in ("Accept", "Range")}
                session = self._session(None if endpoint.client else endpoint)
            response.release()
            url = target
        raise EndpointError(Attempt(endpoint.base, f"more than {_REDIRECT_LIMIT} redirects"))

    def _session(self, endpoint: Endpoint | None) -> aiohttp.ClientSession:
        import aiohttp

        if endpoint not in self._sessions:
            dial = endpoint.dial_timeout if endpoint else 30.0
            self._sessions[endpoint] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=endpoint.ssl_context() if endpoint and endpoint.base.startswith("https:") else True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=dial, sock_read=self._timeout),
                headers={"User-Agent": self._agent, "Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=1 << 17,  # a connection that breaks takes twice as much with it
            )
        return self._sessions[endpoint]

    def _authorized(self, endpoint: Endpoint) -> dict[str, str]:
        value, expires = self._authorization.get(endpoint, ("", 0.0))
        return {"Authorization": value} if value and expires > time.monotonic() else {}

    async def _answer_challenge(self, endpoint: Endpoint, response: aiohttp.ClientResponse, sent: dict[str, str]) -> bool:
        """Get what the endpoint asks for. False: there is nothing (more) to offer it."""
        lock = self._locks.setdefault(endpoint, asyncio.Lock())
        async with lock:  # parallel layers need one token, not one each
            now = self._authorized(endpoint)
            if now and now.get("Authorization") != sent.get("Authorization"):
                return True
            offered = await self._offered(endpoint)
            for challenge in auth.challenges(response.headers.getall("WWW-Authenticate", [])):
                if challenge.scheme == "bearer":
                    value, lifetime = await self._token(endpoint, challenge, offered)
                    self._authorization[endpoint] = (f"Bearer {value}", time.monotonic() + lifetime * 0.9)
                    self._secrets.append(Credentials(registry_token=value))
                    return True
                if challenge.scheme == "basic" and (offered.username or offered.password):
                    if sent.get("Authorization") == offered.basic():
                        return False
                    self._authorization[endpoint] = (offered.basic(), float("inf"))
                    return True
            return False

    async def _offered(self, endpoint: Endpoint) -> Credentials:
        """What this endpoint may see: the client's own credentials, else what the node has on file for this very host."""
        if self.credentials.allowed_at(endpoint.host, self.reference.domain, origin=endpoint.origin):
            return self.credentials
        try:
            found = await self._keyring.find(self.reference.domain, self.reference.path) if endpoint.origin else auth.ANONYMOUS
            found = found or await self._keyring.find(endpoint.host, self.reference.path)
        except Failure as error:
            raise EndpointError(Attempt(endpoint.base, str(error), 401)) from error
        self._secrets.append(found)
        return found

    async def _token(self, endpoint: Endpoint, challenge: auth.Challenge, offered: Credentials) -> tuple[str, float]:
        if offered.registry_token:
            return offered.registry_token, float("inf")
        try:
            request = auth.token_request(challenge, endpoint.base, auth.scope_of(self.reference.path), offered)
            same_host = urlsplit(request.url).netloc.lower() == endpoint.host
            session = self._session(endpoint if same_host or not endpoint.client else None)
            method, proxy = "POST" if request.body else "GET", _proxy(endpoint, request.url)
            async with session.request(
                method, request.url, headers=request.headers, data=request.body or None, allow_redirects=False, proxy=proxy
            ) as response:
                body = await read_whole(response, auth.TOKEN_LIMIT, endpoint)
                if response.status != 200:
                    host = urlsplit(request.url).netloc
                    why = f"token server {host}: {answers.summary(response.status, body)}"
                    raise EndpointError(Attempt(endpoint.base, why, response.status))
            return auth.token_of(body)
        except Failure as error:
            raise EndpointError(Attempt(endpoint.base, str(error), 401)) from error

    async def _chunks(self, response: aiohttp.ClientResponse, endpoint: Endpoint) -> AsyncIterator[bytes]:
        async for chunk in response.content.iter_any():
            yield chunk


def _proxy(endpoint: Endpoint, url: str) -> str | None:
    """Not the client's trust_env, which also sends what root's .netrc has."""
    try:
        return proxy_for(url, os.environ)
    except Failure as error:
        raise EndpointError(Attempt(endpoint.base, str(error))) from error
