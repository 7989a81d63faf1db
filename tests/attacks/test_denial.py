"""Containers that want more of the node than was given to them (ATTACKS.md, "Denial of service", the rows of containers)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hack.images import Layer
from hack.node import cgroup_pids
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.test_descriptors import mount
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
MIB = 1 << 20


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def resident(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held(daemon: Daemon) -> tuple[int, int]:
    """Descriptors of the daemon and of the supervisor."""
    pids = daemon.pids()
    return len(os.listdir(f"/proc/{pids.daemon}/fd")), len(os.listdir(f"/proc/{pids.supervisor}/fd"))


def test_endless_output_of_an_exec(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """CVE-2022-1708, 2022-31030: `cat /dev/zero` on each of four calls at once: cut at the cap, and no more memory the second time."""
    container = daemon.run(pod, busybox, "sleep", "600")
    script = "timeout 1 cat /dev/zero; timeout 1 cat /dev/zero >&2; exit 3"
    used = []
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            for call in [pool.submit(daemon.exec, container, "sh", "-c", script, timeout=20) for _ in range(4)]:
                reply = call.result()
                assert reply.exit_code == 3
                assert 1 << 20 < len(reply.stdout) + len(reply.stderr) <= 16 * MIB
        used.append(resident(daemon.pids().daemon))
    assert used[1] < used[0] + 64 * MIB


def test_execs_that_leave_children_behind(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """CVE-2022-23471, 2025-64329, 2026-53495: each leaves a child that holds its pipes; nothing of ours stays with it, and what was left
    goes with the container."""
    container = daemon.run(pod, busybox, "sleep", "600")
    daemon.exec(container, "true")
    before = held(daemon)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: daemon.exec(container, "sh", "-c", "sleep 86400 & sleep 86400 >/dev/null 2>&1 &"), range(60)))
    assert len(cgroup_pids(f"{pod[1].linux.cgroup_parent}/{container}")) > 100
    wait_for(f"{before} descriptors again", lambda: all(now <= then + 2 for now, then in zip(held(daemon), before, strict=True)))
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=20)
    assert not cgroup_pids(f"{pod[1].linux.cgroup_parent}/{container}")


@pytest.mark.parametrize("what", ["fifo", "giant", "directory", "device", "link to a fifo", "link to the host", "long line"])
def test_account_files_that_are_none(daemon: Daemon, pod: Pod, image: Callable[..., str], sentinel: Path, what: str) -> None:
    """CVE-2025-4437, 2026-47262, 2024-9676: refused at once, or read as far as a file of that kind can be long."""
    layer = Layer().whiteout("etc/passwd") if what in ("directory",) else Layer()
    top = Layer()
    if what == "fifo":
        top.entry("etc/passwd", b"6")
    elif what == "giant":
        top.file("etc/passwd", b"x" * (12 * MIB))
    elif what == "directory":
        top.directory("etc/passwd")
    elif what == "device":
        top.entry("etc/passwd", b"3", devmajor=1, devminor=5)
    elif what == "link to a fifo":
        top.entry("pipe", b"6").symlink("etc/passwd", "../pipe")
    elif what == "link to the host":
        top.symlink("etc/passwd", "../" * 20 + str(sentinel / "secret").lstrip("/"))
    else:
        top.file("etc/passwd", b"root:x:0:0:" + b"y" * (9 * MIB) + b":/:/bin/sh\napp:x:77:77::/:/bin/sh\n")
    reference = image(layer, top)
    began = time.monotonic()
    security = v1.LinuxContainerSecurityContext(run_as_username="app")
    security.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)
    if what == "long line":
        container = daemon.run(pod, reference, "sleep", "9", security=security)
        assert daemon.exec(container, "id", "-u").stdout == b"77\n"
    else:
        with pytest.raises(grpc.RpcError) as failed:
            daemon.create(pod, reference, "id", security=security)
        assert "passwd" in (failed.value.details() or ""), failed.value.details()
    assert time.monotonic() - began < 5


def test_a_storm_of_oom_kills(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """CVE-2019-14891: processes of a container are killed for memory again and again, with everything it can write to stdout in between;
    nothing of ours is among them, and its end is told right."""
    ours = daemon.pids()
    limit = v1.LinuxContainerResources(memory_limit_in_bytes=24 * MIB, memory_swap_limit_in_bytes=24 * MIB)
    script = "for i in $(seq 12); do (tail -c 100M /dev/zero | tail -c 100M >/dev/null); echo round $i; done; exec tail /dev/zero"
    containers = [daemon.run(pod, busybox, "sh", "-c", script, resources=limit) for _ in range(2)]
    for container in containers:
        ended = daemon.wait_exit(container, 60)
        assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
        assert "round 12" in daemon.log_text(container)
    now = daemon.pids()
    assert (now.daemon, now.supervisor, now.stdio) == (ours.daemon, ours.supervisor, ours.stdio)
    for pid in (now.supervisor, now.stdio):
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) <= 0


@pytest.mark.parametrize("where", ["root", "volume"])
def test_a_tree_too_deep_to_be_walked(daemon: Daemon, pod: Pod, image: Callable[..., str], where: str) -> None:
    """Directories in directories, deeper than Python recurses: the container is removed and the disk given back, also of what was removed
    after it. (``shutil.rmtree`` gave up, and then left everything that came later as well.)"""
    reference = image(Layer().directory("v"), Volumes={"/v": {}})
    deep = "i=0; while [ $i -lt 1500 ]; do mkdir d; cd d; i=$((i+1)); done; echo made; sleep 600"
    script = f"cd {'/v' if where == 'volume' else '/tmp'}; {deep}"
    container = daemon.run(pod, reference, "sh", "-c", script)
    other = daemon.run(pod, reference, "sleep", "600")
    wait_for("the tree", lambda: "made" in daemon.log_text(container), 30)
    for each in (container, other):
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=each), timeout=30)
    assert not (daemon.root / "volumes" / container).exists()
    wait_for("an empty trash", lambda: not os.listdir(daemon.root / "images" / "trash"), 20)


def test_a_log_that_goes_on_after_the_container(
    daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path], tmp_path: Path
) -> None:
    """The stdout of a container, passed to another one, is of no use once the first has ended: nobody rotates the logs of the dead."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    program = hostile("handover")
    mounts = (mount(program, "/hostile"), mount(meeting, "/meeting"))
    heir = daemon.run(pod, busybox, "/hostile/handover", "take", "/meeting/socket", mounts=mounts)
    wait_for("the socket", lambda: (meeting / "socket").exists())
    dead = daemon.run(pod, busybox, "/hostile/handover", "give", "/meeting/socket", mounts=mounts)
    daemon.wait_exit(dead)
    wait_for("the heir", lambda: "took" in daemon.log_text(heir))
    log = Path(daemon.container(dead).log_path)
    time.sleep(1)
    size = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == size < 4 * MIB
    daemon.exec(heir, "true")


