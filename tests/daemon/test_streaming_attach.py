"""Attach: several clients, terminals, stdin that ends once, replacement of stdio under it, logs that do not notice."""

from __future__ import annotations

import os
import time

import grpc
import pytest

from hack.streaming_client import ChannelClient, Client, SpdyClient
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, wait_for

V4 = "v4.channel.k8s.io"
Pod = tuple[str, v1.PodSandboxConfig]
KINDS = pytest.mark.parametrize("kind", ["spdy", "v5.channel.k8s.io"])
TICK = "n=0; while :; do n=$((n+1)); echo out $n; echo err $n >&2; sleep 0.05; done"


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def attach(daemon: Daemon, node: Node, container: str, kind: str, *, stdin: bool = False, stderr: bool = True, tty: bool = False) -> Client:
    request = v1.AttachRequest(container_id=container, stdin=stdin, stdout=True, stderr=stderr and not tty, tty=tty)
    url = daemon.runtime.Attach(request, timeout=10).url
    if kind != "spdy":
        return ChannelClient(node.netns, url, kind)
    client = SpdyClient(node.netns, url, V4)
    for name in ("error", "stdout", *(["stderr"] if request.stderr else []), *(["stdin"] if stdin else []), *(["resize"] if tty else [])):
        client.open(name)
    return client


def numbers(text: bytes | bytearray, stream: bytes) -> list[int]:
    """Of whole lines."""
    return [int(line.split()[1]) for line in bytes(text).splitlines(keepends=True) if line.startswith(stream) and line.endswith(b"\n")]


@KINDS
def test_two_clients_at_once_and_the_log(daemon: Daemon, node: Node, pod: Pod, busybox: str, kind: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", TICK)
    first, second = (attach(daemon, node, container, kind) for _ in range(2))
    for client in (first, second):
        client.until(lambda client=client: len(numbers(client.data["stdout"], b"out")) > 5 and client.data["stderr"])
        found = numbers(client.data["stdout"], b"out")
        assert found == list(range(found[0], found[0] + len(found)))
    first.vanish()
    already = len(second.data["stdout"])
    second.until(lambda: len(second.data["stdout"]) > already + 60)
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=20)
    second.finish()
    seen = numbers(second.data["stdout"], b"out")
    assert seen == list(range(seen[0], seen[-1] + 1)) and second.code == 0
    logged = [int(line.split()[4]) for line in daemon.log_text(container).splitlines() if " stdout F " in line]
    assert logged == list(range(1, logged[-1] + 1)) and logged[-1] >= seen[-1]


@KINDS
def test_detach_and_attach_again(daemon: Daemon, node: Node, pod: Pod, busybox: str, kind: str) -> None:
    container = daemon.run(pod, busybox, "cat", stdin=True)
    for word in (b"one\n", b"two\n"):
        client = attach(daemon, node, container, kind, stdin=True)
        client.send("stdin", word)
        client.until(lambda client=client, word=word: client.data["stdout"] == word)
        client.vanish()
    assert daemon.container(container).state == v1.CONTAINER_RUNNING
    assert [line.split()[3] for line in daemon.log_text(container).splitlines()] == ["one", "two"]


@KINDS
def test_stdin_that_ends_with_its_first_client(daemon: Daemon, node: Node, pod: Pod, busybox: str, kind: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "cat; echo over", stdin=True, stdin_once=True)
    client = attach(daemon, node, container, kind, stdin=True)
    client.send("stdin", b"all\n")
    client.end("stdin")
    client.finish()
    assert client.data["stdout"] == b"all\nover\n" and client.code == 0
    assert daemon.wait_exit(container).exit_code == 0


