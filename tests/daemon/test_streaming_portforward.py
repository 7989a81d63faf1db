"""Port-forward: over SPDY, through the WebSocket tunnel, and the older WebSocket way; into pods and into the host's network."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from hack.streaming_client import Listener, SpdyClient, TunnelClient, echo, inside
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
KINDS = pytest.mark.parametrize("kind", [SpdyClient, TunnelClient])


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


@pytest.fixture(scope="module")
def netns(daemon: Daemon, pod: Pod) -> str:
    return f"{daemon.state}/netns/{pod[0]}"


@pytest.fixture
def echoing(netns: str) -> Iterator[Listener]:
    with Listener(netns, echo) as listener:
        yield listener


def forward(daemon: Daemon, node: Node, pod: str, kind: type[SpdyClient] = SpdyClient) -> SpdyClient:
    url = daemon.runtime.PortForward(v1.PortForwardRequest(pod_sandbox_id=pod), timeout=10).url
    return kind(node.netns, url, "portforward.k8s.io") if kind is SpdyClient else kind(node.netns, url)


def connect(client: SpdyClient, number: int, port: int) -> tuple[str, str]:
    """The pair of streams of one connection, as kubectl opens it."""
    headers = {"port": str(port), "requestid": str(number)}
    error = client.open(f"error-{number}", **headers)
    client.end(error)
    return client.open(f"data-{number}", **headers), error


@KINDS
def test_a_connection_and_its_half_close(daemon: Daemon, node: Node, pod: Pod, echoing: Listener, kind: type[SpdyClient]) -> None:
    client = forward(daemon, node, pod[0], kind)
    data, error = connect(client, 0, echoing.port)
    client.send(data, b"ping")
    client.until(lambda: client.data[data] == b"ping")
    client.end(data)
    client.until(lambda: data in client.ended and error in client.ended)
    assert client.data[error] == b""
    client.vanish()


@KINDS
def test_many_connections_to_several_ports(daemon: Daemon, node: Node, pod: Pod, netns: str, kind: type[SpdyClient]) -> None:
    with Listener(netns, echo) as one, Listener(netns, echo) as two:
        client = forward(daemon, node, pod[0], kind)
        sent = {connect(client, n, (one, two)[n % 2].port)[0]: os.urandom(20_000) for n in range(60)}
        for data, payload in sent.items():
            client.send(data, payload[:10_000])
        for data, payload in sent.items():
            client.send(data, payload[10_000:], fin=True)
        client.until(lambda: all(data in client.ended for data in sent), 30)
        assert {data: bytes(client.data[data]) for data in sent} == sent
        client.vanish()


def test_much_in_both_directions(daemon: Daemon, node: Node, pod: Pod, echoing: Listener) -> None:
    client = forward(daemon, node, pod[0])
    data, _ = connect(client, 0, echoing.port)
    payload = os.urandom(8 << 20)

    def send() -> None:
        for start in range(0, len(payload), 65536):
            client.send(data, payload[start : start + 65536])
        client.end(data)

    client.until(lambda: data in client.replied)
    thread = threading.Thread(target=send)
    thread.start()
    client.until(lambda: data in client.ended, 40)
    thread.join()
    assert client.data[data] == payload
    client.vanish()


def test_the_other_side_speaks_first_and_goes(daemon: Daemon, node: Node, pod: Pod, netns: str) -> None:
    def greet(sock: socket.socket) -> None:
        with sock:
            sock.sendall(b"220 hello\r\n")

    with Listener(netns, greet) as listener:
        client = forward(daemon, node, pod[0])
        data, error = connect(client, 0, listener.port)
        client.until(lambda: data in client.ended)
        assert client.data[data] == b"220 hello\r\n"
        client.reset(data)  # kubectl does so when the other side has ended
        client.until(lambda: error in client.ended)
        client.vanish()


def test_a_reset_from_the_pod(daemon: Daemon, node: Node, pod: Pod, netns: str) -> None:
    """Scenario 42."""

    def rude(sock: socket.socket) -> None:
        sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()

    with Listener(netns, rude) as listener:
        client = forward(daemon, node, pod[0])
        data, error = connect(client, 0, listener.port)
        client.send(data, b"x")
        client.until(lambda: data in client.resets and error in client.ended)
        other, _ = connect(client, 1, listener.port)
        client.until(lambda: other in client.replied)
        client.vanish()


def test_a_reset_from_the_client_closes_the_connection(daemon: Daemon, node: Node, pod: Pod, netns: str) -> None:
    gone = threading.Event()

    def watch(sock: socket.socket) -> None:
        while sock.recv(100):
            continue
        gone.set()

    with Listener(netns, watch) as listener:
        client = forward(daemon, node, pod[0])
        data, _ = connect(client, 0, listener.port)
        client.send(data, b"x")
        time.sleep(0.2)
        client.reset(data)
        assert gone.wait(10)
        client.vanish()


@KINDS
def test_nobody_listens(daemon: Daemon, node: Node, pod: Pod, kind: type[SpdyClient]) -> None:
    client = forward(daemon, node, pod[0], kind)
    data, error = connect(client, 0, 9)
    client.until(lambda: error in client.ended and data in client.resets)
    assert b"port 9 to pod" in client.data[error] and b"refused" in client.data[error]
    client.vanish()


def test_a_listener_on_ipv6_only(daemon: Daemon, node: Node, pod: Pod, netns: str) -> None:
    """Scenario 42."""
    with Listener(netns, echo, address="::1") as listener:
        client = forward(daemon, node, pod[0])
        data, _ = connect(client, 0, listener.port)
        client.send(data, b"six", fin=True)
        client.until(lambda: data in client.ended)
        assert client.data[data] == b"six"
        client.vanish()


def test_host_network(daemon: Daemon, node: Node) -> None:
    """Scenario 42."""
    host_pod, _ = daemon.run_pod(host_network=True)
    with Listener(node.netns, echo) as listener:
        client = forward(daemon, node, host_pod)
        data, _ = connect(client, 0, listener.port)
        client.send(data, b"host", fin=True)
        client.until(lambda: data in client.ended)
        assert client.data[data] == b"host"
        client.vanish()


def test_the_pods_loopback_and_no_other(daemon: Daemon, node: Node, pod: Pod) -> None:
    with Listener(node.netns, echo) as outside:
        client = forward(daemon, node, pod[0])
        _, error = connect(client, 0, outside.port)
        client.until(lambda: error in client.ended)
        assert b"refused" in client.data[error]
        client.vanish()


def test_streams_that_make_no_sense_are_refused(daemon: Daemon, node: Node, pod: Pod, echoing: Listener) -> None:
    client = forward(daemon, node, pod[0])
    for name, headers in (("data-a", {}), ("data-b", {"port": "0"}), ("data-c", {"port": "x"}), ("stdin-d", {"port": "80"})):
        client.open(name, **headers)
        client.until(lambda name=name: name in client.resets)
    data, _ = connect(client, 7, echoing.port)
    client.open("data-e", port=str(echoing.port), requestid="7-")
    client.send(data, b"fine", fin=True)
    client.until(lambda: data in client.ended)
    client.vanish()


def test_a_pod_that_stops_takes_its_sessions_along(daemon: Daemon, node: Node) -> None:
    """Sockets of ours in its network namespace would keep it, and the connections of the client open."""
    name, _ = daemon.run_pod()
    netns = f"{daemon.state}/netns/{name}"
    inode = os.stat(netns).st_ino
    with Listener(netns, echo) as listener:
        client = forward(daemon, node, name)
        data, _ = connect(client, 0, listener.port)
        client.send(data, b"x")
        client.until(lambda: client.data[data] == b"x")
        daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=name), timeout=20)
        client.finish(5)
        assert client.closed
    pids = daemon.pids()
    for pid in (pids.daemon, pids.supervisor):
        wait_for("our fds of the namespace to be gone", lambda pid=pid: not holds(pid, inode))
    with pytest.raises(grpc.RpcError) as refused:
        forward(daemon, node, name)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def holds(pid: int | None, inode: int) -> bool:
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return f"net:[{inode}]" in links


def test_sessions_leave_nothing_behind(daemon: Daemon, node: Node, pod: Pod, echoing: Listener) -> None:
    pids = daemon.pids()

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (pids.daemon, pids.supervisor)]

    def once(number: int) -> None:
        client = forward(daemon, node, pod[0], TunnelClient if number % 2 else SpdyClient)
        data, _ = connect(client, 0, echoing.port if number % 3 else 9)
        client.send(data, b"x")
        client.vanish()

    once(0)
    time.sleep(0.5)
    before = descriptors()
    for number in range(60):
        once(number)
    wait_for("descriptors to return", lambda: all(now <= then + 1 for now, then in zip(descriptors(), before, strict=True)))


def test_the_python_clients_port_forward(daemon: Daemon, node: Node, pod: Pod, echoing: Listener) -> None:
    """The older way over WebSocket: channels of ports that are named in advance."""
    from kubernetes.client import Configuration
    from kubernetes.stream import ws_client

    url = daemon.runtime.PortForward(v1.PortForwardRequest(pod_sandbox_id=pod[0], port=[echoing.port, 9]), timeout=10).url

    def run() -> bytes:
        websocket = ws_client.create_websocket(
            Configuration(), url.replace("http:", "ws:"), {"sec-websocket-protocol": "v4.channel.k8s.io"}
        )
        forwarding = ws_client.PortForward(websocket, [echoing.port, 9])
        sock = forwarding.socket(echoing.port)
        sock.sendall(b"hello")
        sock.settimeout(10)
        answer = sock.recv(100)
        wait_for("the other port's error", lambda: forwarding.error(9))
        assert "refused" in forwarding.error(9)
        forwarding.close() if hasattr(forwarding, "close") else sock.close()
        return answer

    assert inside(node.netns, run) == b"hello"
