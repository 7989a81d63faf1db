"""Log files over the socket: framing, rotation, the last lines."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(?:Z|[+-]\d\d:\d\d)) (stdout|stderr) ([PF]) (.*)", re.S)


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def reopen(daemon: Daemon, container: str) -> None:
    daemon.runtime.ReopenContainerLog(v1.ReopenContainerLogRequest(container_id=container), timeout=10)


def records(data: bytes) -> list[tuple[str, str, str]]:
    """Stream, tag and content of every record; every line must be one."""
    found = []
    for line in data.split(b"\n")[:-1]:
        match = LINE.fullmatch(line.decode())
        assert match, line[:200]
        found.append((match[2], match[3], match[4]))
    assert data.endswith(b"\n") or not data
    return found


def path(daemon: Daemon, container: str) -> Path:
    return Path(daemon.container(container).log_path)


def finished(daemon: Daemon, pod: Pod, busybox: str, *command: str, **fields: object) -> list[tuple[str, str, str]]:
    container = daemon.run(pod, busybox, *command, **fields)
    daemon.wait_exit(container)
    return records(path(daemon, container).read_bytes())


def test_both_streams_with_time_and_tags(daemon: Daemon, pod: Pod, busybox: str) -> None:
    found = finished(daemon, pod, busybox, "sh", "-c", "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo; echo ü")
    assert found == [("stdout", "F", "one"), ("stderr", "F", "two"), ("stdout", "F", ""), ("stdout", "F", "ü")]


def test_no_trailing_newline(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 44."""
    found = finished(daemon, pod, busybox, "printf", "a\\nlast")
    assert [content for _, _, content in found] == ["a", "last"]
    assert found[0][1] == "F"


def test_a_long_line_is_split(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 45: 1 MiB arrives whole as partial records and a final one."""
    found = finished(daemon, pod, busybox, "sh", "-c", "head -c 1048576 /dev/zero | tr '\\0' x; echo; echo next")
    *parts, last, follower = found
    assert {tag for _, tag, _ in parts} == {"P"}
    assert last[1] == "F"
    assert "".join(content for _, _, content in [*parts, last]) == "x" * 1048576
    assert max(len(content) for _, _, content in parts) <= 16384
    assert follower == ("stdout", "F", "next")


def test_the_last_lines_before_a_fast_exit(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 46: when the container reads as exited, its log is complete."""
    for _ in range(20):
        found = finished(daemon, pod, busybox, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do echo $i; done; echo e >&2")
        assert [c for s, _, c in found if s == "stdout"] == [str(n) for n in range(1, 10)]
        assert [c for s, _, c in found if s == "stderr"] == ["e"]


def test_rotation_under_load_loses_and_repeats_nothing(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    """Scenario 43, as the kubelet does it: rename, then ReopenContainerLog."""
    container = daemon.run(pod, busybox, "sh", "-c", "i=0; while [ $i -lt 40000 ]; do echo line-$i; i=$((i+1)); done")
    log = path(daemon, container)
    rotated = 0
    while daemon.container(container).state == v1.CONTAINER_RUNNING and rotated < 20:
        os.rename(log, f"{log}.{rotated:03d}")
        with contextlib.suppress(grpc.RpcError):  # it may have ended between the question and this
            reopen(daemon, container)
        rotated += 1
        time.sleep(0.02)
    daemon.wait_exit(container, 60)
    pieces = [Path(f"{log}.{n:03d}") for n in range(rotated)] + ([log] if log.exists() else [])
    lines = [content for piece in pieces for _, _, content in records(piece.read_bytes())]
    assert lines == [f"line-{n}" for n in range(40_000)]
    assert rotated >= 2


def test_reopen_after_the_file_was_removed(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "echo before; while ! [ -e /go ]; do sleep 0.02; done; echo after; sleep 1000")
    log = path(daemon, container)
    wait_for("the first line", lambda: b"before" in log.read_bytes())
    log.unlink()
    reopen(daemon, container)
    assert log.exists()
    assert log.stat().st_mode & 0o777 in (0o600, 0o640)
    daemon.exec(container, "touch", "/go")
    wait_for("the next line", lambda: [c for _, _, c in records(log.read_bytes())] == ["after"])


def test_reopen_of_what_does_not_run_is_an_error(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Scenario 47."""
    container = daemon.create(pod, busybox, "true")
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as failed:
            reopen(daemon, container)
        assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        if daemon.container(container).state == v1.CONTAINER_CREATED:
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
            daemon.wait_exit(container)
    with pytest.raises(grpc.RpcError) as failed:
        reopen(daemon, "c" * 64)
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_no_log_path_no_log(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "sh", "-c", "head -c 3000000 /dev/zero; exit 2", log_path="")
    ended = daemon.wait_exit(container)
    assert (ended.exit_code, ended.log_path) == (2, "")


def test_a_log_below_a_directory_that_does_not_exist_yet(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = daemon.run(pod, busybox, "echo", "x", log_path="deep/er/0.log")
    daemon.wait_exit(container)
    assert path(daemon, container) == daemon.logs / pod[1].metadata.name / "deep/er/0.log"
    assert [c for _, _, c in records(path(daemon, container).read_bytes())] == ["x"]


def test_a_terminal_has_one_stream(daemon: Daemon, pod: Pod, busybox: str) -> None:
    found = finished(daemon, pod, busybox, "sh", "-c", "[ -t 1 ] && echo tty; echo err >&2", tty=True)
    assert [(s, c.rstrip("\r")) for s, _, c in found] == [("stdout", "tty"), ("stdout", "err")]


def test_a_container_that_never_ran_leaves_no_log(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """The kubelet numbers a container's next attempt by the log files it finds: a create that fails would count as a restart."""
    directory = Path(pod[1].log_directory)
    with pytest.raises(grpc.RpcError):
        daemon.create(pod, busybox, "true", working_dir="/etc/passwd", log_path="failed/0.log")
    assert os.listdir(directory / "failed") == []
    container = daemon.create(pod, busybox, "true", log_path="unused/0.log")
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert os.listdir(directory / "unused") == []
    # the log of one that ran stays, even empty, and so does what is not ours
    container = daemon.run(pod, busybox, "true", log_path="used/0.log")
    daemon.wait_exit(container)
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert os.listdir(directory / "used") == ["0.log"]
    container = daemon.create(pod, busybox, "true", log_path="moved/0.log")
    (directory / "moved/0.log").rename(directory / "moved/old.log")
    (directory / "moved/0.log").write_bytes(b"")
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert sorted(os.listdir(directory / "moved")) == ["0.log", "old.log"]
