"""Security and resource fields of CRI end to end: what a request says is what the kernel says inside the container. ``hack/fields.md`` is
the whole table; what is here had no test of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from shim.linux.caps import NUMBERS
from tests.daemon.harness import Daemon

Pod = tuple[str, v1.PodSandboxConfig]
Context = v1.LinuxContainerSecurityContext
INVALID = grpc.StatusCode.INVALID_ARGUMENT
STATUS = "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups|Uid|Gid)' /proc/self/status"


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def said(daemon: Daemon, pod: Pod, image: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, image, "sh", "-c", script, **fields)
    daemon.wait_exit(container)
    text = "".join(line.split(" ", 3)[3] for line in daemon.log_text(container).splitlines(keepends=True))
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=30)
    return text


def facts(text: str) -> dict[str, str]:
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in text.splitlines())}


def mask(*names: str) -> int:
    return sum(1 << NUMBERS[f"CAP_{name}"] for name in names)


def refused(daemon: Daemon, pod: Pod, image: str, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as error:
        daemon.create(pod, image, "true", **fields)
    assert error.value.code() is INVALID, error.value.details()
    return str(error.value.details())


def control(pod: Pod, container: str, one: str, two: str) -> str:
    """A control file of the container's group: its name on cgroup v1 (with the controller) or v2."""
    path = f"{pod[1].linux.cgroup_parent.strip('/')}/{container}"
    top = Path("/sys/fs/cgroup")
    found = top / path / two if (top / "cgroup.procs").exists() else top / one.partition(".")[0] / path / one
    return found.read_text().strip()


def test_capabilities_added_dropped_and_ambient(daemon: Daemon, pod: Pod, busybox: str) -> None:
    added = ["NET_ADMIN", "CAP_SYS_PTRACE"]
    wanted = v1.Capability(add_capabilities=added, drop_capabilities=["ALL"], add_ambient_capabilities=["NET_ADMIN"])
    context = Context(capabilities=wanted, run_as_user=v1.Int64Value(value=1000))
    found = facts(said(daemon, pod, busybox, STATUS, security=context))
    assert int(found["CapBnd"], 16) == mask("NET_ADMIN", "SYS_PTRACE")
    assert int(found["CapAmb"], 16) == int(found["CapInh"], 16) == int(found["CapEff"], 16) == mask("NET_ADMIN")
    found = facts(said(daemon, pod, busybox, STATUS, security=Context(capabilities=v1.Capability(drop_capabilities=["chown", "KILL"]))))
    assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0, "nothing is inheritable that is not asked for"
    assert not int(found["CapEff"], 16) & mask("CHOWN", "KILL") and int(found["CapEff"], 16) & mask("FOWNER")
    everything = facts(said(daemon, pod, busybox, STATUS, security=Context(capabilities=v1.Capability(add_capabilities=["ALL"]))))
    assert int(everything["CapEff"], 16) & mask("SYS_ADMIN")
    assert "add_capabilities[0]" in refused(daemon, pod, busybox, security=Context(capabilities=v1.Capability(add_capabilities=["FLY"])))


def test_groups_and_policies(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.write_text("root:x:0:\nteam:x:77:worker\n")
    passwd = tmp_path / "passwd"
    passwd.write_text("root:x:0:0::/:/bin/sh\nworker:x:1005:55::/:/bin/sh\n")
    mounts = tuple(v1.Mount(container_path=f"/etc/{f.name}", host_path=str(f), readonly=True) for f in (group, passwd))
    for policy, groups in ((v1.Merge, {55, 77, 9}), (v1.Strict, {55, 9})):
        context = Context(run_as_username="worker", supplemental_groups=[9], supplemental_groups_policy=policy)
        container = daemon.run(pod, busybox, "sh", "-c", f"{STATUS}; sleep 1000", security=context, mounts=mounts)
        user = daemon.container(container).user.linux
        assert (user.uid, user.gid, set(user.supplemental_groups)) == (1005, 55, groups)
        inside = facts(daemon.exec(container, "sh", "-c", STATUS).stdout.decode())
        assert set(map(int, inside["Groups"].split())) == groups
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=30)
    assert "run_as_group" in refused(daemon, pod, busybox, security=Context(run_as_group=v1.Int64Value(value=1)))


def test_no_new_privs_and_seccomp(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["chroot"], "action": "SCMP_ACT_ERRNO"}]}))
    kinds = v1.SecurityProfile
    for seccomp, mode in (
        (kinds(profile_type=kinds.RuntimeDefault), "2"),
        (kinds(profile_type=kinds.Unconfined), "0"),
        (kinds(profile_type=kinds.Localhost, localhost_ref=str(profile)), "2"),
    ):
        for privs in (True, False):
            found = facts(said(daemon, pod, busybox, STATUS, security=Context(no_new_privs=privs, seccomp=seccomp)))
            assert (found["NoNewPrivs"], found["Seccomp"]) == (str(int(privs)), mode)
    localhost = kinds(profile_type=kinds.Localhost, localhost_ref=str(profile))
    for context in (Context(seccomp=localhost), Context(seccomp_profile_path=f"localhost/{profile}")):
        assert "not permitted" in said(daemon, pod, busybox, "busybox chroot / true 2>&1", security=context)
    gone = kinds(profile_type=kinds.Localhost, localhost_ref="/nonexistent")
    assert "seccomp.localhost_ref" in refused(daemon, pod, busybox, security=Context(seccomp=gone))


