"""Pods with ``hostUsers: false`` over the socket: whose files are whose, what is refused, what cannot be reached, what a restart leaves."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack import images
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]
BASE, SIZE = 200000, 65536


def ids(container: int = 0, host: int = BASE, length: int = SIZE) -> v1.IDMapping:
    return v1.IDMapping(container_id=container, host_id=host, length=length)


def options(**fields: Any) -> v1.NamespaceOption:
    users = v1.UserNamespace(mode=v1.POD, uids=[ids()], gids=[ids()])
    return v1.NamespaceOption(**{"pid": v1.CONTAINER, "userns_options": users, **fields})


def run_pod(daemon: Daemon, **fields: Any) -> Pod:
    config = daemon.pod_config()
    config.linux.security_context.namespace_options.CopyFrom(options(**fields))
    return daemon.run_pod(config)


def volume(path: Path, target: str = "/data", *, mapped: bool = True, **fields: Any) -> v1.Mount:
    mappings = [ids()] if mapped else []
    return v1.Mount(host_path=str(path), container_path=target, uidMappings=mappings, gidMappings=mappings, **fields)


def output(daemon: Daemon, pod: Pod, busybox: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, busybox, "sh", "-c", script, **fields)
    ended = daemon.wait_exit(container)
    text = "".join(line.split(" ", 3)[3] + "\n" for line in daemon.log_text(container).splitlines())
    assert ended.exit_code == 0, text
    return text


def process_of(daemon: Daemon, container: str) -> int:
    reply = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container, verbose=True), timeout=10)
    return int(json.loads(reply.info["info"])["pid"])


def link(daemon: Daemon, container: str, kind: str) -> str:
    """Which namespace of that kind the container is in."""
    return os.readlink(f"/proc/{process_of(daemon, container)}/ns/{kind}")


def pod_info(daemon: Daemon, pod: Pod) -> str:
    request = v1.PodSandboxStatusRequest(pod_sandbox_id=pod[0], verbose=True)
    return daemon.runtime.PodSandboxStatus(request, timeout=10).info["info"]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    status = daemon.runtime.Status(v1.StatusRequest(), timeout=10)
    if not status.runtime_handlers[0].features.user_namespaces:
        pytest.skip("this kernel cannot idmap what a pod with a user namespace needs")
    return run_pod(daemon)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A host directory with a file of the host's root, one of id 7, and a secret."""
    os.chmod(tmp_path, 0o777)
    for name, mode, owner in (("root", 0o644, 0), ("seven", 0o640, 7), ("secret", 0o600, 0)):
        (tmp_path / name).write_text(name)
        os.chmod(tmp_path / name, mode)
        os.chown(tmp_path / name, owner, owner)
    return tmp_path


def test_features_are_announced(daemon: Daemon, pod: Pod) -> None:
    status = daemon.runtime.Status(v1.StatusRequest(), timeout=10)
    assert all(handler.features.user_namespaces for handler in status.runtime_handlers)
    assert status.features.user_namespaces_host_network


