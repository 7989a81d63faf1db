"""The same against somebody who exchanges a directory with a link while we work (ATTACKS.md, the rows of races; scenario 58).

A container swaps (``c/swap.c``, renameat2(RENAME_EXCHANGE)) in a volume that it shares with containers that are made meanwhile. The
loops are bounded in time; the host's directory that the link leads to must stay as it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from hack.images import Layer
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.conftest import climbing
from tests.attacks.test_descriptors import mount
from tests.daemon.harness import Daemon, wait_for

pytestmark = pytest.mark.race
SECONDS = 4.0
ROUNDS = 12  # at least, on a machine that is too busy for that many in the time
Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The volume, with ``part`` in it, which is exchanged."""
    directory = tmp_path / "shared"
    (directory / "part" / "deep").mkdir(parents=True)
    (directory / "part" / "file").write_text("of the volume\n")
    return directory


@pytest.fixture
def pod(daemon: Daemon) -> Iterator[Pod]:
    yield daemon.run_pod()
    daemon.remove_pods()


def swapper(daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path], shared: Path, target: str) -> None:
    mounts = (mount(hostile("swap"), "/hostile"), mount(shared, "/shared"))
    container = daemon.run(pod, busybox, "/hostile/swap", "/shared", "part", target, "60", mounts=mounts)
    wait_for("the swapping", lambda: "swapping" in daemon.log_text(container))


def race(daemon: Daemon, pod: Pod, image: str, script: str, check: Callable[[str], None], **fields: object) -> tuple[int, int]:
    """Make containers again and again: (made, refused)."""
    made = refused = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or made + refused < ROUNDS:
        container = ""
        with contextlib.suppress(grpc.RpcError):
            container = daemon.create(pod, image, "sh", "-c", script, **fields)
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
            daemon.wait_exit(container)
            check(daemon.log_text(container))
            made += 1
        if not container:
            refused += 1
            continue
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert made + refused >= ROUNDS
    return made, refused


@pytest.mark.parametrize("target", ["host", "/proc", "/sys/fs/cgroup"])
def test_a_mount_target(
    daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path], shared: Path, sentinel: Path, tmp_path: Path, target: str
) -> None:
    """CVE-2021-30465."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "secret").write_text("evil\n")
    swapper(daemon, pod, busybox, hostile, shared, climbing(sentinel) if target == "host" else target)

    def check(text: str) -> None:
        assert text.split("stdout F ")[1].split()[0] == "proc", text
        assert "host-secret" not in text

    mounts = (mount(shared, "/shared"), mount(evil, "/shared/part"), mount(evil, "/shared/part/deep"))
    race(daemon, pod, busybox, "stat -f -c %T /proc; cat /shared/part/secret", check, mounts=mounts)
    assert str(sentinel) not in Path("/proc/self/mounts").read_text()


def test_directories_that_are_missing(
    daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path], shared: Path, sentinel: Path, tmp_path: Path
) -> None:
    """CVE-2024-45310, 2024-5154, 2024-9341: making a working directory, a mount's target or a file's on the way."""
    swapper(daemon, pod, busybox, hostile, shared, climbing(sentinel))
    source = tmp_path / "source"
    source.write_text("x")
    for number in range(2):
        fields = {"working_dir": f"/shared/part/new{number}/work"} if number else {}
        mounts = (mount(shared, "/shared"), mount(source, f"/shared/part/file{number}/x"), mount(shared, f"/shared/part/dir{number}/y"))
        race(daemon, pod, busybox, "pwd", lambda text: None, mounts=mounts, **fields)
        assert os.listdir(sentinel) == ["secret"]


def test_a_copy_of_a_volumes_content(
    daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str, hostile: Callable[[str], Path], shared: Path, sentinel: Path
) -> None:
    """CVE-2018-15664, 2026-41568, 2026-42306: what an image VOLUME inside the shared volume is filled from is swapped."""
    reference = image(Layer().directory("shared"), Volumes={"/shared/part": {}, "/shared/part/deep": {}})
    swapper(daemon, pod, busybox, hostile, shared, str(sentinel))

    def check(text: str) -> None:
        assert "host-secret" not in text

    made, _ = race(daemon, pod, reference, "find /shared/part; cat /shared/part/*", check, mounts=(mount(shared, "/shared"),))
    assert made


def test_console_and_masked_paths(
    daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path], shared: Path, sentinel: Path
) -> None:
    """CVE-2025-52565, 2025-31133, 2025-52881: /dev on a swapped way, paths to be masked on one, and a sysctl's file."""
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    swapper(daemon, pod, busybox, hostile, shared, "/proc/sys/kernel")
    security = v1.LinuxContainerSecurityContext(masked_paths=["/shared/part/file", "/shared/part"], readonly_paths=["/shared/part/deep"])
    security.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)

    def check(text: str) -> None:
        assert "proc" in text

    race(
        daemon, pod, busybox, "stat -f -c %T /proc", check,
        mounts=(mount(shared, "/shared"),), security=security, tty=True, working_dir="/shared/part/deep",
    )  # fmt: skip
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_account_files(
    daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str, hostile: Callable[[str], Path], shared: Path, sentinel: Path
) -> None:
    """CVE-2024-9341, 2024-5154: the image's /etc is a link into the swapped volume: accounts are looked up and files mounted there."""
    reference = image(Layer().whiteout("etc"), Layer().symlink("etc", "shared/part"))
    (shared / "part" / "passwd").write_text("app:x:1234:1234::/:/bin/sh\n")
    swapper(daemon, pod, busybox, hostile, shared, climbing(sentinel))
    security = v1.LinuxContainerSecurityContext(run_as_username="app")
    security.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)

    def check(text: str) -> None:
        assert "uid=1234" in text, text

    race(daemon, pod, reference, "id", check, mounts=(mount(shared, "/shared"),), security=security)
    assert os.listdir(sentinel) == ["secret"]