def test_masked_and_read_only_paths_are_the_requests(daemon: Daemon, pod: Pod, busybox: str) -> None:
    look = "head -c1 /proc/uptime | wc -c; echo 1 2>&1 > /proc/sys/kernel/domainname && echo written; head -c1 /proc/keys | wc -c"
    paths = Context(masked_paths=["/proc/uptime"], readonly_paths=["/proc/sys"])
    assert said(daemon, pod, busybox, look, security=paths).split("\n")[0] == "0"
    assert "written" not in said(daemon, pod, busybox, look, security=paths)
    unmasked = said(daemon, pod, busybox, look, security=Context())
    assert unmasked.split("\n")[0] == "1" and "written" in unmasked, "the kubelet's empty lists mean none"


def test_a_read_only_root_and_what_stays_writable(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path) -> None:
    script = "for d in / /etc /dev /dev/shm /vol /dev/mqueue; do touch $d/x 2>/dev/null && echo $d; done; echo >/dev/null && echo null"
    mounts = (v1.Mount(container_path="/vol", host_path=str(tmp_path)),)
    found = said(daemon, pod, busybox, script, security=Context(readonly_rootfs=True), mounts=mounts).split()
    assert found == ["/dev", "/dev/shm", "/vol", "/dev/mqueue", "null"]


def test_privileged(daemon: Daemon, busybox: str) -> None:
    config = daemon.pod_config()
    config.linux.security_context.privileged = True
    pod = daemon.run_pod(config)
    script = f"{STATUS}; ls /dev | wc -l; grep ' /sys sysfs' /proc/mounts; head -c1 /proc/keys | wc -c"
    default = v1.SecurityProfile(profile_type=v1.SecurityProfile.RuntimeDefault)
    context = Context(privileged=True, seccomp=default, masked_paths=["/proc/keys"])
    text = said(daemon, pod, busybox, script, security=context)
    found = facts(text)
    own = int(re.search(r"^CapBnd:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)[1], 16)  # type: ignore[index]
    assert int(found["CapEff"], 16) == own and found["Seccomp"] == "0"
    assert " rw," in text and text.rstrip().endswith("1"), "sysfs is writable and nothing is masked"


def test_devices_and_permissions(daemon: Daemon, pod: Pod, busybox: str) -> None:
    def device(permissions: str) -> tuple[v1.Device, ...]:
        return (v1.Device(host_path="/dev/fuse", container_path="/dev/another", permissions=permissions),)

    script = "sh -c ': < /dev/another' && echo read; sh -c ': > /dev/another' && echo written"
    assert said(daemon, pod, busybox, script, devices=device("rwm")).split() == ["read", "written"]
    assert said(daemon, pod, busybox, f"({script}) 2>/dev/null", devices=device("r")).split() == ["read"]
    assert said(daemon, pod, busybox, f"({script}) 2>/dev/null", devices=device("m")).split() == []
    assert "devices[0].permissions" in refused(daemon, pod, busybox, devices=device("x"))
    gone = (v1.Device(host_path="/dev/none", container_path="/dev/none", permissions="r"),)
    assert "devices[0].host_path" in refused(daemon, pod, busybox, devices=gone)


def test_every_limit_is_in_force_and_reported(daemon: Daemon, pod: Pod, busybox: str) -> None:
    wanted = v1.LinuxContainerResources(
        cpu_period=50_000, cpu_quota=25_000, cpu_shares=512, memory_limit_in_bytes=64 << 20, memory_swap_limit_in_bytes=64 << 20,
        oom_score_adj=321, cpuset_cpus="0", cpuset_mems="0", hugepage_limits=[v1.HugepageLimit(page_size="2MB", limit=0)],
    )  # fmt: skip
    container = daemon.run(pod, busybox, "sleep", "1000", resources=wanted)
    assert daemon.container(container).resources.linux == wanted
    two = Path("/sys/fs/cgroup/cgroup.procs").exists()
    if two:
        assert control(pod, container, "", "cpu.max") == "25000 50000"
    else:
        assert (control(pod, container, "cpu.cfs_quota_us", ""), control(pod, container, "cpu.cfs_period_us", "")) == ("25000", "50000")
    assert control(pod, container, "cpu.shares", "cpu.weight") == ("59" if two else "512")
    assert control(pod, container, "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert control(pod, container, "cpuset.cpus", "cpuset.cpus") == control(pod, container, "cpuset.mems", "cpuset.mems") == "0"
    assert daemon.exec(container, "cat", "/proc/1/oom_score_adj").stdout == b"321\n"
    assert daemon.exec(container, "cat", "/proc/self/oom_score_adj").stdout == b"321\n", "exec sessions have it, too"


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 1}, "memory_swap_limit_in_bytes"),
        ({"memory_swap_limit_in_bytes": 64 << 20}, "memory_swap_limit_in_bytes"),
        ({"cpu_period": 5}, "cpu_period"),
        ({"cpu_quota": 5}, "cpu_quota"),
        ({"oom_score_adj": 1001}, "oom_score_adj"),
        ({"cpuset_cpus": "0-"}, "cpuset_cpus"),
        ({"hugepage_limits": [v1.HugepageLimit(page_size="3MB", limit=1)]}, "hugepage_limits[0]"),
        ({"unified": {"../../memory.max": "1"}}, "unified"),
    ],
)
def test_limits_that_cannot_hold_name_their_field(daemon: Daemon, pod: Pod, busybox: str, resources: dict[str, Any], field: str) -> None:
    assert field in refused(daemon, pod, busybox, resources=v1.LinuxContainerResources(**resources))