def test_stdin_that_has_ended_stays_so_for_a_new_supervisor(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "cat; echo over; sleep 1000", stdin=True, stdin_once=True)
    client = attach(daemon, node, container, "spdy", stdin=True)
    client.send("stdin", b"x\n")
    client.until(lambda: client.data["stdout"])
    client.vanish()
    wait_for("end of file", lambda: "over" in daemon.log_text(container))
    daemon.kill_supervisor()
    wait_for("another", lambda: daemon.pids().supervisor)
    client = attach(daemon, node, container, "spdy", stdin=True)
    client.send("stdin", b"nobody reads this\n")
    time.sleep(0.3)
    client.vanish()
    assert daemon.exec(container, "true").exit_code == 0


@KINDS
def test_a_terminal(daemon: Daemon, node: Node, pod: Pod, busybox: str, kind: str) -> None:
    container = daemon.run(pod, busybox, "sh", tty=True, stdin=True)
    client = attach(daemon, node, container, kind, stdin=True, tty=True)
    client.resize(31, 97)
    client.send("stdin", b"stty size\n")
    client.until(lambda: b"31 97\r\n" in client.data["stdout"])
    client.vanish()
    client = attach(daemon, node, container, kind, stdin=True, tty=True)
    client.send("stdin", b"exit 3\n")
    client.finish()
    assert daemon.wait_exit(container).exit_code == 3
    assert "31 97" in daemon.log_text(container)


def test_a_container_without_stdin(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", TICK)
    client = attach(daemon, node, container, "spdy", stdin=True)
    client.send("stdin", bytes(100_000))
    client.until(lambda: client.data["stdout"])
    client.vanish()


def test_the_end_of_a_container_is_the_end_of_its_sessions(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "sleep 0.5; echo last words; printf unfinished")
    client = attach(daemon, node, container, "spdy")
    client.finish()
    assert client.data["stdout"] == b"last words\nunfinished"
    with pytest.raises(grpc.RpcError) as refused:
        daemon.runtime.Attach(v1.AttachRequest(container_id=container, stdout=True), timeout=10)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_stdio_and_supervisor_killed_under_a_client(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", TICK)
    client = attach(daemon, node, container, "spdy")
    client.until(lambda: client.data["stdout"])
    for kill in (daemon.kill_stdio, daemon.kill_supervisor):
        kill()
        already = len(client.data["stdout"])
        client.until(lambda already=already: len(client.data["stdout"]) > already + 200)
    client.vanish()


def test_a_client_that_stalls_is_dropped_and_the_log_goes_on(daemon: Daemon, node: Node, pod: Pod, busybox: str) -> None:
    """It holds its container up for some seconds, not for good; another client loses nothing."""
    container = daemon.run(
        pod, busybox, "sh", "-c", "sleep 0.5; head -c 30000000 /dev/zero | tr '\\0' x | fold -w 99; echo done; sleep 1000"
    )
    stalled = attach(daemon, node, container, "spdy")
    reader = attach(daemon, node, container, "spdy")
    reader.until(lambda: reader.data["stdout"].endswith(b"done\n"), 40)
    assert len(reader.data["stdout"]) == 30_000_000 + -(-30_000_000 // 99) - 1 + 5
    wait_for("the log", lambda: daemon.log_text(container).endswith("done\n"))
    stalled.vanish()
    reader.vanish()


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_attaching_leaves_nothing_behind(daemon: Daemon, node: Node, pod: Pod, busybox: str, count: int) -> None:
    """Scenario 41, CVE-2022-23471: to a container that never writes, so that nobody notices by writing."""
    container = daemon.run(pod, busybox, "cat", stdin=True, tty=True)
    pids = daemon.pids()

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (pids.daemon, pids.supervisor, pids.stdio)]

    def once(number: int) -> None:
        client = attach(daemon, node, container, "spdy" if number % 2 else V4, stdin=True, tty=True)
        client.resize(20 + number % 5, 80)
        if number % 3:
            client.send("stdin", b"")
        client.vanish()

    once(0)
    once(1)
    time.sleep(1)
    before = descriptors()
    for number in range(count):
        once(number)
    wait_for("descriptors to return", lambda: all(now <= then + 2 for now, then in zip(descriptors(), before, strict=True)), 20)
