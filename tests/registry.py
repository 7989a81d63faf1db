"""Registries to pull from: Debian's docker-registry in several dresses, a token server, and one of ours that misbehaves on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from hack.images import Assembled, Pusher
from shim.linux import libc

USER, PASSWORD = "puller", "s3cret-pass"
_BCRYPT = "$2y$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy"  # of PASSWORD


@contextlib.contextmanager
def inside(netns: str | None) -> Iterator[None]:
    """This thread in the network namespace at ``netns`` (a path), with every socket and thread it makes meanwhile."""
    if netns is None:
        yield
        return
    before, there = os.open("/proc/thread-self/ns/net", os.O_RDONLY), os.open(netns, os.O_RDONLY)
    try:
        libc.setns(there, libc.CLONE_NEWNET)
        yield
    finally:
        libc.setns(before, libc.CLONE_NEWNET)
        os.close(before)
        os.close(there)


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 and localhost, its own CA."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path, name: str = "registry") -> Certificate:
        made = cls(directory / f"{name}.crt", directory / f"{name}.key")
        command = [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(made.key), "-out", str(made.certificate)),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return made


@dataclass
class DockerRegistry:
    """``docker-registry serve`` on 127.0.0.1, optionally with TLS and with Basic or Bearer authentication. A context manager."""

    directory: Path
    netns: str | None = None
    port: int = 5000
    tls: Certificate | None = None
    basic: bool = False
    token: TokenServer | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def base(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}"

    def __enter__(self) -> DockerRegistry:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.yml"
        config.write_text(json.dumps(self._config()))  # JSON is YAML
        log = (self.directory / "log").open("wb")
        with inside(self.netns):
            self._process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._wait()
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"docker-registry did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def _config(self) -> dict[str, Any]:
        http: dict[str, Any] = {"addr": self.host, "secret": "x"}
        if self.tls:
            http["tls"] = {"certificate": str(self.tls.certificate), "key": str(self.tls.key)}
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "data")}, "delete": {"enabled": True}},
            "http": http,
        }
        if self.basic:
            path = self.directory / "htpasswd"
            path.write_text(f"{USER}:{_BCRYPT}\n")
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(path)}}
        if self.token:
            config["auth"] = {
                "token": {
                    "realm": self.token.url,
                    "service": "test-registry",
                    "issuer": "test-issuer",
                    "rootcertbundle": str(self.token.certificate.certificate),
                }
            }
        return config

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def push(self, image: Assembled, name: str) -> str:
        """Push to ``repository[:tag]``; the reference to pull it by."""
        repository, _, tag = name.partition(":")
        headers = {}
        if self.basic:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.token:
            headers["Authorization"] = f"Bearer {self.token.issue(f'repository:{repository}:pull,push')}"
        context = ssl.create_default_context(cafile=str(self.tls.certificate)) if self.tls else None
        with inside(self.netns):
            pusher = Pusher(self.base, headers, context)
            pusher.push(image, repository, tag or "latest")
            pusher.close()
        return f"{self.host}/{name}"


class TokenServer:
    """Distribution's token server: checks the user, issues a signed JWT. ``requests`` records what it was asked."""

    def __init__(self, directory: Path, netns: str | None = None, anonymous: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.certificate = Certificate.make(directory, "token")
        self.requests: list[dict[str, Any]] = []
        self._anonymous = anonymous
        outer = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
                outer.answer(self, query)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.answer(self, dict(urllib.parse.parse_qsl(body)))

        with inside(netns):
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def answer(self, handler: _Quiet, query: dict[str, str]) -> None:
        authorization = handler.headers.get("Authorization", "")
        self.requests.append({**query, "authorization": authorization})
        expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if not (self._anonymous or authorization == expected or query.get("refresh_token") == PASSWORD):
            handler.reply(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"bad credentials"}]}')
            return
        handler.reply(200, json.dumps({"token": self.issue(query["scope"]), "expires_in": 60}).encode())

    def issue(self, scope: str) -> str:
        """A JWT for ``repository:NAME:ACTIONS``, signed by openssl."""
        kind, name, actions = scope.split(":")
        der = ssl.PEM_cert_to_DER_cert(self.certificate.certificate.read_text())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {
            **{
                "iss": "test-issuer",
                "sub": USER,
                "aud": "test-registry",
                "exp": now + 300,
                "nbf": now - 10,
                "iat": now,
                "jti": os.urandom(4).hex(),
            },
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.certificate.key)]
        signature = subprocess.run(command, input=signed, check=True, capture_output=True, timeout=20).stdout
        return (signed + b"." + _base64url(signature)).decode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's also asks DNS for the address's name, which here nobody answers
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


