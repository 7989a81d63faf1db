"""Exec over SPDY and WebSocket: every combination of streams, terminals, exit codes, slow readers, clients that vanish."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from urllib.parse import urlsplit

import grpc
import pytest

from hack.streaming_client import ChannelClient, Client, Refused, SpdyClient, dial, inside
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, wait_for

V4 = "v4.channel.k8s.io"
Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


@pytest.fixture(scope="module")
def container(daemon: Daemon, pod: Pod, busybox: str) -> str:
    return daemon.run(pod, busybox, "sleep", "100000")


def url_of(
    daemon: Daemon, container: str, *command: str, stdin: bool = False, stdout: bool = True, stderr: bool = True, tty: bool = False
) -> str:
    request = v1.ExecRequest(container_id=container, cmd=command, stdin=stdin, stdout=stdout, stderr=stderr and not tty, tty=tty)
    return daemon.runtime.Exec(request, timeout=10).url


def start(node: Node, url: str, kind: str, *streams: str, **options: int) -> Client:
    """A client of one kind, whose streams are open."""
    if kind == "spdy":
        client = SpdyClient(node.netns, url, V4, "v3.channel.k8s.io", **options)
        for name in ("error", *streams):
            client.open(name)
        return client
    return ChannelClient(node.netns, url, kind)


def processes(daemon: Daemon, container: str) -> str:
    return daemon.exec(container, "ps", "-o", "pid,args").stdout.decode()


KINDS = pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io", V4])


@KINDS
def test_output_and_exit_code(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    client = start(node, url_of(daemon, container, "sh", "-c", "echo out; echo err >&2; exit 7"), kind, "stdout", "stderr")
    client.finish()
    assert (client.data["stdout"], client.data["stderr"], client.code) == (b"out\n", b"err\n", 7)


@pytest.mark.parametrize("stdin", [False, True])
@pytest.mark.parametrize("outputs", [(), ("stdout",), ("stderr",), ("stdout", "stderr")])
@pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io"])
def test_every_combination_of_streams(daemon: Daemon, node: Node, container: str, kind: str, stdin: bool, outputs: tuple[str, ...]) -> None:
    options = {name: name in outputs for name in ("stdout", "stderr")}
    if not stdin and not outputs:
        with pytest.raises(grpc.RpcError) as refused:
            url_of(daemon, container, "true", **options)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        return
    url = url_of(daemon, container, "sh", "-c", "cat; echo err >&2; exit 3", stdin=stdin, **options)
    client = start(node, url, kind, *outputs, *(["stdin"] if stdin else []))
    if stdin:
        client.send("stdin", b"in")
        client.end("stdin")
    client.finish()
    assert client.data["stdout"] == (b"in" if stdin and "stdout" in outputs else b"")
    assert client.data["stderr"] == (b"err\n" if "stderr" in outputs else b"")
    assert client.code == 3


def test_terminal_and_stderr_exclude_each_other(daemon: Daemon, container: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        daemon.runtime.Exec(v1.ExecRequest(container_id=container, cmd=["sh"], stdout=True, stderr=True, tty=True), timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@KINDS
def test_a_terminal_and_its_size(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    """Scenario 40."""
    url = url_of(daemon, container, "sh", stdin=True, tty=True)
    client = start(node, url, kind, "stdin", "stdout", "resize")
    client.resize(24, 80)
    client.send("stdin", b"tty; stty size; echo $TERM\n")
    client.until(lambda: b"xterm\r\n" in client.data["stdout"])
    assert b"/dev/pts/" in client.data["stdout"] and b"\r\n24 80\r\n" in client.data["stdout"]
    client.resize(50, 132)
    client.send("stdin", b"stty size\n")
    client.until(lambda: b"50 132\r\n" in client.data["stdout"])
    client.send("stdin", b"exit 5\n")
    client.finish()
    assert client.code == 5


def test_older_versions_say_failures_in_words(daemon: Daemon, node: Node, container: str) -> None:
    for protocols in (["v3.channel.k8s.io"], ["v2.channel.k8s.io"], ["channel.k8s.io"], []):
        client = SpdyClient(node.netns, url_of(daemon, container, "sh", "-c", "echo x; exit 9"), *protocols)
        assert client.protocol == "".join(protocols)
        for name in ("error", "stdout", "stderr"):
            client.open(name)
        client.finish()
        assert client.data["stdout"] == b"x\n" and b"exit code 9" in client.data["error"]


def test_base64_and_the_nameless_dialect(daemon: Daemon, node: Node, container: str) -> None:
    client = ChannelClient(node.netns, url_of(daemon, container, "sh", "-c", "echo x; exit 9"), "")
    client.finish()
    assert client.data["stdout"] == b"x\n" and b"exit code 9" in client.data["error"] and client.code_of_close == 1000


@KINDS
def test_a_program_that_does_not_exist(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    client = start(node, url_of(daemon, container, "/no/such/program", stdin=True), kind, "stdin", "stdout", "stderr")
    client.finish()
    status = json.loads(client.data["error"])
    assert (status["status"], status["reason"]) == ("Failure", "InternalError") and "/no/such/program" in status["message"]


@pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io"])
def test_much_output_and_a_slow_reader(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    """All of it arrives, although its process has ended long before; and what waits does so in pipes and sockets."""
    size = 12 << 20
    url = url_of(daemon, container, "sh", "-c", f"head -c {size} /dev/zero | tee /dev/stderr | md5sum >&2", stderr=False)
    url = url_of(daemon, container, "head", "-c", str(size), "/dev/zero")
    client = start(node, url, kind, "stdout", "stderr", **({"receive_buffer": 16384} if kind == "spdy" else {}))
    client.until(lambda: len(client.data["stdout"]) > 1000)
    resident = rss(daemon)
    time.sleep(2)
    assert rss(daemon) - resident < 6 << 20
    client.finish(60)
    assert len(client.data["stdout"]) == size and client.code == 0


def rss(daemon: Daemon) -> int:
    pid = daemon.pids().daemon
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io"])
def test_much_input(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    data = os.urandom(6 << 20)
    client = start(node, url_of(daemon, container, "sha256sum", stdin=True), kind, "stdin", "stdout", "stderr")
    for start_ in range(0, len(data), 100_000):
        client.send("stdin", data[start_ : start_ + 100_000])
    client.end("stdin")
    client.finish(60)
    assert client.data["stdout"].split()[0].decode() == hashlib.sha256(data).hexdigest() and client.code == 0


def test_input_that_nobody_reads_is_held_back(daemon: Daemon, node: Node, container: str) -> None:
    """The daemon stops reading from the client instead of growing; the process's end ends the session all the same."""
    client = start(node, url_of(daemon, container, "sleep", "3", stdin=True), "spdy", "stdin", "stdout", "stderr")
    before = rss(daemon)
    client.sock.settimeout(1)
    sent = 0
    with pytest.raises(TimeoutError):
        for _ in range(2000):
            client.send("stdin", bytes(65536))
            sent += 65536
    assert sent < 64 << 20 and rss(daemon) - before < 16 << 20
    wait_for("the end of the process", lambda: "sleep 3\n" not in processes(daemon, container))
    client.sock.settimeout(10)
    deadline = time.monotonic() + 10
    while client.read(max(0.1, deadline - time.monotonic())):
        continue
    assert client.code == 0


