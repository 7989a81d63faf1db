"""CDI edits in a container's specification."""

from __future__ import annotations

from typing import Any

import pytest

from cri.cdi import model
from cri.errors import FailedPrecondition, Unimplemented
from cri.images.model import ImageConfig
from cri.spec.inputs import HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import Device, DeviceCgroup, Hook, Hooks, Mount, Spec
from tests.unit.spec.conftest import Build

ON_HOST = {
    "/dev/gpu": (Device("/dev/gpu", "c", 195, 7, 0o660, 0, 44),),
    "/dev/pipe": (Device("/dev/pipe", "p"),),
    "/dev/dir": (Device("/dev/dir/x", "c", 1, 1),),
}


def devices_of_host(path: str) -> tuple[Device, ...]:
    if path not in ON_HOST:
        raise FileNotFoundError(2, "No such file or directory", path)
    return ON_HOST[path]


HOST = HostFacts(devices=devices_of_host)


def edited(build: Build, *edits: dict[str, Any], host: HostFacts = HOST, **changes: Any) -> Spec:
    parts = tuple(
        model.parse({"cdiVersion": "1.1.0", "kind": "v/c", "devices": [{"name": "d", "containerEdits": e}]}).devices[0].container_edits
        for e in edits
    )
    return build(cdi=parts, host=host, **changes)


def node(build: Build, **fields: Any) -> Device:
    spec = edited(build, {"deviceNodes": [fields]})
    return spec.linux.devices[-1]


def test_nothing(build: Build) -> None:
    assert build(cdi=()) == build()


def test_environment_replaces_in_place(build: Build) -> None:
    spec = edited(build, {"env": ["PATH=/x", "NEW=1"]}, {"env": ["NEW=2"]}, image=ImageConfig(env=("PATH=/image",)))
    assert spec.process.env[0] == "PATH=/x"
    assert spec.process.env[-1] == "NEW=2"
    assert sum(e.startswith("NEW=") for e in spec.process.env) == 1


def test_what_a_node_leaves_out_is_the_hosts(build: Build) -> None:
    assert node(build, path="/dev/gpu") == Device("/dev/gpu", "c", 195, 7, 0o660)
    given = {"fileMode": 0o600, "uid": 3, "gid": 4}
    assert node(build, path="/dev/other", hostPath="/dev/gpu", **given) == Device("/dev/other", "c", 195, 7, 0o600, 3, 4)
    assert node(build, path="/dev/gpu", type="c", major=5, minor=6) == Device("/dev/gpu", "c", 5, 6)  # complete: the host is not asked
    assert node(build, path="/dev/absent", type="c", major=5) == Device("/dev/absent", "c", 5, 0)
    assert node(build, path="/dev/pipe") == Device("/dev/pipe", "p")


def test_nodes_belong_to_the_containers_user(build: Build) -> None:
    context = {"run_as_user": v1.Int64Value(value=1000), "run_as_group": v1.Int64Value(value=50)}
    spec = edited(build, {"deviceNodes": [{"path": "/dev/gpu"}, {"path": "/dev/g2", "hostPath": "/dev/gpu", "uid": 0}]}, context=context)
    assert [(d.uid, d.gid) for d in spec.linux.devices] == [(1000, 50), (0, 50)]


