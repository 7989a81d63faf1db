"""Whose credentials go where: the node's auth file, requests, mirrors, redirects, token servers and proxies, in the node's network."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.errors import CriError
from cri.images.auth import Credentials
from cri.images.store import Images
from hack.images import Assembled, Layer, assemble
from tests.daemon.harness import Node
from tests.registry import PASSWORD, USER, Certificate, DockerRegistry, Fake, TokenServer, hosts_toml, inside

pytestmark = pytest.mark.registry
GOOD = Credentials(USER, PASSWORD)


@pytest.fixture(autouse=True)
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    (tmp_path / "certs.d").mkdir()
    return tmp_path / "certs.d"


@pytest.fixture
async def store(tmp_path: Path, certs: Path) -> Any:
    settings = config.Images(registry_dir=str(certs), auth_file=str(tmp_path / "auth.json"), progress_timeout=config.Seconds(3))
    store = Images(tmp_path / "images", settings)
    store.load()
    yield store
    await store.close()


def small(text: str = "hello") -> Assembled:
    return assemble([Layer().file("etc/motd", text).finish()])


def auth_file(tmp_path: Path, **entries: Credentials) -> None:
    auths = {host: {"auth": base64.b64encode(f"{c.username}:{c.password}".encode()).decode()} for host, c in entries.items()}
    (tmp_path / "auth.json").write_text(json.dumps({"auths": auths}))


def asking(credentials: Credentials) -> Callable[[Any, str], bool]:
    """A hook: everything needs these."""

    def private(handler: Any, path: str) -> bool:
        if handler.headers.get("Authorization") == credentials.basic():
            return False
        handler.reply(401, WWW_Authenticate='Basic realm="x"')
        return True

    return private


async def test_the_node_s_auth_file(store: Images, node: Node, tmp_path: Path) -> None:
    """Read anew at each pull; a request's own credentials go before it."""
    with DockerRegistry(tmp_path / "reg", node.netns, port=5443, basic=True) as registry:
        ref = registry.push(small(), "team/app")
        with pytest.raises(CriError, match="access denied"):
            await store.pull(ref)
        auth_file(tmp_path, **{registry.host: Credentials(USER, "rotated-away")})
        with pytest.raises(CriError, match="access denied") as caught:
            await store.pull(ref)
        assert "rotated-away" not in str(caught.value)
        auth_file(tmp_path, **{registry.host: Credentials(USER, "wrong"), f"{registry.host}/team": GOOD})
        assert (await store.pull(ref)).repo_tags
        with pytest.raises(CriError, match="access denied"):
            await store.pull(ref, Credentials(USER, "given-and-wrong"))
        (tmp_path / "auth.json").write_text('{"auths": {"x": {"auth": "c2VjcmV0"}}}')
        with pytest.raises(CriError, match=r"auth\.json: auths\.x\.auth: not base64 of user:password"):
            await store.pull(ref)
        assert (await store.pull(ref, GOOD)).repo_tags


async def test_an_identity_token_on_file(store: Images, node: Node, tmp_path: Path) -> None:
    server = TokenServer(tmp_path / "token")
    try:
        with DockerRegistry(tmp_path / "reg", node.netns, port=5443, token=server) as registry:
            ref = registry.push(small(), "team/app")
            (tmp_path / "auth.json").write_text(json.dumps({"auths": {registry.host: {"identitytoken": PASSWORD}}}))
            assert (await store.pull(ref)).repo_tags
            assert server.requests[-1]["grant_type"] == "refresh_token" and server.requests[-1]["scope"] == "repository:team/app:pull"
    finally:
        server.close()