def test_a_background_child_does_not_hold_the_session(daemon: Daemon, node: Node, container: str) -> None:
    began = time.monotonic()
    client = start(node, url_of(daemon, container, "sh", "-c", "echo first; sleep 8 & exit 4"), "spdy", "stdout", "stderr")
    client.finish()
    assert (client.data["stdout"], client.code) == (b"first\n", 4)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io"])
def test_a_client_that_vanishes(daemon: Daemon, node: Node, container: str, kind: str) -> None:
    """As with containerd the process goes on; its stdin ends."""
    for command, stays in (("sleep 601", True), ("cat; sleep 0.1", False)):
        client = start(node, url_of(daemon, container, "sh", "-c", f"{command}; true", stdin=True), kind, "stdin", "stdout", "stderr")
        wait_for("the process", lambda command=command: command.split(";")[0] in processes(daemon, container))
        client.vanish()
        if stays:
            time.sleep(0.5)
            assert "sleep 601" in processes(daemon, container)
            daemon.exec(container, "pkill", "-f", "sleep 601")
        else:
            wait_for("its end", lambda: "\n".join(processes(daemon, container).split("\n")).count(" cat\n") == 0)


def test_sessions_leave_nothing_behind(daemon: Daemon, node: Node, container: str) -> None:
    """CVE-2022-23471, CVE-2025-64329: terminals whose process does not start, clients that vanish at any moment, background children."""
    pids = daemon.pids()

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (pids.daemon, pids.supervisor, pids.stdio)]

    def round_(number: int) -> None:
        if number % 4 == 0:
            client = start(node, url_of(daemon, container, "/missing", stdin=True, tty=True), "spdy", "stdin", "stdout", "resize")
            client.resize(1, 1)
            client.finish()
        elif number % 4 == 1:
            client = start(node, url_of(daemon, container, "sh", "-c", "sleep 0.2 & true"), V4)
            client.vanish()
        elif number % 4 == 2:
            client = start(node, url_of(daemon, container, "cat", stdin=True, tty=True), "spdy", "stdin", "stdout")
            client.vanish()  # a stream is missing
        else:
            client = start(node, url_of(daemon, container, "sh", "-c", "sleep 0.1; echo x"), "spdy", "stdout", "stderr")
            client.vanish()

    for number in range(8):
        round_(number)
    time.sleep(1)
    before = descriptors()
    for number in range(60):
        round_(number)
    wait_for("descriptors to return", lambda: all(now <= then + 2 for now, then in zip(descriptors(), before, strict=True)), 15)
    assert "streaming session failed" not in daemon.tail(5000)