def test_permissions(build: Build) -> None:
    def rules(**fields: Any) -> tuple[DeviceCgroup, ...]:
        before, after = build(host=HOST).linux.resources, edited(build, {"deviceNodes": [{"path": "/dev/gpu", **fields}]}).linux.resources
        assert before and after
        return after.devices[len(before.devices) :]

    assert rules() == (DeviceCgroup(True, "c", 195, 7, "rwm"),)
    assert rules(permissions="r") == (DeviceCgroup(True, "c", 195, 7, "r"),)
    assert rules(permissions="none") == ()
    assert rules(path="/dev/pipe") == ()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"path": "/dev/absent"}, "'/dev/absent': No such file"),
        ({"path": "/dev/x", "hostPath": "/dev/absent"}, "'/dev/absent'"),
        ({"path": "/dev/dir"}, "'/dev/dir' is not a device"),
        ({"path": "/dev/gpu", "type": "b"}, "is of type c on this host, not b"),
    ],
)
def test_nodes_the_host_does_not_have(build: Build, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(FailedPrecondition, match=why):
        node(build, **fields)


def test_mounts(build: Build) -> None:
    request = {"mounts": [v1.Mount(container_path="/a/b", host_path="/h"), v1.Mount(container_path="/a", host_path="/h")]}
    wanted = [
        {"hostPath": "/lib/x", "containerPath": "/a/b/", "options": ["ro", "nosuid", "bind"]},
        {"hostPath": "/lib/y", "containerPath": "/y", "options": ["ro"]},
        {"hostPath": "/tmp", "containerPath": "/z/z/z", "type": "tmpfs", "options": ["size=1m"]},
    ]
    spec = edited(build, {"mounts": wanted}, config=request)
    assert [m for m in spec.mounts if m.destination[1] in "ayz"] == [
        Mount("/a", "bind", "/h", ("rbind", "rprivate", "rw")),
        Mount("/y", "bind", "/lib/y", ("rbind", "ro")),
        Mount("/a/b", "bind", "/lib/x", ("ro", "nosuid", "bind")),
        Mount("/z/z/z", "tmpfs", "/tmp", ("size=1m",)),
    ]


def test_mounts_in_a_user_namespace_are_mapped(build: Build) -> None:
    ids = [v1.IDMapping(host_id=100000, container_id=0, length=65536)]
    options = v1.NamespaceOption(userns_options=v1.UserNamespace(mode=v1.POD, uids=ids, gids=ids))
    spec = edited(build, {"mounts": [{"hostPath": "/lib/y", "containerPath": "/y"}]}, pod_context={"namespace_options": options})
    (mount,) = (m for m in spec.mounts if m.destination == "/y")
    assert mount.options == ("rbind", "idmap")


def test_owners_in_a_user_namespace_are_ids_inside(build: Build) -> None:
    ids = [v1.IDMapping(host_id=100000, container_id=0, length=65536)]
    options = v1.NamespaceOption(userns_options=v1.UserNamespace(mode=v1.POD, uids=ids, gids=ids))
    nodes: list[dict[str, Any]] = [{"path": "/dev/gpu", "uid": 5, "gid": 0}]
    nodes += [{"path": "/dev/g2", "hostPath": "/dev/gpu"}, {"path": "/dev/g3", "hostPath": "/dev/gpu", "uid": 99999}]
    spec = edited(build, {"deviceNodes": nodes}, pod_context={"namespace_options": options})
    assert [(d.uid, d.gid) for d in spec.linux.devices] == [(100005, 100000), (None, None), (99999, None)]


def test_hooks_and_groups(build: Build) -> None:
    names = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    hooks = [{"hookName": name, "path": f"/{name}", "args": ["x", name], "env": ["A=1"], "timeout": 5} for name in names]
    context = {"run_as_user": v1.Int64Value(value=1000), "supplemental_groups": [44]}
    spec = edited(build, {"hooks": hooks, "additionalGids": [0, 44, 45]}, {"hooks": hooks[:1]}, context=context)
    made = [(Hook(f"/{name}", ("x", name), ("A=1",), 5),) for name in names]
    assert spec.hooks == Hooks(made[0] * 2, *made[1:])
    assert spec.process.user.additional_gids == (44, 45)


def test_intel_rdt_is_refused(build: Build) -> None:
    with pytest.raises(FailedPrecondition, match="this host has no resctrl"):
        edited(build, {"intelRdt": {"closID": "gold"}})
    with pytest.raises(Unimplemented, match="intelRdt"):
        edited(build, {"intelRdt": {"closID": "gold"}}, host=HostFacts(devices=devices_of_host, resctrl=True))
