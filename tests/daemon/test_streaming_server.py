"""The streaming server's own settings: TLS and client certificates, the idle limit, bounds."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.streaming.server import MAX_SESSIONS
from hack.streaming_client import Refused, SpdyClient, dial
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, running, wait_for
from tests.registry import DockerRegistry

V4 = "v4.channel.k8s.io"


def certificates(directory: Path) -> None:
    """A CA, and one server and one client that it has signed."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=ca")
    (directory / "san").write_text("subjectAltName=IP:::1,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-out",
            f"{name}.crt", "-extfile", "san",
        )  # fmt: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("keys")
    certificates(directory)
    return directory


@pytest.fixture(scope="module")
def secure(node: Node, keys: Path, registry: DockerRegistry) -> Iterator[tuple[Daemon, str]]:
    """A daemon that serves streams on IPv6 with TLS, wants client certificates and has little patience; and a container."""
    extra = (
        f'[streaming]\naddress = "::1"\nidle_timeout = "2s"\n'
        f'tls_cert = "{keys}/server.crt"\ntls_key = "{keys}/server.key"\nclient_ca = "{keys}/ca.crt"\n'
    )
    with running(node, extra=extra) as daemon:
        reference = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
        yield daemon, daemon.run(daemon.run_pod(), reference, "sleep", "100000")


def connect(node: Node, url: str, keys: Path, *, certificate: bool = True) -> SpdyClient:
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    if certificate:
        context.load_cert_chain(keys / "client.crt", keys / "client.key")
    sock = context.wrap_socket(dial(node.netns, url), server_hostname="::1")
    return SpdyClient(node.netns, url, V4, sock=sock)


def url_of(daemon: Daemon, container: str, *command: str, stdin: bool = False) -> str:
    request = v1.ExecRequest(container_id=container, cmd=command, stdin=stdin, stdout=True)
    return daemon.runtime.Exec(request, timeout=10).url


def test_tls_on_ipv6_with_a_client_certificate(secure: tuple[Daemon, str], node: Node, keys: Path) -> None:
    url = url_of(*secure, "head", "-c", "3000000", "/dev/zero")
    assert url.startswith("https://[::1]:")
    client = connect(node, url, keys)
    for name in ("error", "stdout"):
        client.open(name)
    client.until(lambda: client.gone_away)
    client.sock.close()
    assert len(client.data["stdout"]) == 3_000_000 and client.code == 0


def test_no_certificate_no_session(secure: tuple[Daemon, str], node: Node, keys: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        connect(node, url_of(*secure, "true"), keys, certificate=False)
    with pytest.raises((ConnectionError, AssertionError, Refused)):
        SpdyClient(node.netns, url_of(*secure, "true"), V4)  # and no plain HTTP


def test_a_session_on_which_nothing_moves_ends(secure: tuple[Daemon, str], node: Node, keys: Path) -> None:
    client = connect(node, url_of(*secure, "cat", stdin=True), keys)
    for name in ("error", "stdin", "stdout"):
        client.open(name)
    for _ in range(6):
        time.sleep(0.5)
        client.send("stdin", b".")
    client.until(lambda: client.data["stdout"] == b"......")
    began = time.monotonic()
    client.finish(10)
    assert 1 < time.monotonic() - began < 5


def test_sessions_of_a_container_are_bounded(daemon: Daemon, node: Node, busybox: str) -> None:
    container = daemon.run(daemon.run_pod(), busybox, "sleep", "100000")
    clients = []
    for _ in range(MAX_SESSIONS):
        client = SpdyClient(node.netns, url_of(daemon, container, "true"), V4)
        clients.append(client)
    with pytest.raises(grpc.RpcError) as refused:
        url_of(daemon, container, "true")
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for client in clients:
        client.vanish()

    def again() -> bool:
        try:
            return bool(url_of(daemon, container, "true"))
        except grpc.RpcError:
            return False

    wait_for("room for more", again)


def test_exec_outlives_neither_container_nor_shared_pid_namespace(daemon: Daemon, node: Node, busybox: str) -> None:
    """Where the kernel does not end exec'd processes with the container's first one, we do."""
    pod = daemon.run_pod(shared_pid=True)
    container = daemon.run(pod, busybox, "sleep", "2")
    client = SpdyClient(node.netns, url_of(daemon, container, "sleep", "1234"), V4)
    for name in ("error", "stdout"):
        client.open(name)
    client.finish(15)
    assert client.code == 137
    assert daemon.wait_exit(container).exit_code == 0


def test_a_restarted_daemon_serves_again(daemon: Daemon, node: Node, busybox: str) -> None:
    container = daemon.run(daemon.run_pod(), busybox, "sleep", "100000")
    old = url_of(daemon, container, "true")
    client = SpdyClient(node.netns, url_of(daemon, container, "cat", stdin=True), V4)
    for name in ("error", "stdin", "stdout"):
        client.open(name)
    client.until(lambda: len(client.replied) == 3)
    daemon.restart()
    client.finish()
    client = SpdyClient(node.netns, url_of(daemon, container, "echo", "back"), V4)
    for name in ("error", "stdout"):
        client.open(name)
    client.finish()
    assert client.data["stdout"] == b"back\n"
    with pytest.raises((Refused, ConnectionError)):
        SpdyClient(node.netns, old, V4)