def test_checkpoints_fill_nothing(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    """CVE-2025-0426, 2024-8676, 2026-50195, 2026-53489, 2026-53492: there are none yet, and asking often makes no file."""
    container = daemon.run(pod, busybox, "sleep", "600")
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as failed:
            request = v1.CheckpointContainerRequest(container_id=container, location=str(tmp_path / "checkpoint.tar"))
            daemon.runtime.CheckpointContainer(request, timeout=5)
        assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert not (tmp_path / "checkpoint.tar").exists()


def test_an_image_with_volumes_without_end(daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str) -> None:
    """Each would be a directory and a mount, made while everybody else waits."""
    reference = image(Volumes={f"/v{number}": {} for number in range(50_000)})
    began = time.monotonic()
    with pytest.raises(grpc.RpcError, match="Volumes"):
        daemon.create(pod, reference, "true")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("users", [False, True])
def test_files_of_the_pod_are_small(daemon: Daemon, busybox: str, users: bool) -> None:
    """CVE-2020-8557: a container may write to the /etc/hosts, /etc/hostname and /etc/resolv.conf that we make, but not fill the node with
    them; the pod's other containers see what it wrote, also after a restart of everything."""
    config = daemon.pod_config()
    if users:
        ids = [v1.IDMapping(host_id=200000, length=65536)]
        config.linux.security_context.namespace_options.userns_options.CopyFrom(v1.UserNamespace(uids=ids, gids=ids))
    try:
        pod = daemon.run_pod(config)
    except grpc.RpcError as error:
        pytest.skip(error.details() or "no user namespaces")
    script = "echo 10.9.8.7 mine >> /etc/hosts; for f in hosts hostname resolv.conf; do dd if=/dev/zero of=/etc/$f.x bs=1k count=1; done; "
    first = daemon.run(pod, busybox, "sh", "-c", f"{script} sleep 600")
    other = daemon.run(pod, busybox, "sleep", "600")
    wait_for("its writing", lambda: b"mine" in daemon.exec(other, "cat", "/etc/hosts").stdout)
    assert b"localhost" in daemon.exec(other, "cat", "/etc/hosts").stdout
    fill = "for f in hosts hostname resolv.conf; do cat /dev/zero > /etc/$f; done; cat /etc/hosts /etc/hostname /etc/resolv.conf | wc -c"
    assert int(daemon.exec(first, "sh", "-c", fill).stdout) <= 3 * MIB
    state = sum(p.stat().st_size for p in (daemon.state / "pods" / pod[0]).iterdir())
    assert state < MIB
    daemon.kill_everything()
    daemon.start()
    third = daemon.run(pod, busybox, "sleep", "600")
    assert daemon.exec(third, "wc", "-c", "/etc/hosts").exit_code == 0
    daemon.remove_pods()