@dataclass
class Fake:
    """A registry whose answers tests bend. ``blobs`` and ``manifests`` are served as they are; ``hook(handler, path)`` may answer first
    and returns whether it did. ``seen`` records (method, path, headers)."""

    netns: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    hook: Callable[[Any, str], bool] | None = None
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    tls: Certificate | None = None
    address: str = "127.0.0.1"

    def __enter__(self) -> Fake:
        fake = self

        class Handler(_Quiet):
            def blobs(self) -> dict[str, bytes]:
                return fake.blobs

            def do_GET(self) -> None:
                fake.seen.append((self.command, self.path, dict(self.headers)))
                if fake.hook is None or not fake.hook(self, self.path):
                    fake.serve(self)

        with inside(self.netns):
            self._server = _Server((self.address, 0), Handler)
        self._server.daemon_threads = True
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls.certificate, self.tls.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def host(self) -> str:
        return f"{self.address}:{self._server.server_port}"

    def add(self, image: Assembled, *tags: str) -> None:
        for child in image.children:
            self.add(child)
        self.blobs.update(image.blobs)
        for name in (image.digest, *tags):
            self.manifests[name] = (image.media_type, image.manifest)

    def serve(self, handler: Any) -> None:
        name = handler.path.rpartition("/")[2]
        if "/manifests/" in handler.path and name in self.manifests:
            media_type, body = self.manifests[name]
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            handler.reply(200, body, Content_Type=media_type, Docker_Content_Digest=digest)
        elif "/blobs/" in handler.path and name in self.blobs:
            body = self.blobs[name]
            start = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            if start:
                span = f"bytes {start}-{len(body) - 1}/{len(body)}"
                handler.reply(206, body[int(start) :], Content_Range=span)
            else:
                handler.reply(200, body)
        else:
            handler.reply(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')


@dataclass
class Metered:
    """A hook of ``Fake`` that counts the bytes of blobs it serves. When ``budget`` of them are gone connections are cut, or nothing more
    comes (``stall``), and new requests get a 503."""

    budget: int | None = None
    stall: bool = False
    served: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, handler: Any, path: str) -> bool:
        if "/blobs/" not in path:
            return False
        if self.budget == 0:
            handler.reply(503, Retry_After="0")
            return True
        body = handler.blobs().get(path.rpartition("/")[2])
        if body is None:
            return False
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        for position in range(start, len(body), 1 << 16):
            if not self._send(handler, body[position : position + (1 << 16)]):
                break
        return True

    def _send(self, handler: Any, piece: bytes) -> bool:
        with self._lock:
            whole = self.budget is None or self.budget >= len(piece)
            piece = piece if whole else piece[: self.budget]
            self.served += len(piece)
            if self.budget is not None:
                self.budget -= len(piece)
        try:
            handler.wfile.write(piece)
            if not whole:
                handler.wfile.flush()
                if self.stall:
                    handler.rfile.read(1)
                handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side has had enough
            return False
        return whole


def hosts_toml(directory: Path, domain: str, text: str) -> None:
    """Write ``directory/domain/hosts.toml``."""
    (directory / domain).mkdir(parents=True, exist_ok=True)
    (directory / domain / "hosts.toml").write_text(text)
