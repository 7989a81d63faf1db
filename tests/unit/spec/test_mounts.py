"""Mounts: defaults, the pod's files, volumes, requests, and their order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import CriError, InvalidArgument, RROUnsupported
from cri.images.model import ImageConfig
from cri.spec import mounts
from cri.spec.inputs import ContainerInputs, HostFacts, SandboxFiles
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import IDMapping, Mount

FILES = SandboxFiles("/s/hosts", "/s/hostname", "/s/resolv.conf")


def build(
    *requested: dict[str, Any],
    context: dict[str, Any] | None = None,
    ipc: v1.NamespaceMode = v1.POD,
    host: HostFacts | None = None,
    **changes: Any,
) -> mounts.Mounts:
    options = v1.NamespaceOption(ipc=ipc)
    inputs = {
        "container_id": "c",
        "config": v1.ContainerConfig(
            mounts=[v1.Mount(**m) for m in requested],
            linux=v1.LinuxContainerConfig(security_context=v1.LinuxContainerSecurityContext(**context or {})),
        ),
        "pod": v1.PodSandboxConfig(
            linux=v1.LinuxPodSandboxConfig(security_context=v1.LinuxSandboxSecurityContext(namespace_options=options))
        ),
        "pod_id": "p",
        "files": FILES,
        "image": ImageConfig(),
        "host": host or HostFacts(),
    }
    return mounts.build(ContainerInputs(**(inputs | changes)))  # type: ignore[arg-type]


def destinations(*args: Any, **kwargs: Any) -> list[str]:
    return [m.destination for m in build(*args, **kwargs).mounts]


def at(found: mounts.Mounts, destination: str) -> Mount:
    (mount,) = (m for m in found.mounts if m.destination == destination)
    return mount


DEFAULTS = ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup"]


def test_plain() -> None:
    found = build()
    assert [m.destination for m in found.mounts] == [*DEFAULTS, "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/shm"]
    assert at(found, "/dev/shm") == Mount("/dev/shm", "bind", "pod:shm", ("rbind", "rprivate", "rw"))
    assert at(found, "/etc/hosts") == Mount("/etc/hosts", "bind", "pod:/s/hosts", ("rbind", "rprivate", "rw"))
    assert "ro" in at(found, "/sys").options
    assert "ro" in at(found, "/sys/fs/cgroup").options
    assert found.rootfs_propagation == ""


def test_host_ipc_uses_the_hosts_shared_memory() -> None:
    assert at(build(ipc=v1.NODE), "/dev/shm").source == "/dev/shm"


def test_readonly_root_makes_the_pods_files_readonly() -> None:
    found = build({"container_path": "/data", "host_path": "/h"}, context={"readonly_rootfs": True})
    assert "ro" in at(found, "/etc/hosts").options
    assert "rw" in at(found, "/data").options
    assert "rw" in at(found, "/dev/shm").options


def test_privileged_may_write_sysfs_and_cgroups() -> None:
    found = build(context={"privileged": True})
    assert "rw" in at(found, "/sys").options
    assert "ro" not in at(found, "/sys").options
    assert "rw" in at(found, "/sys/fs/cgroup").options


def test_files_that_are_not_given_stay_the_images() -> None:
    assert "/etc/hosts" not in destinations(files=SandboxFiles())


def test_requests_replace_defaults() -> None:
    found = build(
        {"container_path": "/etc/hosts/", "host_path": "/k/hosts"},
        {"container_path": "/sys", "host_path": "/sys", "readonly": True},
        {"container_path": "/dev/shm", "host_path": "/k/shm"},
    )
    assert at(found, "/etc/hosts").source == "/k/hosts"
    assert at(found, "/sys") == Mount("/sys", "bind", "/sys", ("rbind", "rprivate", "ro"))
    assert at(found, "/dev/shm").source == "/k/shm"


def test_a_requested_dev_drops_what_is_below_it_but_not_shared_memory() -> None:
    found = destinations({"container_path": "/dev", "host_path": "/dev"})
    assert [d for d in found if d.startswith("/dev")] == ["/dev", "/dev/shm"]


def test_order_is_by_depth_and_stable() -> None:
    found = destinations(
        {"container_path": "/a/b/c", "host_path": "/1"},
        {"container_path": "/z", "host_path": "/2"},
        {"container_path": "/a", "host_path": "/3"},
        {"container_path": "/a/b", "host_path": "/4"},
    )
    assert [d for d in found if d[1] in "az"] == ["/z", "/a", "/a/b", "/a/b/c"]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4), max_size=8))
def test_no_mount_hides_one_made_before(paths: list[list[str]]) -> None:
    found = destinations(*({"container_path": "/" + "/".join(p), "host_path": "/h"} for p in paths))
    for i, later in enumerate(found):
        if later in DEFAULTS:
            continue
        assert not any(earlier.startswith(later + "/") for earlier in found[:i] if earlier != later)


@pytest.mark.parametrize(
    ("mode", "host", "option", "root"),
    [
        (v1.PROPAGATION_PRIVATE, "private", "rprivate", ""),
        (v1.PROPAGATION_HOST_TO_CONTAINER, "shared", "rslave", "rslave"),
        (v1.PROPAGATION_HOST_TO_CONTAINER, "slave", "rslave", "rslave"),
        (v1.PROPAGATION_BIDIRECTIONAL, "shared", "rshared", "rshared"),
    ],
)
def test_propagation(mode: v1.MountPropagation, host: str, option: str, root: str) -> None:
    found = build({"container_path": "/d", "host_path": "/h", "propagation": mode}, host=HostFacts(propagation=lambda _: host))
    assert at(found, "/d").options == ("rbind", option, "rw")
    assert found.rootfs_propagation == root


def test_readonly_modes_and_extra_options() -> None:
    def options(**fields: Any) -> tuple[str, ...]:
        return at(build({"container_path": "/d", "host_path": "/h", **fields}), "/d").options

    assert options(readonly=True) == ("rbind", "rprivate", "ro")
    assert options(readonly=True, recursive_read_only=True) == ("rbind", "rprivate", "rro")
    assert options(mount_options=["noexec", "nodev"]) == ("rbind", "rprivate", "rw", "noexec", "nodev")


IMAGE = {"container_path": "/v/", "image": v1.ImageSpec(image="x"), "readonly": True}


def test_image_volumes() -> None:
    def built(**fields: Any) -> Mount:
        return at(build(IMAGE | fields, image_mounts={"/v": "sha256:1"}), "/v")

    plain = Mount("/v", "image", "sha256:1", ("ro",))
    assert built() == built(image_sub_path="a/b") == built(recursive_read_only=True) == plain
    assert built(propagation=v1.PROPAGATION_HOST_TO_CONTAINER) == plain  # nothing ever comes
    assert built(mount_options=["noexec"]).options == ("ro", "noexec")
    ids = [v1.IDMapping(container_id=0, host_id=1000, length=10)]
    assert built(uidMappings=ids, gidMappings=ids).uid_mappings == (IDMapping(0, 1000, 10),)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"readonly": False}, "readonly"),
        ({"host_path": "/h"}, "host_path"),
        ({"image": v1.ImageSpec()}, "image.image"),
        ({"propagation": v1.PROPAGATION_BIDIRECTIONAL}, "propagation"),
        ({"propagation": 9}, "propagation"),
        ({"image_sub_path": "/etc"}, "image_sub_path"),
        ({"image_sub_path": "a/../../b"}, "image_sub_path"),
        ({"image_sub_path": "a\nb"}, "image_sub_path"),
        ({"mount_options": ["rw"]}, "mount_options"),
        ({"uidMappings": [v1.IDMapping(length=1)]}, "uidMappings"),
    ],
)
def test_image_volumes_that_cannot_be(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CriError, match=rf"config\.mounts\[0\]\.{named}"):
        build(IMAGE | fields, image_mounts={"/v": "sha256:1"})


def test_volumes() -> None:
    found = build({"container_path": "/data/x", "host_path": "/h"}, volumes={"/data": "/v/0", "data/x/": "/v/1", "/etc/hosts": "/v/2"})
    assert at(found, "/data") == Mount("/data", "bind", "/v/0", ("rbind", "rprivate", "rw", "copyup"))
    assert at(found, "/data/x").source == "/h"  # the request wins over the image
    assert at(found, "/etc/hosts").source == "pod:/s/hosts"  # and the pod's files do


@pytest.mark.parametrize(
    "path", ["/", "", "/proc", "//proc/", "/proc/self", "/x/../proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/v\n"]
)
def test_volumes_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.Volumes"):
        build(volumes={path: "/v/0"})


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"container_path": "d", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "/", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "/a/..", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "/d\n/x", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "/d\0", "host_path": "/h"}, "container_path", InvalidArgument),
        ({"container_path": "/d", "host_path": "h"}, "host_path", InvalidArgument),
        ({"container_path": "/d", "host_path": ""}, "host_path", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h\0"}, "host_path", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "propagation": 9}, "propagation", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "propagation": v1.PROPAGATION_BIDIRECTIONAL}, "propagation", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "recursive_read_only": True}, "recursive_read_only", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "mount_options": ["suid"]}, "mount_options[0]", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "mount_options": ["nodev", "nodev,suid"]}, "mount_options[1]", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "image_sub_path": "x"}, "image_sub_path", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "image": v1.ImageSpec(image="x")}, "host_path", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "uidMappings": [v1.IDMapping(length=1)]}, "uidMappings", InvalidArgument),
        ({"container_path": "/d", "host_path": "/h", "gidMappings": [v1.IDMapping(length=1)]}, "gidMappings", InvalidArgument),
        (
            {"container_path": "/d", "host_path": "/h", "uidMappings": [v1.IDMapping()], "gidMappings": [v1.IDMapping(length=1)]},
            "uidMappings[0].length",
            InvalidArgument,
        ),
    ],
)
def test_requests_refused(fields: dict[str, Any], field: str, kind: type[CriError]) -> None:
    with pytest.raises(kind) as caught:
        build(fields)
    assert str(caught.value).startswith(f"config.mounts[0].{field}:")


def test_recursive_readonly_needs_private_propagation_and_a_kernel() -> None:
    mount = {"container_path": "/d", "host_path": "/h", "readonly": True, "recursive_read_only": True}
    with pytest.raises(InvalidArgument, match="private"):
        build(mount | {"propagation": v1.PROPAGATION_HOST_TO_CONTAINER}, host=HostFacts(propagation=lambda _: "shared"))
    with pytest.raises(RROUnsupported):
        build(mount, host=HostFacts(recursive_read_only=False))


def test_ids_of_mounts() -> None:
    ids = (IDMapping(0, 200000, 65536),)
    users = v1.UserNamespace(uids=[v1.IDMapping(host_id=200000, length=65536)], gids=[v1.IDMapping(host_id=200000, length=65536)])
    pod = v1.PodSandboxConfig(
        linux=v1.LinuxPodSandboxConfig(
            security_context=v1.LinuxSandboxSecurityContext(namespace_options=v1.NamespaceOption(userns_options=users))
        )
    )
    mapped = {"container_path": "/m", "host_path": "/h", "uidMappings": users.uids, "gidMappings": users.gids}
    plain = {"container_path": "/p", "host_path": "/h"}
    found = build(mapped, plain, pod=pod, image=ImageConfig(volumes=("/v",)), volumes={"/v": "/s/v"})
    for destination in ("/m", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/v"):
        assert (at(found, destination).uid_mappings, at(found, destination).gid_mappings) == (ids, ids), destination
    for destination in ("/p", "/dev/shm", "/proc"):
        assert at(found, destination).uid_mappings == (), destination
    assert at(build(mapped), "/m").uid_mappings == ids, "a mapped volume needs no user namespace"
    with pytest.raises(CriError, match=r"config\.mounts\[0\]\.uidMappings: no idmaps"):
        build(mapped, host=HostFacts(no_user_namespaces="no idmaps"))
