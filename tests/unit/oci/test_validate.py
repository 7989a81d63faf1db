"""Validation: every refusal names its field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.errors import Failure
from shim.oci import validate as v
from shim.oci.sandbox import Sandbox
from shim.oci.spec import (
    CPU,
    Capabilities,
    Device,
    DeviceCgroup,
    ExecCPUAffinity,
    Hook,
    Hooks,
    HugepageLimit,
    IDMapping,
    Linux,
    Memory,
    Mount,
    Namespace,
    NamespaceType,
    Process,
    Resources,
    Rlimit,
    Root,
    Seccomp,
    SeccompArg,
    SeccompRule,
    Spec,
    User,
)

N = NamespaceType
MOUNT = Namespace(N.MOUNT)


def spec(process: dict[str, Any] | None = None, linux: dict[str, Any] | None = None, **top: Any) -> Spec:
    return Spec(
        **{
            "oci_version": "1.2.0",
            "root": Root("rootfs"),
            "process": Process(**{"args": ("sh",)} | (process or {})),
            "linux": Linux(**{"namespaces": (MOUNT,)} | (linux or {})),
        }
        | top
    )


def res(**kw: Any) -> dict[str, Any]:
    return {"resources": Resources(**kw)}


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("ociVersion", spec(oci_version="2.0")),
        ("root.path", spec(root=Root(""))),
        ("process.args", spec({"args": ()})),
        ("process.args", spec({"args": ("",)})),
        ("process.args[1]", spec({"args": ("a", "b\0")})),
        ("process.cwd", spec({"cwd": "tmp"})),
        ("process.env[1]", spec({"env": ("A=", "B")})),
        ("process.env[0]", spec({"env": ("=x",)})),
        ("process.user.uid", spec({"user": User(uid=-1)})),
        ("process.user.uid", spec({"user": User(uid=2**32 - 1)})),
        ("process.user.additionalGids", spec({"user": User(additional_gids=(1, 2**32))})),
        ("process.user.username", spec({"user": User(username="a\nroot:x:0:0")})),
        ("process.user.umask", spec({"user": User(umask=0o1777)})),
        ("process.capabilities.bounding", spec({"capabilities": Capabilities(bounding=("cap_chown",))})),
        ("process.capabilities.effective", spec({"capabilities": Capabilities(effective=("CAP_CHOWN",))})),
        ("process.capabilities.ambient", spec({"capabilities": Capabilities(permitted=("CAP_CHOWN",), ambient=("CAP_CHOWN",))})),
        ("process.rlimits[0].type", spec({"rlimits": (Rlimit("RLIMIT_LOVE", 1, 1),)})),
        ("process.rlimits[1].type", spec({"rlimits": (Rlimit("RLIMIT_CPU", 1, 1),) * 2})),
        ("process.rlimits[0]", spec({"rlimits": (Rlimit("RLIMIT_CPU", 2, 1),)})),
        ("process.oomScoreAdj", spec({"oom_score_adj": 1001})),
        ("process.execCPUAffinity.initial", spec({"exec_cpu_affinity": ExecCPUAffinity("all")})),
        ("hostname", spec(hostname="h")),
        ("hostname", spec(hostname="h" * 65, linux={"namespaces": (MOUNT, Namespace(N.UTS))})),
        ("mounts[0].destination", spec(mounts=(Mount("proc", "proc", "proc"),))),
        ("mounts[0].source", spec(mounts=(Mount("/a", "bind", "../b"),))),
        ("mounts[0].type", spec(mounts=(Mount("/a"),))),
        ("mounts[0].options", spec(mounts=(Mount("/a", "bind", "/b", ("rshared", "rslave")),))),
        ("mounts[0].options[0]", spec(mounts=(Mount("/a", "bind", "/b", ("",)),))),
        ("mounts[0].uidMappings", spec(mounts=(Mount("/a", "bind", "/b", uid_mappings=(IDMapping(0, 0, 1),)),))),
        ("hooks.poststop[0].path", spec(hooks=Hooks(poststop=(Hook("h"),)))),
        ("hooks.createRuntime[0].timeout", spec(hooks=Hooks(create_runtime=(Hook("/h", timeout=0),)))),
        ("linux.namespaces[1].type", spec(linux={"namespaces": (MOUNT, MOUNT)})),
        ("linux.namespaces[1].path", spec(linux={"namespaces": (MOUNT, Namespace(N.PID, "pod:ipc"))})),
        ("linux.namespaces[1].path", spec(linux={"namespaces": (MOUNT, Namespace(N.PID, "proc/1"))})),
        ("linux.namespaces", spec(linux={"namespaces": ()})),
        ("linux.uidMappings", spec(linux={"uid_mappings": (IDMapping(0, 1, 2),)})),
        ("linux.devices[0].path", spec(linux={"devices": (Device("null", "c"),)})),
        ("linux.devices[0].type", spec(linux={"devices": (Device("/dev/null", "x"),)})),
        ("linux.devices[0]", spec(linux={"devices": (Device("/dev/null", "c", 1, 1 << 20),)})),
        ("linux.cgroupsPath", spec(linux={"cgroups_path": "/a/../b"})),
        ("linux.cgroupsPath", spec(linux={"cgroups_path": "a"})),
        ("linux.cgroupsPath", spec(linux={"cgroups_path": "/"})),
        ("linux.cgroupsPath", spec(linux={"cgroups_path": "a.slice:b/..:c"})),
        ("linux.rootfsPropagation", spec(linux={"rootfs_propagation": "wide"})),
        ("linux.sysctl['kernel.core_pattern']", spec(linux={"sysctl": {"kernel.core_pattern": "|x"}})),
        ("linux.sysctl['net.core.somaxconn']", spec(linux={"sysctl": {"net.core.somaxconn": "1"}})),
        ("linux.maskedPaths[0]", spec(linux={"masked_paths": ("proc",)})),
        ("linux.readonlyPaths[0]", spec(linux={"readonly_paths": ("",)})),
        ("linux.seccomp.defaultAction", spec(linux={"seccomp": Seccomp("")})),
        ("linux.seccomp.syscalls", spec(linux={"seccomp": Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("a",), "ERRNO"),))})),
        ("linux.seccomp.syscalls[0].names", spec(linux={"seccomp": Seccomp("SCMP_ACT_LOG", syscalls=(SeccompRule((), "SCMP_ACT_LOG"),))})),
        (
            "linux.seccomp.syscalls[0].args[0]",
            spec(
                linux={
                    "seccomp": Seccomp(
                        "SCMP_ACT_LOG", syscalls=(SeccompRule(("a",), "SCMP_ACT_LOG", args=(SeccompArg(6, 0, "SCMP_CMP_EQ"),)),)
                    )
                }
            ),
        ),
        ("linux.resources.devices[0].type", spec(linux=res(devices=(DeviceCgroup(True, "z"),)))),
        ("linux.resources.devices[0].access", spec(linux=res(devices=(DeviceCgroup(True, "c", access="rwx"),)))),
        ("linux.resources.hugepageLimits[0]", spec(linux=res(hugepage_limits=(HugepageLimit("2MB/..", 1),)))),
        ("linux.resources.unified", spec(linux=res(unified={"../memory.max": "1"}))),
        ("linux.resources.unified", spec(linux=res(unified={"memory/x.max": "1"}))),
        ("linux.resources.cpu.cpus", spec(linux=res(cpu=CPU(cpus="0-3;1")))),
        ("linux.resources.cpu.shares", spec(linux=res(cpu=CPU(shares=-1)))),
        ("linux.resources.memory.limit", spec(linux=res(memory=Memory(limit=-2)))),
    ],
)
def test_refused(path: str, bad: Spec) -> None:
    with pytest.raises(Failure) as caught:
        v.validate(bad)
    assert (caught.value.phase, caught.value.path) == ("validate", path)


def test_a_full_spec_passes() -> None:
    caps = ("CAP_CHOWN", "CAP_NET_BIND_SERVICE")
    v.validate(
        spec(
            {
                "user": User(2**32 - 2, username="a:b"),
                "env": ("A=1\n2",),
                "capabilities": Capabilities(caps, caps, caps[:1], caps, caps[:1]),
                "rlimits": (Rlimit("RLIMIT_NOFILE", 1, 2**64 - 1),),
            },
            {
                "namespaces": (MOUNT, Namespace(N.NETWORK, "pod:network"), Namespace(N.IPC, "/proc/1/ns/ipc"), Namespace(N.UTS)),
                "sysctl": {"net.ipv4.ip_local_port_range": "1024\t65535", "kernel.shm_rmid_forced": "1", "fs/mqueue/msg_max": "10"},
                "cgroups_path": "kubepods-pod1.slice:cri-shim:abc",
                "seccomp": Seccomp("RuntimeDefault"),
                "resources": Resources(
                    memory=Memory(limit=-1),
                    cpu=CPU(cpus="0-1,3"),
                    unified={"memory.high": "max"},
                    hugepage_limits=(HugepageLimit("2MB", 0),),
                ),
            },
            hostname="h",
            mounts=(Mount("/dev/shm", "bind", "pod:shm", ("rbind", "rprivate")), Mount("/t", "tmpfs", "tmpfs", ("size=1k",))),
        )
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("net.ipv4.ip_forward", N.NETWORK),
        ("net/ipv4/conf/eth0.100/forwarding", N.NETWORK),
        ("net.ipv4.conf.eth0/100.forwarding", N.NETWORK),
        ("kernel.shm_rmid_forced", N.IPC),
        ("kernel/msgmax", N.IPC),
        ("fs.mqueue.msg_max", N.IPC),
        ("kernel.domainname", N.UTS),
        ("kernel.hostname", None),  # the pod's hostname has a field of its own
        ("kernel.shmx", None),
        ("kernel.core_pattern", None),
        ("vm.swappiness", None),
        ("net", None),
        ("net.", None),
        ("", None),
        ("net/../kernel/core_pattern", None),
        ("net...kernel", None),
        ("net.ipv4.ip_forward+kernel.core_pattern", None),
        ("net.a=b", None),
        ("net.a b", None),
        ("net.a\nb", None),
        ("fs.mqueue", None),
        ("fs.mqueue.a.b", None),
        ("/net/ipv4/ip_forward", None),
    ],
)
def test_sysctl_namespaces(name: str, kind: NamespaceType | None) -> None:
    assert v.sysctl_namespace(name) is kind


def test_both_sysctl_notations_are_one_file() -> None:
    assert v.sysctl_path("net.ipv4.conf.eth0/100.forwarding") == v.sysctl_path("net/ipv4/conf/eth0.100/forwarding")


@given(st.text(alphabet="netipv4./+=\n \0..ke", max_size=30))
def test_sysctl_paths_stay_below_proc_sys(name: str) -> None:
    parts = v.sysctl_path(name)
    assert parts is None or all(p and p not in (".", "..") and "/" not in p and p.isprintable() for p in parts)


@pytest.mark.parametrize("value", ["1+kernel.core_pattern=|x", "1\nx", "1\0", "\x1b"])
def test_sysctl_values_hold_one_setting(value: str) -> None:
    with pytest.raises(Failure):
        v.sysctls("sysctl", {"net.ipv4.ip_forward": value}, {N.NETWORK})


SANDBOX = Sandbox("a", (N.NETWORK, N.UTS), hostname="h", netns_path="/run/n")


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("id", {"id": ""}),
        ("namespaces", {"namespaces": (N.UTS, N.UTS)}),
        ("namespaces", {"namespaces": (N.MOUNT,)}),
        ("hostname", {"namespaces": (N.NETWORK,)}),
        ("netnsPath", {"netns_path": "n"}),
        ("shmSize", {"shm_size": -1}),
        ("cgroupsPath", {"namespaces": (N.PID,), "hostname": ""}),
        ("cgroupsPath", {"cgroups_path": "/.."}),
        ("uidMappings", {"uid_mappings": (IDMapping(0, 1, 1),)}),
        ("sysctl['kernel.sem']", {"sysctl": {"kernel.sem": "1"}}),
    ],
)
def test_sandbox_refused(path: str, changes: dict[str, Any]) -> None:
    v.validate_sandbox(SANDBOX)
    with pytest.raises(Failure) as caught:
        v.validate_sandbox(dataclasses.replace(SANDBOX, **changes))
    assert caught.value.path == path