async def test_each_host_gets_its_own(store: Images, certs: Path, tmp_path: Path) -> None:
    """Mirror and registry each see what is on file for them, and nothing of the other's."""
    image = small()
    mine, theirs = Credentials("origin-user", "origin-pass"), Credentials("mirror-user", "mirror-pass")
    with Fake() as mirror, Fake() as origin:
        mirror.hook, origin.hook = asking(theirs), asking(mine)
        origin.add(image, "latest")
        mirror.add(image)  # the mirror does not have the tag
        hosts_toml(certs, "reg.example", f'server = "http://{origin.host}"\n[host."http://{mirror.host}"]\n')
        auth_file(tmp_path, **{"reg.example": mine, mirror.host: theirs})
        assert (await store.pull("reg.example/r")).id == image.id
        for fake, allowed in ((mirror, theirs), (origin, mine)):
            assert {h.get("Authorization") for _, _, h in fake.seen} <= {None, allowed.basic()}
        assert any("/blobs/" in path for _, path, _ in mirror.seen), "the mirror gave the content"
        await store.remove("reg.example/r")
        await store.pull("reg.example/r", mine)
        assert {h.get("Authorization") for _, _, h in mirror.seen} <= {None, theirs.basic()}


@pytest.mark.parametrize("challenge", ['Basic realm="x"', 'Bearer realm="http://{host}/token",service="x"'])
async def test_where_a_redirect_leads_may_not_ask_for_credentials(store: Images, challenge: str) -> None:
    """CVE-2020-15157: the storage behind a registry answers 401 and names a token server of its own."""
    image = small()
    with Fake() as thief, Fake() as origin:
        thief.hook = lambda handler, path: handler.reply(401, WWW_Authenticate=challenge.format(host=thief.host)) or True
        origin.add(image, "latest")
        private = asking(GOOD)

        def elsewhere(handler: Any, path: str) -> bool:
            if private(handler, path):
                return True
            if "/blobs/" in path:
                handler.reply(307, Location=f"http://{thief.host}{path}")
            return "/blobs/" in path

        origin.hook = elsewhere
        with pytest.raises(CriError, match="HTTP 401"):
            await store.pull(f"{origin.host}/r", GOOD)
        assert thief.seen and not any("/token" in path for _, path, _ in thief.seen)
        assert all("Authorization" not in headers for _, _, headers in thief.seen)