def test_exec_while_the_container_stops(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    """Scenario 39: the session ends with its container."""
    container = daemon.run(pod, busybox, "sh", "-c", "trap 'sleep 1; exit 0' TERM; while :; do sleep 0.1; done")
    client = start(node, url_of(daemon, container, "sleep", "1000"), "spdy", "stdout", "stderr")
    wait_for("the process", lambda: "sleep 1000" in processes(daemon, container))
    stopping = threading.Thread(
        target=lambda: daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=10), timeout=20)
    )
    stopping.start()
    client.finish()
    assert client.code == 137
    stopping.join()
    with pytest.raises(grpc.RpcError) as refused:
        url_of(daemon, container, "true")
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_url_is_good_for_one_request(daemon: Daemon, node: Node, container: str) -> None:
    url = url_of(daemon, container, "echo", "once")
    start(node, url, "spdy", "stdout", "stderr").finish()
    for bad in (url, url[:-1] + "!", url.rpartition("/")[0] + "/", url.replace("/exec/", "/attach/"), url.replace("/exec/", "/")):
        with pytest.raises(Refused) as refused:
            SpdyClient(node.netns, bad, V4)
        assert refused.value.status == 404


def test_a_token_of_another_kind_is_refused(daemon: Daemon, node: Node, container: str) -> None:
    url = url_of(daemon, container, "echo", "once")
    with pytest.raises(Refused):
        SpdyClient(node.netns, url.replace("/exec/", "/portforward/"), V4)
    with pytest.raises(Refused) as refused:
        SpdyClient(node.netns, url_of(daemon, container, "true"), "v9.channel.k8s.io")
    assert refused.value.status == 403
    with pytest.raises(Refused) as refused:
        ChannelClient(node.netns, url_of(daemon, container, "true"), "v9.channel.k8s.io")
    assert refused.value.status == 400


def test_noise_on_the_port(daemon: Daemon, node: Node, container: str) -> None:
    """CVE-2026-35469: none of it ends anything but its own connection."""
    for _ in range(20):
        sock = dial(node.netns, url_of(daemon, container, "true"))
        sock.sendall(os.urandom(400) + b"\r\n\r\n")
        sock.close()
    for _ in range(20):
        client = SpdyClient(node.netns, url_of(daemon, container, "cat", stdin=True), V4)
        client.sock.sendall(os.urandom(400))
        client.sock.close()
    sock = dial(node.netns, url_of(daemon, container, "true"))
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    client = start(node, url_of(daemon, container, "echo", "alive"), "spdy", "stdout", "stderr")
    client.finish()
    assert client.data["stdout"] == b"alive\n"


def test_loopback_is_where_it_listens(daemon: Daemon, node: Node, container: str) -> None:
    assert urlsplit(url_of(daemon, container, "true")).hostname == "127.0.0.1"

    def refused() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("192.0.2.1", urlsplit(url_of(daemon, container, "true")).port)) != 0

    assert inside(node.netns, refused)


def test_the_python_clients_stream(daemon: Daemon, node: Node, container: str) -> None:
    """The ``kubernetes`` client's stream module, as an API server would pass it on."""
    from kubernetes.client import Configuration
    from kubernetes.stream import ws_client

    url = url_of(daemon, container, "sh", "-c", "read line; echo got $line; echo err >&2; exit 6", stdin=True)

    def run() -> tuple[str, str, int]:
        client = ws_client.WSClient(Configuration(), url.replace("http:", "ws:"), {}, capture_all=True)
        client.write_stdin("hello\n")
        client.run_forever(timeout=20)
        return client.read_stdout(), client.read_stderr(), client.returncode

    assert inside(node.netns, run) == ("got hello\n", "err\n", 6)