def test_an_update_below_usage_is_refused_and_kills_nobody(daemon: Daemon, pod: Pod, busybox: str) -> None:
    wanted = v1.LinuxContainerResources(memory_limit_in_bytes=128 << 20)
    script = "head -c 40000000 /dev/zero > /dev/shm/full; echo ready; sleep 1000"  # not to be reclaimed: there is no swap for it
    container = daemon.run(pod, busybox, "sh", "-c", script, resources=wanted)
    while "ready" not in daemon.log_text(container):
        assert daemon.container(container).state == v1.CONTAINER_RUNNING
    change = v1.UpdateContainerResourcesRequest(container_id=container, linux=v1.LinuxContainerResources(memory_limit_in_bytes=4 << 20))
    with pytest.raises(grpc.RpcError) as error:
        daemon.runtime.UpdateContainerResources(change, timeout=10)
    assert "memory" in str(error.value.details())
    found = daemon.container(container)
    assert (found.state, found.resources.linux.memory_limit_in_bytes) == (v1.CONTAINER_RUNNING, 128 << 20)
    assert control(pod, container, "memory.limit_in_bytes", "memory.max") == str(128 << 20)
    daemon.exec(container, "rm", "/dev/shm/full")


def test_shared_memory_is_of_the_pod_and_bounded(daemon: Daemon, pod: Pod, busybox: str) -> None:
    assert said(daemon, pod, busybox, "df -k /dev/shm | tail -1").split()[1] == "65536"


def test_container_namespaces_that_are_not_the_pods(daemon: Daemon, pod: Pod, busybox: str) -> None:
    for name in ("network", "ipc", "pid"):
        options = v1.NamespaceOption(pid=v1.CONTAINER)
        setattr(options, name, v1.NODE)
        assert f"namespace_options.{name}" in refused(daemon, pod, busybox, security=Context(namespace_options=options))


def test_labels_and_profiles_this_host_has_not(daemon: Daemon, pod: Pod, busybox: str) -> None:
    if Path("/sys/module/apparmor/parameters/enabled").exists() or Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("this host has one")
    kinds = v1.SecurityProfile
    named = Context(apparmor=kinds(profile_type=kinds.Localhost, localhost_ref="localhost/mine"))
    assert "apparmor" in refused(daemon, pod, busybox, security=named)
    for context in (
        Context(apparmor=kinds(profile_type=kinds.RuntimeDefault)),
        Context(apparmor=kinds(profile_type=kinds.Unconfined)),
        Context(selinux_options=v1.SELinuxOption(level="s0:c1,c2")),
    ):
        assert said(daemon, pod, busybox, "echo ok", security=context) == "ok\n"
    mounts = (v1.Mount(container_path="/a", host_path="/etc", readonly=True, selinux_relabel=True),)
    assert said(daemon, pod, busybox, "echo ok", mounts=mounts) == "ok\n"


def test_the_hosts_root_as_a_volume(daemon: Daemon, pod: Pod, busybox: str) -> None:
    mounted = Path("/proc/self/mountinfo").read_text().splitlines()
    if any(" mnt:[" in line and " unbindable " not in line for line in mounted):
        pytest.skip("somebody has bound a mount namespace on this host (unshare --mount=FILE): it cannot be mounted in newer ones")
    for recursive in (False, True):
        mounts = (v1.Mount(container_path="/host", host_path="/", readonly=True, recursive_read_only=recursive),)
        script = f"test -d /host{daemon.directory}/state && touch /host{daemon.directory}/x; ls /host/proc/1 >/dev/null && echo all"
        assert said(daemon, pod, busybox, f"({script}) 2>&1", mounts=mounts).splitlines()[-1] == "all"
        assert not (daemon.directory / "x").exists()


def test_handlers_and_features_are_announced(daemon: Daemon) -> None:
    answer = daemon.runtime.Status(v1.StatusRequest(verbose=True), timeout=10)
    users = json.loads(answer.info["host"])["userNamespaces"] == "available"
    assert [handler.name for handler in answer.runtime_handlers] == [""]
    features = answer.runtime_handlers[0].features
    assert (features.recursive_read_only_mounts, features.user_namespaces) == (True, users)
    assert answer.features.supplemental_groups_policy and answer.features.mount_options
    assert answer.features.user_namespaces_host_network == users