async def test_layer_urls_are_never_followed(store: Images) -> None:
    """CVE-2020-15157 proper: a manifest whose layer names a foreign URL."""
    image = small()
    with Fake() as thief, Fake(hook=asking(GOOD)) as origin:
        document = json.loads(image.manifest)
        document["layers"][0]["urls"] = [f"http://{thief.host}/layer"]
        document["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        origin.add(Assembled(image.media_type, json.dumps(document).encode(), image.blobs), "latest")
        await store.pull(f"{origin.host}/r", GOOD)
        assert thief.seen == []


async def test_a_token_that_expires_in_the_middle(store: Images) -> None:
    """Each token is good for three requests; the pull needs more, and goes on where it was cut."""
    image = assemble([Layer().file(f"f{n}", str(n) * 4000).finish() for n in range(6)])
    issued, uses = 0, 0
    lock = threading.Lock()

    def short_lived(handler: Any, path: str) -> bool:
        nonlocal issued, uses
        with lock:
            if path.startswith("/token"):
                issued, uses = issued + 1, 0
                handler.reply(200, json.dumps({"token": f"t{issued}", "expires_in": 3600}).encode())
                return True
            if handler.headers.get("Authorization") == f"Bearer t{issued}" and uses < 3:
                uses += 1
                return False
        handler.reply(401, WWW_Authenticate=f'Bearer realm="http://{handler.headers["Host"]}/token",service="s"')
        return True

    with Fake(hook=short_lived) as fake:
        fake.add(image, "latest")
        assert (await store.pull(f"{fake.host}/r")).id == image.id
        assert 3 <= issued <= 8


async def test_a_registry_that_quotes_what_it_was_sent(store: Images, tmp_path: Path) -> None:
    """SCENARIOS 57: errors end up in pods' events."""
    secrets = Credentials("echo-user", "echo-pass")

    def echo(handler: Any, path: str) -> bool:
        sent = handler.headers.get("Authorization", "")
        if path.startswith("/token"):
            handler.reply(200, json.dumps({"token": "issued-token-value"}).encode())
        elif "/manifests/basic" in path and not sent:
            handler.reply(401, WWW_Authenticate='Basic realm="x"')
        elif not sent:
            handler.reply(401, WWW_Authenticate=f'Bearer realm="http://{handler.headers["Host"]}/token"')
        else:
            plain = base64.b64decode(sent.partition(" ")[2] + "==", altchars=b"-_").decode(errors="replace")
            handler.reply(400, json.dumps({"errors": [{"code": "BAD", "message": f"{sent} {plain}"}]}).encode())
        return True

    with Fake(hook=echo) as fake:
        auth_file(tmp_path, **{fake.host: secrets})
        for tag in ("basic", "bearer"):
            for given in (secrets, Credentials()):
                with pytest.raises(CriError, match="HTTP 400 BAD") as caught:
                    await store.pull(f"{fake.host}/r:{tag}", given)
                text = str(caught.value)
                assert "[redacted]" in text and "echo-pass" not in text and "issued-token-value" not in text
                assert base64.b64encode(b"echo-user:echo-pass").decode() not in text


# -- proxies ----------------------------------------------------------------------------------------------------------------


class Tunnel:
    """A proxy that wants a password and connects every CONNECT to one place. ``asked`` holds the targets."""

    def __init__(self, port: int, password: str) -> None:
        self._port, self._expected = port, "Basic " + base64.b64encode(f"proxy-user:{password}".encode()).decode()
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (piece := client.recv(4096)):
            head += piece
        lines = head.decode().split("\r\n")
        self.asked.append(lines[0].split()[1])
        if f"proxy-authorization: {self._expected}".lower() not in [x.lower() for x in lines]:
            client.sendall(b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="p"\r\nContent-Length: 0\r\n\r\n')
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._port))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        _copy(client, server)

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


async def test_an_https_proxy_with_a_password(store: Images, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = small()
    with Fake(tls=Certificate.make(tmp_path)) as fake:
        fake.add(image, "latest")
        proxy = Tunnel(int(fake.host.rpartition(":")[2]), "proxy-p@ss")
        hosts_toml(certs, "reg.example", 'server = "https://reg.example"\nskip_verify = true\n')
        try:
            monkeypatch.setenv("HTTPS_PROXY", f"http://proxy-user:wrong-secret@{proxy.host}")
            with pytest.raises(CriError) as caught:
                await store.pull("reg.example/r")
            assert "the proxy answers HTTP 407" in str(caught.value) and "secret" not in str(caught.value)
            monkeypatch.setenv("HTTPS_PROXY", f"http://proxy-user:proxy-p%40ss@{proxy.host}")
            assert (await store.pull("reg.example/r")).id == image.id
            assert set(proxy.asked) == {"reg.example:443"}
            assert all("Proxy-Authorization" not in headers for _, _, headers in fake.seen)
            monkeypatch.setenv("HTTPS_PROXY", "http://proxy-user:wrong-secret@127.0.0.1:1")
            with pytest.raises(CriError) as caught:
                await store.pull("reg.example/r")
            assert "secret" not in str(caught.value)
        finally:
            proxy.close()


async def test_no_proxy_with_a_range(store: Images, certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's address is 192.0.2.1: direct if NO_PROXY has its network."""
    with Fake(address="192.0.2.1") as direct, Fake() as proxy:
        direct.add(small("direct"), "latest")
        proxy.add(small("proxied"), "latest")
        hosts_toml(certs, direct.host, f'server = "http://{direct.host}"\n')
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,192.0.3.0/24")
        assert (await store.pull(f"{direct.host}/r")).id == small("proxied").id
        monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,192.0.2.0/24")
        assert (await store.pull(f"{direct.host}/r")).id == small("direct").id
