"""Plans as data: what a specification turns into, and what is refused before anything is touched."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

import pytest

from shim.errors import Failure
from shim.linux import mount as m
from shim.oci.bundle import Recipe, Volume
from shim.oci.spec import Device, IDMapping, Linux, Mount, Namespace, NamespaceType, Process, Root, Spec
from shim.rootfs import plan as p
from shim.rootfs.devices import Node

RECIPE = Recipe("overlay", ("/l1", "/l0"), "/u", "/w")
NSE = ("nosuid", "noexec", "nodev")
POD = tuple(Namespace(kind) for kind in (NamespaceType.PID, NamespaceType.MOUNT, NamespaceType.NETWORK, NamespaceType.IPC))


def spec(*mounts: Mount, readonly: bool = False, cwd: str = "/", **linux: object) -> Spec:
    return Spec("1.2.0", Root("rootfs", readonly), Process(("/bin/sh",), cwd), mounts=mounts, linux=Linux(**{"namespaces": POD, **linux}))


def plan(*mounts: Mount, version: int = 2, paths: dict[str, str] | None = None, **rest: object) -> tuple[p.Op, ...]:
    return p.plan(spec(*mounts, **rest), RECIPE, cgroup_version=version, cgroup_paths=paths or {})


def only(ops: tuple[p.Op, ...], destination: str) -> p.Op:
    found = [op for op in ops if getattr(op, "destination", None) == destination]
    assert len(found) == 1
    return found[0]


def test_a_dev_of_our_own_comes_first_when_the_specification_has_none() -> None:
    root, dev = plan()
    assert root == p.Root()
    assert isinstance(dev, p.Filesystem)
    assert (dev.destination, dev.fstype, dev.options["mode"]) == ("/dev", "tmpfs", "755")
    assert dev.attributes == m.MOUNT_ATTR_NOSUID | m.MOUNT_ATTR_STRICTATIME


def test_dev_has_the_default_nodes_and_links() -> None:
    dev = plan()[1]
    assert isinstance(dev, p.Filesystem)
    nodes = {node.path: node for node in dev.tree}
    assert nodes["null"] == Node("null", stat.S_IFCHR, 0o666, os.makedev(1, 3))
    assert {"zero", "full", "random", "urandom", "tty"} < nodes.keys()
    assert nodes["ptmx"].target == "pts/ptmx"
    assert nodes["stderr"].target == "/proc/self/fd/2"
    assert "core" not in nodes


def test_mounts_keep_their_order_and_devs_mount_points_are_made_in_it() -> None:
    ops = plan(
        Mount("/proc", "proc", "proc", NSE),
        Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "mode=755")),
        Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "gid=5")),
        Mount("/dev/shm", "bind", "pod:shm", ("rbind",)),
    )
    assert [getattr(op, "destination", "") for op in ops] == ["", "/proc", "/dev", "/dev/pts", "/dev/shm"]
    dev, pts = ops[2], ops[3]
    assert isinstance(dev, p.Filesystem)
    assert isinstance(pts, p.Filesystem)
    assert {node.path for node in dev.tree if node.kind == stat.S_IFDIR} == {"pts", "shm"}
    assert pts.options == {"source": "devpts", "newinstance": None, "ptmxmode": "0666", "gid": "5"}
    assert ops[4] == p.Bind("/dev/shm", "pod:shm")


@pytest.mark.parametrize(
    "options, expected",
    [
        ((), {"recursive": False, "propagation": m.MS_PRIVATE}),
        (("rbind", "rslave"), {"recursive": True, "propagation": m.MS_SLAVE}),
        (("rbind", "rshared", "ro"), {"propagation": m.MS_SHARED, "set": m.MOUNT_ATTR_RDONLY}),
        (("rbind", "rro"), {"recursive_set": m.MOUNT_ATTR_RDONLY, "set": 0}),
        (("bind", "ro", "rw"), {"set": 0, "clear": m.MOUNT_ATTR_RDONLY}),
        (("bind", "noatime"), {"set": m.MOUNT_ATTR_NOATIME, "clear": m.MOUNT_ATTR_ATIME}),
        (("bind", "noatime", "strictatime"), {"set": m.MOUNT_ATTR_STRICTATIME}),
        (("rbind", "copyup", "nosuid"), {"copyup": True, "set": m.MOUNT_ATTR_NOSUID}),
    ],
)
def test_bind_options(options: tuple[str, ...], expected: dict[str, object]) -> None:
    op = only(plan(Mount("/data", "bind", "/host", options)), "/data")
    assert {key: getattr(op, key) for key in expected} == expected


@pytest.mark.parametrize(
    "mount, why",
    [
        (Mount("data", "bind", "/host"), "absolute"),
        (Mount("/a/../../b", "bind", "/host"), "'..'"),
        (Mount("/", "bind", "/host"), "over the root"),
        (Mount("/x", "bind", "/host", ("size=1",)), "no option"),
        (Mount("/x", "bind", ""), "source"),
        (Mount("/x"), "neither a type"),
        (Mount("/proc/self", "bind", "/host"), "below /proc"),
        (Mount("/proc/sys", "tmpfs", "tmpfs"), "below /proc"),
        (Mount("/proc", "tmpfs", "tmpfs"), "may not be"),
        (Mount("/sys", "ext4", "/dev/sda"), "may not be"),
    ],
)
def test_what_is_refused(mount: Mount, why: str) -> None:
    with pytest.raises(Failure, match=why) as caught:
        plan(mount)
    assert caught.value.path in (mount.destination, mount.destination.rstrip("/") or "/")


def test_destinations_are_normalised() -> None:
    assert isinstance(only(plan(Mount("//a/./b/", "bind", "/host")), "/a/b"), p.Bind)
    assert p.normal("/a/.hidden", "x") == "/a/.hidden"


def test_lxcfs_files_may_replace_those_of_proc() -> None:
    assert isinstance(only(plan(Mount("/proc/meminfo", "bind", "/lxcfs/meminfo")), "/proc/meminfo"), p.Bind)


def test_devices_of_the_specification() -> None:
    devices = (
        Device("/dev/fuse", "c", 10, 229, 0o600, 1, 2),
        Device("/dev/net/tun", "c", 10, 200),
        Device("/dev/null", "c", 1, 3, 0o600),
        Device("/opt/disk", "b", 8, 0),
    )
    ops = plan(devices=devices)
    dev = only(ops, "/dev")
    assert isinstance(dev, p.Filesystem)
    names = [node.path for node in dev.tree]
    nodes = {node.path: node for node in dev.tree}
    assert nodes["fuse"] == Node("fuse", stat.S_IFCHR, 0o600, os.makedev(10, 229), "", 1, 2)
    assert names.index("net") < names.index("net/tun")
    assert nodes["null"].mode == 0o600
    assert only(ops, "/opt/disk") == p.MakeNode("/opt/disk", Node("disk", stat.S_IFBLK, 0o666, os.makedev(8, 0)))


@pytest.mark.parametrize("device", [Device("/dev/pts/0", "c"), Device("/dev/x", "z"), Device("/dev/x", ""), Device("dev/x", "c")])
def test_devices_that_are_refused(device: Device) -> None:
    with pytest.raises(Failure):
        plan(devices=(device,))


def test_a_bound_dev_gets_no_nodes() -> None:
    ops = plan(Mount("/dev", "bind", "/dev", ("rbind",)), devices=(Device("/dev/fuse", "c", 10, 229),))
    assert [type(op) for op in ops] == [p.Root, p.Bind]


def test_without_mknod_nodes_are_bound_from_the_host() -> None:
    ops = p.plan(spec(devices=(Device("/dev/fuse", "c", 10, 229),)), RECIPE, cgroup_version=2, mknod=False)
    dev = only(ops, "/dev")
    assert isinstance(dev, p.Filesystem)
    assert all(not stat.S_ISCHR(node.kind) for node in dev.tree)
    fuse = only(ops, "/dev/fuse")
    assert isinstance(fuse, p.Bind)
    assert (fuse.source, fuse.device) == ("/dev/fuse", (stat.S_IFCHR, os.makedev(10, 229)))


def test_user_namespace() -> None:
    ids = (IDMapping(0, 100000, 3),)
    namespaces = (Namespace(NamespaceType.USER), Namespace(NamespaceType.MOUNT), Namespace(NamespaceType.PID))
    ops = plan(
        Mount("/sys", "sysfs", "sysfs", NSE),
        Mount("/dev/mqueue", "mqueue", "mqueue", NSE),
        Mount("/dev/pts", "devpts", "devpts", ("gid=5", "mode=0620")),
        namespaces=namespaces,
        uid_mappings=ids,
        gid_mappings=ids,
    )
    root, sys_, mqueue, pts = ops[0], only(ops, "/sys"), only(ops, "/dev/mqueue"), only(ops, "/dev/pts")
    assert root == p.Root((ids, ids))
    for host in (sys_, mqueue):  # of the host's network and IPC namespaces: made outside, read-only
        assert isinstance(host, p.Filesystem)
        assert (host.outside, host.on_the_host, host.must_be_visible, host.attributes & m.MOUNT_ATTR_RDONLY) == (True, True, False, 1)
    assert isinstance(pts, p.Filesystem)
    assert "gid" not in pts.options
    dev = only(ops, "/dev")
    assert isinstance(dev, p.Filesystem)
    assert (dev.on_the_host, dev.options["uid"], dev.options["gid"]) == (True, "100000", "100000")
    assert {(node.uid, node.gid) for node in dev.tree} == {(100000, 100000)}
    assert any(stat.S_ISCHR(node.kind) for node in dev.tree), "mknod works outside of the user namespace"


def test_cgroup_2_view_is_read_only_unless_asked() -> None:
    view = only(plan(Mount("/sys/fs/cgroup", "cgroup", "cgroup", NSE)), "/sys/fs/cgroup")
    assert isinstance(view, p.Filesystem)
    assert (view.fstype, view.attributes & m.MOUNT_ATTR_RDONLY) == ("cgroup2", m.MOUNT_ATTR_RDONLY)
    writable = only(plan(Mount("/sys/fs/cgroup", "cgroup", "cgroup", ("rw",))), "/sys/fs/cgroup")
    assert isinstance(writable, p.Filesystem)
    assert not writable.attributes & m.MOUNT_ATTR_RDONLY


def test_cgroup_1_view_has_the_hosts_names() -> None:
    own = "/kubepods/pod/ctr"
    base = "/sys/fs/cgroup"
    paths = {
        "cpu": f"{base}/cpu,cpuacct{own}",
        "cpuacct": f"{base}/cpu,cpuacct{own}",
        "memory": f"{base}/memory{own}",
        "name=systemd": f"{base}/systemd{own}",
    }
    ops = plan(Mount(base, "cgroup", "cgroup", NSE), version=1, paths=paths)
    view = only(ops, base)
    assert isinstance(view, p.Filesystem)
    assert {node.path: node.target for node in view.tree} == {
        "cpu,cpuacct": "",
        "memory": "",
        "systemd": "",
        "cpu": "cpu,cpuacct",
        "cpuacct": "cpu,cpuacct",
    }
    binds = [op for op in ops if isinstance(op, p.Bind)]
    assert [(b.destination, b.source, b.set & m.MOUNT_ATTR_RDONLY) for b in binds] == [
        (f"{base}/cpu,cpuacct", f"{base}/cpu,cpuacct{own}", 1),
        (f"{base}/memory", f"{base}/memory{own}", 1),
        (f"{base}/systemd", f"{base}/systemd{own}", 1),
    ]


def test_what_comes_last() -> None:
    ops = plan(Mount("/data", "bind", "/host"), masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",), readonly=True, cwd="/work")
    assert ops[-3:] == (p.Mask(("/proc/kcore",)), p.Readonly(("/proc/sys",)), p.MakeDirectory("/work"))
    assert ops[0] == p.Root(None, True)


@pytest.mark.parametrize("name, value", [("rslave", m.MS_SLAVE), ("shared", m.MS_SHARED), ("", 0), ("unbindable", m.MS_UNBINDABLE)])
def test_root_propagation(name: str, value: int) -> None:
    root = plan(rootfs_propagation=name)[0]
    assert isinstance(root, p.Root)
    assert root.propagation == value


def test_unknown_words() -> None:
    with pytest.raises(Failure, match="rootfsPropagation"):
        plan(rootfs_propagation="sideways")
    with pytest.raises(Failure, match="recipe"):
        p.plan(spec(), Recipe("zfs"), cgroup_version=2)


def test_file_systems_with_a_source_are_made_on_the_host() -> None:
    disk = only(plan(Mount("/disk", "ext4", "/dev/sdb", ("ro",))), "/disk")
    memory = only(plan(Mount("/mem", "tmpfs", "tmpfs")), "/mem")
    assert isinstance(disk, p.Filesystem)
    assert isinstance(memory, p.Filesystem)
    assert (disk.on_the_host, memory.on_the_host) == (True, False)
    assert disk.options["source"] == "/dev/sdb"


def test_image_volumes() -> None:
    """Read-only whatever the options say; with the label of the container's file systems."""
    recipe = replace(RECIPE, volumes=(Volume("/v/", ("/a", "/b"), "x"),))
    made = p.plan(spec(Mount("/v", "image", "id", ("rw", "suid", "noexec")), mount_label="u:r:t:s0:c1,c2"), recipe, cgroup_version=2)
    assert only(made, "/v") == p.ImageVolume("/v", ("/a", "/b"), "x", p.IMAGE_ATTRIBUTES | m.MOUNT_ATTR_NOEXEC, None, "u:r:t:s0:c1,c2")