def test_maps_and_capabilities(daemon: Daemon, pod: Pod, busybox: str) -> None:
    text = output(
        daemon,
        pod,
        busybox,
        "cd /proc/self; cat uid_map gid_map; id -u; cat setgroups; ls -ldn / /bin /dev /dev/null /dev/shm /dev/mqueue /etc/hosts",
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines[:4] == [["0", str(BASE), str(SIZE)], ["0", str(BASE), str(SIZE)], ["0"], ["allow"]]
    assert all(line[2:4] == ["0", "0"] for line in lines[4:]), text


def test_what_is_made_belongs_to_root_of_the_layer(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """The writable layer holds the container's ids, so it means the same whatever the pod's mapping is."""
    script = "touch /made; mkdir /dir; chown 5:6 /made; echo >> /etc/passwd; rm -r /tmp; mkdir /tmp; ls -ln /made /etc/passwd; sleep 60"
    container = daemon.run(pod, busybox, "sh", "-c", script)
    wait_for("the files", lambda: "passwd" in daemon.log_text(container))
    (upper,) = Path(daemon.root).glob(f"images/**/{container}/upper")
    owners = {name: (os.stat(upper / name).st_uid, os.stat(upper / name).st_gid) for name in ("made", "dir", "etc/passwd", "tmp", ".")}
    assert owners == {"made": (5, 6), "dir": (0, 0), "etc/passwd": (0, 0), "tmp": (0, 0), ".": (0, 0)}
    assert daemon.exec(container, "stat", "-c", "%u:%g", "/made", "/tmp").stdout == b"5:6\n0:0\n"


def test_volumes(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    """Ids of a mapped volume are the container's on both sides. Without a mapping its files are nobody's, and secrets stay secret."""
    script = "cd /data; ls -ln root seven secret; cat secret; touch new; chown 8:9 new; rm seven"
    text = output(daemon, pod, busybox, script, mounts=(volume(owned),))
    assert [line.split()[2:4] for line in text.splitlines()[:3]] == [["0", "0"], ["0", "0"], ["7", "7"]]
    assert text.splitlines()[3] == "secret"
    new = os.stat(owned / "new")
    assert (new.st_uid, new.st_gid, (owned / "seven").exists()) == (8, 9, False)
    script = "cd /data; ls -ln root; cat secret 2>&1; chown 0 root 2>&1; touch mine; :"
    text = output(daemon, pod, busybox, script, mounts=(volume(owned, mapped=False),))
    assert text.splitlines()[0].split()[2:4] == ["65534", "65534"]
    assert "secret\n" not in text
    assert text.count("denied") + text.count("not permitted") == 2, text
    assert os.stat(owned / "mine").st_uid == BASE


def test_read_only_and_single_files(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    mounts = (volume(owned, "/ro", readonly=True, recursive_read_only=True), volume(owned / "secret", "/etc/secret"))
    text = output(daemon, pod, busybox, "touch /ro/x 2>&1; cat /etc/secret; echo changed > /etc/secret", mounts=mounts)
    assert "Read-only" in text
    assert text.splitlines()[-1] == "secret"
    assert ((owned / "secret").read_text(), os.stat(owned / "secret").st_uid) == ("changed\n", 0)


def test_a_mapped_volume_without_a_user_namespace(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    plain = daemon.run_pod()
    text = output(daemon, plain, busybox, "ls -ln /data/root; cat /proc/self/uid_map", mounts=(volume(owned),))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][2:4] == [str(BASE), str(BASE)]
    assert lines[1] == ["0", "0", str(2**32 - 1)]


def test_files_of_the_pod(daemon: Daemon, pod: Pod, busybox: str) -> None:
    text = output(
        daemon, pod, busybox, "cat /etc/hosts /etc/resolv.conf /etc/hostname; ls -ln /etc/hosts; hostname; echo '#' >> /etc/hosts"
    )
    assert "127.0.0.1" in text
    assert pod[1].hostname in text.splitlines()[-1]
    assert [line.split()[2:4] for line in text.splitlines() if line.startswith("-rw")] == [["0", "0"]]


def test_users(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Everything that CRI says about users is in the container's ids."""
    security = v1.LinuxContainerSecurityContext(run_as_user=v1.Int64Value(value=1000), run_as_group=v1.Int64Value(value=1001))
    security.supplemental_groups.extend([2000])
    container = daemon.run(pod, busybox, "sh", "-c", "echo out > /dev/stdout; id; sleep 60", security=security)
    wait_for("its output", lambda: "uid" in daemon.log_text(container))
    assert "uid=1000 gid=1001 groups=1001,2000" in daemon.log_text(container)
    assert " out\n" in daemon.log_text(container)
    user = daemon.container(container).user.linux
    assert (user.uid, user.gid, list(user.supplemental_groups)) == (1000, 1001, [1001, 2000])
    reply = daemon.exec(
        container, "sh", "-c", "id -u; echo > /dev/stderr; grep -E 'CapEff|NoNew' /proc/self/status; cat /proc/self/uid_map"
    )
    lines = reply.stdout.decode().split()
    assert lines[0] == "1000"
    assert lines[-3:] == ["0", str(BASE), str(SIZE)]
    pid = process_of(daemon, container)
    assert os.stat(f"/proc/{pid}").st_uid == BASE + 1000


def test_unmapped_users_are_refused(daemon: Daemon, pod: Pod, busybox: str) -> None:
    security = v1.LinuxContainerSecurityContext(run_as_user=v1.Int64Value(value=SIZE + 1))
    with pytest.raises(grpc.RpcError, match="user|EINVAL|mapped"):
        daemon.run(pod, busybox, "true", security=security)


def test_terminal(daemon: Daemon, pod: Pod, busybox: str) -> None:
    security = v1.LinuxContainerSecurityContext(run_as_user=v1.Int64Value(value=1000))
    container = daemon.run(pod, busybox, "sh", "-c", "tty; ls -ln $(tty); echo to the terminal > /dev/tty", tty=True, security=security)
    assert daemon.wait_exit(container).exit_code == 0, daemon.log_text(container)
    text = daemon.log_text(container)
    assert "/dev/pts/0" in text
    assert " 1000 " in text
    assert "to the terminal" in text


def test_containers_of_a_pod_share(daemon: Daemon, pod: Pod, busybox: str) -> None:
    first = daemon.run(pod, busybox, "sh", "-c", "echo kept > /dev/shm/file; sleep 60")
    wait_for("the file", lambda: daemon.exec(first, "cat", "/dev/shm/file").exit_code == 0)
    other = daemon.run(pod, busybox, "sh", "-c", "cat /dev/shm/file; rm /dev/shm/file; sleep 60")
    wait_for("its output", lambda: "kept" in daemon.log_text(other))
    for kind in ("user", "net", "ipc", "uts"):
        assert link(daemon, first, kind) == link(daemon, other, kind) != os.readlink(f"/proc/self/ns/{kind}"), kind
    for kind in ("mnt", "pid"):
        assert link(daemon, first, kind) != link(daemon, other, kind), kind
    assert daemon.exec(first, "cat", "/dev/shm/file").exit_code == 1


def test_shared_pids(daemon: Daemon, pod: Pod, busybox: str) -> None:
    shared = run_pod(daemon, pid=v1.POD)
    first = daemon.run(shared, busybox, "sh", "-c", "sleep 600")
    other = daemon.run(shared, busybox, "sh", "-c", "ps; id -u; ls -ldn /proc/self | tail -1; sleep 600")
    wait_for("its output", lambda: "ls -ldn" not in daemon.log_text(other).splitlines()[-1:] and "/proc/self" in daemon.log_text(other))
    assert "sleep 600" in daemon.log_text(other)
    assert link(daemon, first, "pid") == link(daemon, other, "pid")
    assert daemon.exec(other, "sh", "-c", "kill -9 1; sleep 0.2; ps | head -2").exit_code == 0
    pid1 = int(json.loads(pod_info(daemon, shared))["pid"])
    assert BASE <= os.stat(f"/proc/{pid1}").st_uid < BASE + SIZE
    assert os.readlink(f"/proc/{pid1}/ns/user") == link(daemon, first, "user")
    # An ephemeral container that looks at another one's processes.
    target = v1.LinuxContainerSecurityContext()
    target.namespace_options.CopyFrom(options(pid=v1.TARGET, target_id=first))
    assert "sleep 600" in output(daemon, shared, busybox, "ps", security=target)


def test_host_network(daemon: Daemon, pod: Pod, busybox: str) -> None:
    config = daemon.pod_config()
    config.hostname = ""
    config.linux.security_context.namespace_options.CopyFrom(options(network=v1.NODE))
    hosted = daemon.run_pod(config)
    assert (daemon.state / "userns" / hosted[0]).exists()
    script = (
        "cat /proc/self/uid_map; ls /sys/class/net; touch /sys/x 2>&1; ls -A /sys/kernel/debug 2>&1 | head -1; ls /sys/fs/cgroup | head -1"
    )
    text = output(daemon, hosted, busybox, script)
    assert text.split()[:3] == ["0", str(BASE), str(SIZE)]
    assert "lo" in text.split()
    assert "Read-only" in text or "denied" in text
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=hosted[0]), timeout=20)
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=hosted[0]), timeout=20)
    assert not list((daemon.state / "userns").iterdir())
    assert str(daemon.state / "userns") not in Path("/proc/self/mounts").read_text()


def test_host_ipc(daemon: Daemon, pod: Pod, busybox: str) -> None:
    hosted = run_pod(daemon, ipc=v1.NODE)
    container = daemon.run(hosted, busybox, "sh", "-c", "ls -ld /dev/mqueue /dev/shm; sleep 60")
    assert link(daemon, container, "ipc") == os.readlink("/proc/self/ns/ipc")
    assert "mqueue" in wait_for("its output", lambda: daemon.log_text(container))


def test_sysctls(daemon: Daemon, pod: Pod, busybox: str) -> None:
    config = daemon.pod_config(
        sysctls={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000", "kernel.msgmax": "4096"}
    )
    config.linux.security_context.namespace_options.CopyFrom(options())
    text = output(
        daemon, daemon.run_pod(config), busybox, "cd /proc/sys; cat kernel/shm_rmid_forced kernel/msgmax net/ipv4/ip_local_port_range"
    )
    assert text.split() == ["1", "4096", "2000", "3000"]


def test_privileged_stays_inside(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    """Every capability, but in the user namespace only: the host's files, devices and parameters stay closed."""
    config = daemon.pod_config()
    config.linux.security_context.namespace_options.CopyFrom(options())
    config.linux.security_context.privileged = True
    security = v1.LinuxContainerSecurityContext(privileged=True)
    script = (
        "grep CapEff /proc/self/status; mount -t tmpfs none /tmp && echo mounted; mknod /null c 1 3 2>&1; cat /data/secret 2>&1; "
        "echo 1 2>&1 > /proc/sys/kernel/panic; echo x 2>&1 > /proc/sysrq-trigger; "
        "mount -o remount,bind,rw /data 2>&1; chown 0 /data/root 2>&1; chroot / true && echo chrooted; "
        "echo core 2>&1 > /proc/sys/kernel/core_pattern; "
        "for d in /dev/mem /dev/kmsg $(find /dev -type b); do head -c1 $d >/dev/null 2>&1 && test $d != /dev/kmsg && echo read $d; done; :"
    )
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    text = output(daemon, daemon.run_pod(config), busybox, script, mounts=(volume(owned, mapped=False, readonly=True),), security=security)
    assert {"mounted", "chrooted"} <= set(text.splitlines()), text
    assert "secret\n" not in text
    assert "read /dev" not in text
    assert text.count("not permitted") + text.count("denied") + text.count("nonexistent") >= 3, text
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern
    assert os.stat(owned / "root").st_uid == 0


def test_read_only_root_and_masks(daemon: Daemon, pod: Pod, busybox: str) -> None:
    security = v1.LinuxContainerSecurityContext(readonly_rootfs=True, no_new_privs=True)
    security.seccomp.profile_type = v1.SecurityProfile.RuntimeDefault
    security.masked_paths.extend(["/proc/kcore", "/sys/firmware", "/proc/timer_list"])
    security.readonly_paths.extend(["/proc/sys", "/proc/bus"])
    script = (
        "touch /x 2>&1; echo 1 2>&1 > /proc/sys/net/ipv4/ip_forward; ls -A /sys/firmware; head -c1 /proc/kcore; touch /dev/shm/y; "
        "grep -E 'NoNewPrivs|Seccomp:' /proc/self/status; touch /sys/fs/cgroup/cgroup.procs 2>&1; "
        "touch /sys/fs/cgroup/memory/z 2>&1; :"
    )
    text = output(daemon, pod, busybox, script, security=security)
    assert text.count("Read-only") >= 3, text
    assert "kcore" not in text or "denied" in text or "No such file" in text
    assert {"NoNewPrivs:\t1", "Seccomp:\t2"} <= set(text.splitlines())


def test_bidirectional_volumes_are_refused(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        daemon.run(pod, busybox, "true", mounts=(volume(owned, propagation=v1.PROPAGATION_BIDIRECTIONAL),))
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_no_way_out(daemon: Daemon, pod: Pod, busybox: str) -> None:
    """Without extra rights: parameters, devices, other user namespaces and the host's processes."""
    victim = subprocess.Popen(["sleep", "60"])
    try:
        script = (
            f"kill -9 {victim.pid} 2>&1; echo 0 2>&1 > /proc/sys/kernel/hostname; echo 1 2>&1 > /proc/sys/net/ipv4/ip_forward; "
            "mount -t tmpfs none /tmp 2>&1; mknod /dev/kmsg c 1 11 2>&1; unshare -U true 2>&1; ls /proc | grep -c '^[0-9]'; "
            "mount -o remount,rw /sys 2>&1; touch /sys/x /proc/x 2>&1; echo > /dev/null && echo null; :"
        )
        text = output(daemon, pod, busybox, script)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    assert "null" in text.splitlines()
    assert "mounted" not in text
    count = next(int(line) for line in text.splitlines() if line.isdigit())
    assert count < 8, text


def test_outsiders_cannot_be_signalled_from_shared_ids(daemon: Daemon, pod: Pod, busybox: str, owned: Path) -> None:
    """A process of the host that has the very uid of the container's root: it is not in its PID namespace."""
    victim = subprocess.Popen(["sleep", "60"], user=BASE, group=BASE, extra_groups=[])
    try:
        output(daemon, pod, busybox, f"kill -9 -1 2>/dev/null; kill -9 {victim.pid} 2>/dev/null; :")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize("host_network", [False, True])
def test_restart_of_everything(daemon: Daemon, pod: Pod, busybox: str, host_network: bool) -> None:
    """The user namespace is found again through a pin; a new container joins the same one, and so does an exec session."""
    config = daemon.pod_config()
    config.hostname = "" if host_network else config.hostname
    config.linux.security_context.namespace_options.CopyFrom(options(network=v1.NODE if host_network else v1.POD))
    mine = daemon.run_pod(config)
    empty = run_pod(daemon)
    first = daemon.run(mine, busybox, "sh", "-c", "echo kept > /dev/shm/file; sleep 600")
    before = {kind: link(daemon, first, kind) for kind in ("user", "net", "ipc", "uts")}
    status = daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=mine[0]), timeout=10).status
    daemon.kill_supervisor()
    wait_for("another supervisor", lambda: daemon.pids().supervisor is not None)
    assert daemon.exec(first, "cat", "/proc/self/uid_map").stdout.split() == [b"0", str(BASE).encode(), str(SIZE).encode()]
    daemon.kill_everything()
    daemon.start()
    again = daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=mine[0]), timeout=10).status
    assert again.linux.namespaces.options == status.linux.namespaces.options == options(network=v1.NODE if host_network else v1.POD)
    assert daemon.exec(first, "id", "-u").stdout == b"0\n"
    other = daemon.run(mine, busybox, "sh", "-c", "cat /dev/shm/file; hostname; mount -t tmpfs none /tmp; sleep 600")
    wait_for("its output", lambda: "kept" in daemon.log_text(other))
    assert {kind: link(daemon, other, kind) for kind in before} == before
    # A pod without a container lost its IPC namespace and /dev/shm with our processes; what is made again belongs to its user namespace.
    text = output(daemon, empty, busybox, "cat /proc/self/uid_map; ls -ldn /dev/shm /dev/mqueue; echo > /dev/shm/x; hostname")
    assert text.split()[:3] == ["0", str(BASE), str(SIZE)]
    assert [line.split()[2] for line in text.splitlines() if line.startswith("d")] == ["0", "0"], text
    assert text.splitlines()[-1] == empty[1].hostname
    for each in (mine, empty):
        daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=each[0]), timeout=20)
        daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=each[0]), timeout=20)
    assert not list((daemon.state / "userns").iterdir())


