"""A handler's base specification under a request's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cri.images.model import ImageConfig
from cri.spec import base
from cri.spec.inputs import HandlerConfig
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci import validate
from shim.oci.spec import Device, DeviceCgroup, Hook, Mount, Rlimit, Spec
from tests.unit.spec.conftest import Build

# As `ctr oci spec` writes it, shortened.
CTR: dict[str, Any] = {
    "ociVersion": "1.2.1",
    "process": {
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    },
    "root": {"path": "rootfs"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    ],
    "linux": {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "cgroupsPath": "/default",
        "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/bus"],
    },
}


def parse(tree: Any) -> Spec:
    return base.parse(json.dumps(tree).encode())


def built(build: Build, tree: Any, **changes: Any) -> Spec:
    return build(handler=HandlerConfig(base=parse(tree), rlimits=changes.pop("rlimits", ())), **changes)


def test_what_ctr_writes(build: Build) -> None:
    plain, spec = build(context={}), built(build, CTR, context={})
    validate.validate(spec)
    assert spec.process.rlimits == (Rlimit("RLIMIT_NOFILE", 1024, 1024),)
    extra = {m.destination for m in spec.mounts} - {m.destination for m in plain.mounts}
    assert extra == {"/run"}
    assert next(m.source for m in spec.mounts if m.destination == "/dev/shm") == "pod:shm"
    for name in ("capabilities", "no_new_privileges", "args", "user", "cwd", "env"):
        assert getattr(spec.process, name) == getattr(plain.process, name), name
    for name in ("resources", "cgroups_path", "namespaces", "masked_paths", "readonly_paths", "seccomp", "devices"):
        assert getattr(spec.linux, name) == getattr(plain.linux, name), name


def test_everything_that_is_taken(build: Build) -> None:
    tree = {
        "process": {
            "env": ["PATH=/base", "FROM=base", "HOSTNAME=x"],
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}, {"type": "RLIMIT_NPROC", "soft": 3, "hard": 4}],
            "oomScoreAdj": 500,
            "user": {"uid": 7, "gid": 7, "umask": 0o27},
        },
        "mounts": [
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["rw"]},
            {"destination": "/data", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/extra", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]},
        ],
        "hooks": {"poststop": [{"path": "/bin/hook"}]},
        "annotations": {"org.example": "x", "io.kubernetes.cri.container-type": "forged"},
        "linux": {
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            "sysctl": {"net.core.somaxconn": "1024"},
            "resources": {
                "devices": [{"allow": False}, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}],
                "pids": {"limit": 99},
                "memory": {"limit": 1 << 20, "swappiness": 0},
                "unified": {"memory.high": "1"},
            },
        },
    }
    spec = built(
        build,
        tree,
        config={"mounts": [v1.Mount(container_path="/data", host_path="/h")], "resources": v1.LinuxContainerResources(cpu_shares=2)},
        rlimits=(Rlimit("RLIMIT_NOFILE", 5, 6),),
        image=ImageConfig(env=("PATH=/image",)),
    )
    validate.validate(spec)
    assert spec.process.env == ("FROM=base", "PATH=/image", "HOSTNAME=pod-host")
    assert spec.process.rlimits == (Rlimit("RLIMIT_NOFILE", 5, 6), Rlimit("RLIMIT_NPROC", 3, 4))
    assert spec.process.oom_score_adj == 0  # the request has resources, which say so
    assert (spec.process.user.uid, spec.process.user.umask) == (0, 0o27)
    mounts = {m.destination: m for m in spec.mounts}
    assert mounts["/sys"].options == ("rw",)
    assert mounts["/data"].source == "/h"
    assert mounts["/extra"] == Mount("/extra", "bind", "/srv", ("rbind", "ro"))
    assert spec.hooks and spec.hooks.poststop == (Hook("/bin/hook"),)
    assert spec.annotations["org.example"] == "x" and spec.annotations["io.kubernetes.cri.container-type"] == "container"
    assert spec.linux.devices == (Device("/dev/fuse", "c", 10, 229),)
    assert spec.linux.sysctl == {"net.core.somaxconn": "1024"}
    resources = spec.linux.resources
    assert resources and resources.pids and resources.pids.limit == 99
    assert resources.cpu and resources.cpu.shares == 2
    assert resources.memory and (resources.memory.limit, resources.memory.swappiness) == (1 << 20, 0)
    assert resources.devices[-1] == DeviceCgroup(True, "c", 10, 229, "rw")
    assert sum(not rule.allow for rule in resources.devices) == 1
    assert resources.unified == {"memory.high": "1"}


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        ({"linux": {"intelRdt": {"closID": "x"}}}, "linux.intelRdt"),
        ({"process": {"scheduler": {"policy": "SCHED_FIFO"}}}, "process.scheduler"),
        ({"vm": {"kernel": {}}}, "vm"),
        ({"mounts": [{"destination": "/x", "kind": "tmpfs"}]}, "mounts[0].kind"),
        ({"mounts": [{"destination": "x", "type": "tmpfs"}]}, "mounts[0].destination"),
        ({"mounts": [{"destination": "/x", "type": "image"}]}, "mounts[0]"),
        ({"mounts": [{"destination": "/x", "type": "bind", "source": "pod:shm"}]}, "mounts[0]"),
        ({"process": {"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}}, "process.rlimits[0].type"),
        ({"process": {"env": ["x"]}}, "process.env[0]"),
        ({"process": {"rlimits": {}}}, "process.rlimits"),
        ({"hooks": {"poststop": [{"path": "hook"}]}}, "hooks.poststop[0].path"),
        ({"linux": {"sysctl": {"kernel.panic": "1"}}}, "kernel.panic"),
        ({"ociVersion": "2.0.0"}, "ociVersion"),
    ],
)
def test_refused(data: Any, where: str) -> None:
    with pytest.raises(Failure) as raised:
        base.parse(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert where in str(raised.value)


def test_keys_without_a_value_say_nothing() -> None:
    assert parse({"vm": None, "linux": {"intelRdt": {}, "resources": {"memory": {"useHierarchy": False}}}}) == parse(
        {"linux": {"resources": {"memory": {}}}}
    )
