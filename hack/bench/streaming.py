"""Exec and port-forward over SPDY: how long a session takes to set up, and how much goes through it."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

from hack.bench.endpoints import Endpoint
from hack.bench.measure import Bench, Row, Samples, down, turns, up
from hack.streaming_client import Listener, SpdyClient
from protos.runtime.v1 import api_pb2 as v1

V4 = "v4.channel.k8s.io"
CHUNK = 1 << 20


def streaming(bench: Bench) -> list[Row]:
    """Host network, because the peer has no other here. The clients are ours and the same for both."""
    samples = Samples()
    pods = {endpoint.name: up(endpoint, bench.image) for endpoint in bench.endpoints}
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for endpoint in bench.endpoints:
        run(bench, endpoint, pods[endpoint.name][1], "true")
    for endpoint in turns(bench, bench.sizes.execs):
        with samples.time("exec session: URL, upgrade, streams, `true`, status", endpoint):
            run(bench, endpoint, pods[endpoint.name][1], "true")
    megabytes = bench.sizes.stream_megabytes
    for endpoint in turns(bench, max(3, bench.sizes.pulls)):
        pod, container = pods[endpoint.name]
        rates["exec stdout"][endpoint.name].append(exec_rate(bench, endpoint, container, megabytes << 20))
        rates["port-forward"][endpoint.name].append(forward_rate(bench, endpoint, pod, megabytes << 20))
        rates["connections"][endpoint.name].append(connection_rate(bench, endpoint, pod, bench.sizes.execs * 2))
    for endpoint in bench.endpoints:
        down(endpoint, *pods[endpoint.name])

    def row(label: str, unit: str, name: str) -> Row:
        return Row(label, unit, {e: statistics.median(values) for e, values in rates[name].items()}, more=True)

    return [
        *samples.rows("exec session: URL, upgrade, streams, `true`, status"),
        row("exec stdout", "MB/s", "exec stdout"),
        row("port-forward, one connection", "MB/s", "port-forward"),
        row("port-forward, connections one after the other, until the first byte", "/s", "connections"),
    ]


def run(bench: Bench, endpoint: Endpoint, container: str, *command: str) -> None:
    """One session to its end."""
    with opened(bench, endpoint, container, *command) as client:
        client.until(lambda: client.gone_away)
        if client.code != 0:
            raise RuntimeError(f"{endpoint.name}: {command} exited with {client.code}")


@contextlib.contextmanager
def opened(bench: Bench, endpoint: Endpoint, container: str, *command: str) -> Iterator[SpdyClient]:
    request = v1.ExecRequest(container_id=container, cmd=command, stdout=True)
    client = SpdyClient(bench.netns, endpoint.runtime.Exec(request, timeout=30).url, V4)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for name in ("error", "stdout"):
            client.open(name)
        yield client
    finally:
        client.sock.close()


def exec_rate(bench: Bench, endpoint: Endpoint, container: str, size: int) -> float:
    """MB/s of zeros; their frames' headers are counted with them, 8 bytes each."""
    with opened(bench, endpoint, container, "dd", "if=/dev/zero", "bs=1M", f"count={size >> 20}") as client:
        client.until(lambda: client.data["stdout"])
        began, first = time.perf_counter(), len(client.data["stdout"])
        return count(client.sock, size - first, began)


def count(sock: socket.socket, size: int, began: float) -> float:
    buffer, left = bytearray(CHUNK), size
    while left > 0:
        got = sock.recv_into(buffer)
        if not got:
            raise RuntimeError(f"the connection ended {left} bytes early")
        left -= got
    return size / 1e6 / (time.perf_counter() - began)


def forwarding(bench: Bench, endpoint: Endpoint, pod: str) -> SpdyClient:
    url = endpoint.runtime.PortForward(v1.PortForwardRequest(pod_sandbox_id=pod), timeout=30).url
    client = SpdyClient(bench.netns, url, "portforward.k8s.io")
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def connect(client: SpdyClient, number: int, port: int) -> tuple[str, str]:
    headers = {"port": str(port), "requestid": str(number)}
    error = client.open(f"error-{number}", **headers)
    client.end(error)
    return client.open(f"data-{number}", **headers), error


def forward_rate(bench: Bench, endpoint: Endpoint, pod: str, size: int) -> float:
    """MB/s that a server in the pod sends."""

    def serve(sock: socket.socket) -> None:
        piece = bytes(CHUNK)
        with sock, contextlib.suppress(OSError):
            for _ in range(size // CHUNK + 1):
                sock.sendall(piece)

    with Listener(bench.netns, serve) as listener:
        client = forwarding(bench, endpoint, pod)
        try:
            data, _ = connect(client, 0, listener.port)
            client.until(lambda: client.data[data])
            began, first = time.perf_counter(), len(client.data[data])
            return count(client.sock, size - first, began)
        finally:
            client.sock.close()


def connection_rate(bench: Bench, endpoint: Endpoint, pod: str, number: int) -> float:
    """Connections of one session, each until the server's greeting has come; then the client resets it. (Their orderly ends would be no
    comparison: containerd 1.6 does not pass a client's end on, and waits a second before it passes on the server's.)"""

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.sendall(b"hello")
            sock.recv(1)

    with Listener(bench.netns, serve) as listener:
        client = forwarding(bench, endpoint, pod)
        try:
            began = time.perf_counter()
            for n in range(number):
                data, _ = connect(client, n, listener.port)
                client.until(lambda data=data: client.data[data])
                client.reset(data)
            return number / (time.perf_counter() - began)
        finally:
            client.sock.close()