def test_image_volumes(daemon: Daemon, pod: Pod, registry: Any) -> None:
    """A VOLUME's content is copied with the image's ids, whatever they are mapped to."""
    registry.push(images.volumes(), "userns-volumes")
    reference = f"{registry.host}/userns-volumes:latest"
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    text = output(daemon, pod, reference, "ls -ln /data/seed; ls -ldn /data /cache; cat /data/seed; touch /data/new /cache/new; sleep 0.1")
    lines = [line.split() for line in text.splitlines()]
    assert [line[2:4] for line in lines[:3]] == [["1000", "50"], ["0", "0"], ["1000", "50"]], text
    assert "from the image" in text


@pytest.mark.parametrize(
    "users",
    [
        {"uids": [ids(), ids(host=400000)], "gids": [ids(), ids(host=400000)]},
        {"uids": [ids(container=1)], "gids": [ids(container=1)]},
        {"uids": [ids(length=0)], "gids": [ids(length=0)]},
        {"uids": [ids()], "gids": [ids(host=300000)]},
        {"uids": [], "gids": []},
        {"mode": v1.CONTAINER},
        {"mode": v1.TARGET},
    ],
)
def test_refused(daemon: Daemon, users: dict[str, Any]) -> None:
    config = daemon.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(v1.UserNamespace(**users))
    with pytest.raises(grpc.RpcError) as failed:
        daemon.run_pod(config)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "userns_options" in (failed.value.details() or "")
    names = [pod.metadata.name for pod in daemon.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items]
    assert config.metadata.name not in names


def test_nothing_is_left(daemon: Daemon, pod: Pod) -> None:
    daemon.remove_pods()
    mounts = Path("/proc/self/mounts").read_text()
    assert f"{daemon.state}/netns" not in mounts
    assert f"{daemon.state}/userns" not in mounts
    assert not list((daemon.state / "netns").iterdir()) + list((daemon.state / "userns").iterdir())
