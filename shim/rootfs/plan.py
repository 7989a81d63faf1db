"""PURE: what has to be mounted and made for a container's root, as an ordered list of frozen operations.

Nothing here looks at the machine. ``ops`` executes the list: host paths become detached mounts first, everything is attached later.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

from shim.errors import Failure
from shim.linux import mount as m
from shim.oci.bundle import Recipe
from shim.oci.spec import Device, IDMapping, Linux, Mount, NamespaceType, Process, Spec
from shim.oci.spec import Root as SpecRoot
from shim.rootfs import devices
from shim.rootfs.devices import Node
from shim.rootfs.idmap import host_id, root_ids
from shim.rootfs.options import PROPAGATION, Options, parse

SHM = "pod:shm"  # source of the pod's shared /dev/shm, which arrives as an fd
Mappings: TypeAlias = "tuple[tuple[IDMapping, ...], tuple[IDMapping, ...]]"  # (uids, gids)


@dataclass(frozen=True, slots=True)
class Root:
    """The root itself. ``propagation`` is MS_… of the root mount only: each mount below has what its own options say."""

    mappings: Mappings | None = None
    readonly: bool = False
    propagation: int = 0


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A new file system, made in the container's namespaces. ``tree`` is built in it before anyone can see it."""

    destination: str
    fstype: str
    options: Mapping[str, str | None] = field(default_factory=dict)
    attributes: int = 0
    tree: tuple[Node, ...] = ()
    copyup: bool = False
    propagation: int = 0
    outside: bool = False  # made in the initial user namespace, where device nodes may be made; the ids in it are the host's

    @property
    def on_the_host(self) -> bool:
        """Whether it has to be made before the root changes: also if its source is a device or a server."""
        return self.outside or self.fstype not in _NAMESPACED

    @property
    def must_be_visible(self) -> bool:
        """In a user namespace the kernel makes these only where the mount namespace shows one already (mount_too_revealing)."""
        return self.fstype in ("proc", "sysfs") and not self.outside


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host."""

    destination: str
    source: str
    recursive: bool = True
    set: int = 0  # attributes of the top mount
    clear: int = 0
    recursive_set: int = 0  # of every mount in the tree
    recursive_clear: int = 0
    propagation: int = m.MS_PRIVATE  # always of the whole tree
    mappings: Mappings | None = None
    mappings_recursive: bool = False
    copyup: bool = False
    device: tuple[int, int] | None = None  # (S_IF…, number) that the source must be, where it stands for a node of the specification


@dataclass(frozen=True, slots=True)
class ImageVolume:
    """An image, or a directory in it, read-only. ``lower`` and ``sub_path`` as in ``bundle.Volume``."""

    destination: str
    lower: tuple[str, ...]
    sub_path: str
    attributes: int
    mappings: Mappings | None = None
    label: str = ""  # SELinux; for it the layers must be two at least, as a bind has none of its own


@dataclass(frozen=True, slots=True)
class MakeNode:
    """A device outside /dev."""

    destination: str
    node: Node


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    destination: str


@dataclass(frozen=True, slots=True)
class Mask:
    """Paths that must not be readable; those that do not exist are skipped."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Readonly:
    """Paths that, with everything mounted below, must not be writable; those that do not exist are skipped."""

    paths: tuple[str, ...]


Op: TypeAlias = "Root | Filesystem | Bind | ImageVolume | MakeNode | MakeDirectory | Mask | Readonly"

# File systems without a source, several of them tied to a namespace of the process that makes them.
_NAMESPACED = frozenset(("bpf", "cgroup2", "devpts", "hugetlbfs", "mqueue", "proc", "ramfs", "sysfs", "tmpfs"))
_DEFAULT_DEV = Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k"))
_CGROUP_ROOT = "/sys/fs/cgroup"
# The files below /proc that may be replaced by a bind mount, as runc allows for lxcfs. Anything else there would let a writer of the
# runtime's or the user's land in a fake file (CVE-2019-16884).
_PROC_FILES = frozenset(
    f"/proc/{name}"
    for name in ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "sys/crypto/fips_enabled", "uptime")
)
# Nothing of an image volume may be written, and its files are data: no setuid bits, no devices. Programs may be run from it.
IMAGE_ATTRIBUTES = m.MOUNT_ATTR_RDONLY | m.MOUNT_ATTR_NOSUID | m.MOUNT_ATTR_NODEV
_ALLOWED_ON = {"/proc": ("proc",), "/sys": ("sysfs", "tmpfs"), "/dev": ("tmpfs", "devtmpfs")}


def plan(
    spec: Spec,
    recipe: Recipe,
    *,
    cgroup_version: int,
    cgroup_paths: Mapping[str, str] = MappingProxyType({}),
    mknod: bool = True,
) -> tuple[Op, ...]:
    """The operations, in order. ``cgroup_paths``: the container's directories by controller (version 1). Without ``mknod`` device nodes
    are bound from the host. With a user namespace /dev is made outside of it, where mknod works.
    Raises Failure naming the mount that cannot be."""
    if recipe.type not in ("overlay", "bind"):
        raise Failure("plan root", message=f"unknown recipe type {recipe.type!r}")
    linux = spec.linux
    userns = spec.namespace(NamespaceType.USER) is not None
    builder = _Builder(spec, recipe, userns, mknod, cgroup_version, cgroup_paths)
    mappings = (linux.uid_mappings, linux.gid_mappings) if userns and linux.uid_mappings else None
    propagation = PROPAGATION.get(linux.rootfs_propagation or "private")
    if propagation is None:
        raise Failure("plan root", message=f"unknown rootfsPropagation {linux.rootfs_propagation!r}")
    builder.ops.append(Root(mappings, spec.root.readonly, propagation[0] if linux.rootfs_propagation else 0))
    for mount in builder.mounts:
        builder.add(mount)
    if builder.own_dev:
        builder.other_devices()
    if linux.masked_paths:
        builder.ops.append(Mask(tuple(normal(path, "maskedPaths") for path in linux.masked_paths)))
    if linux.readonly_paths:
        builder.ops.append(Readonly(tuple(normal(path, "readonlyPaths") for path in linux.readonly_paths)))
    cwd = spec.process.cwd or "/"
    if cwd != "/":
        builder.ops.append(MakeDirectory(cwd))
    return tuple(builder.ops)


def normal(path: str, what: str) -> str:
    """Absolute, single slashes, no "." and no "..": a destination is a name, not a walk."""
    if not path.startswith("/"):
        raise Failure("plan root", what, path=path, message="is not absolute")
    if "//" in path or "/." in path or path.endswith("/"):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise Failure("plan root", what, path=path, message="has '..' in it")
        return "/" + "/".join(parts)
    return path


def warm() -> None:
    """Plan a usual container a few times: forked children then find the bytecode specialised and the caches filled."""
    nse = ("nosuid", "noexec", "nodev")
    private = [("rbind", "rprivate", mode) for mode in ("rw", "ro")]
    mounts = (
        Mount("/proc", "proc", "proc", nse),
        Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        Mount("/dev/mqueue", "mqueue", "mqueue", nse),
        Mount("/sys", "sysfs", "sysfs", (*nse, "ro")),
        Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*nse, "relatime", "ro")),
        Mount("/dev/shm", "bind", SHM, ("rbind",)),
        *(Mount(f"/bound{i}", "bind", "/x", options) for i, options in enumerate([*private, ("rbind", "rprivate"), ("rbind", "rslave")])),
    )
    linux = Linux(masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",))
    spec = Spec("1.2.0", SpecRoot("rootfs"), Process(("x",)), mounts=mounts, linux=linux)
    for version in (1, 2) * 10:
        plan(spec, Recipe("overlay", ("/l",), "/u", "/w"), cgroup_version=version, cgroup_paths={"cpu": f"{_CGROUP_ROOT}/cpu/x"})


class _Builder:
    """One plan in the making."""

    def __init__(
        self, spec: Spec, recipe: Recipe, userns: bool, mknod: bool, cgroup_version: int, cgroup_paths: Mapping[str, str]
    ) -> None:
        self.spec, self.userns, self.mknod = spec, userns, mknod
        self.volumes = {normal(volume.destination, "image volume"): volume for volume in recipe.volumes}
        self.cgroup_version, self.cgroup_paths = cgroup_version, cgroup_paths
        self.ops: list[Op] = []
        self.mounts = [(normal(mount.destination, "mount"), mount, parse(mount.options)) for mount in spec.mounts]
        dev = next((entry for entry in self.mounts if entry[0] == "/dev"), None)
        if dev is None:  # the image's /dev is never used: it may be a symlink or hold anything (CVE-2026-41579)
            self.mounts.insert(0, ("/dev", _DEFAULT_DEV, parse(_DEFAULT_DEV.options)))
        self.own_dev = dev is None or not _is_bind(dev[1], dev[2])

    def add(self, entry: tuple[str, Mount, Options]) -> None:
        destination, mount, options = entry
        if destination == "/":
            raise Failure("plan root", "mount", path=destination, message="nothing may be mounted over the root")
        if _is_bind(mount, options):
            self.ops.append(self._bind(destination, mount, options))
        elif mount.type == "image":
            self.ops.append(self._image(destination, mount, options))
        elif mount.type == "cgroup" or mount.type == "cgroup2":
            self._cgroup(destination, options)
        else:
            self._filesystem(destination, mount, options)

    def _bind(self, destination: str, mount: Mount, options: Options) -> Bind:
        if options.data:
            raise Failure("plan root", "mount", path=destination, message=f"a bind mount has no option {next(iter(options.data))!r}")
        if not mount.source:
            raise Failure("plan root", "mount", path=destination, message="a bind mount needs a source")
        if destination.startswith("/proc/") and destination not in _PROC_FILES:
            raise Failure("plan root", "mount", path=destination, message="this place below /proc may not be mounted over")
        mappings = _mappings(mount)
        if mappings is None and options.idmap:
            mappings = (self.spec.linux.uid_mappings, self.spec.linux.gid_mappings)
        return Bind(
            destination,
            mount.source,
            options.recursive,
            options.set,
            options.clear,
            options.recursive_set,
            options.recursive_clear,
            options.propagation or m.MS_PRIVATE,
            mappings,
            options.idmap_recursive,
            options.copyup,
        )

    def _image(self, destination: str, mount: Mount, options: Options) -> ImageVolume:
        volume = self.volumes.get(destination)
        if volume is None or not volume.lower:
            raise Failure("plan root", "mount", path=destination, message="the recipe has no image for it")
        if destination in _ALLOWED_ON or destination.startswith("/proc/"):
            raise Failure("plan root", "mount", path=destination, message="this place may not show an image")
        attributes, label = options.set | options.recursive_set | IMAGE_ATTRIBUTES, self.spec.linux.mount_label
        return ImageVolume(destination, volume.lower, volume.sub_path, attributes, _mappings(mount), label)

    def _filesystem(self, destination: str, mount: Mount, options: Options) -> None:
        kind = mount.type
        if not kind:
            raise Failure("plan root", "mount", path=destination, message="neither a type nor a bind option")
        if destination.startswith("/proc/"):
            raise Failure("plan root", "mount", path=destination, message="this place below /proc may not be mounted over")
        if kind not in _ALLOWED_ON.get(destination, (kind,)):
            raise Failure("plan root", "mount", path=destination, message=f"may not be a {kind}")
        if self.userns and self._of_the_host(kind):
            # Not from within the pod's user namespace; outside, before the other namespaces are joined. Anew and not bound, so that nothing
            # comes along that the host has mounted below (its cgroups, debugfs).
            self.ops.append(Filesystem(destination, kind, {"source": kind}, options.set | m.MOUNT_ATTR_RDONLY, outside=True))
            return
        data = {"source": mount.source or kind, **options.data}
        if kind == "devpts" and self.userns and not _maps(self.spec.linux, data.get("gid")):
            data.pop("gid", None)  # an id without a mapping is EINVAL
        if self.spec.linux.mount_label and kind in ("tmpfs", "devpts"):  # mqueue is one superblock for the whole pod
            data.setdefault("context", self.spec.linux.mount_label)
        tree: tuple[Node, ...] = ()
        outside = False
        if destination == "/dev":
            tree = self._dev_tree()
            if self.userns and kind == "tmpfs":
                outside, tree = True, tuple(self._outside(tree))
                uid, gid = root_ids((self.spec.linux.uid_mappings, self.spec.linux.gid_mappings))
                data |= {"uid": str(uid), "gid": str(gid)}
        copyup, attributes = options.copyup and kind == "tmpfs", options.set | options.recursive_set
        self.ops.append(Filesystem(destination, kind, data, attributes, tree, copyup, options.propagation, outside))
        if tree and not self.mknod:
            self._bound_devices()

    def _of_the_host(self, kind: str) -> bool:
        """Whether the file system is tied to a namespace that is the host's here."""
        namespace = {"sysfs": NamespaceType.NETWORK, "mqueue": NamespaceType.IPC}.get(kind)
        return namespace is not None and self.spec.namespace(namespace) is None

    def _own_devices(self) -> tuple[Device, ...]:
        return tuple(device for device in self.spec.linux.devices if normal(device.path, "device").startswith("/dev/"))

    def _dev_tree(self) -> tuple[Node, ...]:
        points = [d for d, mount, options in self.mounts if d.startswith("/dev/") and mount.type != "bind" and not options.bind]
        if any(mount.source == SHM for _, mount, _ in self.mounts):
            points.append("/dev/shm")
        tree = devices.dev_tree(self._own_devices(), tuple(points))
        if self.mknod:
            return tree
        return tuple(Node(n.path, stat.S_IFREG, 0o666) if _is_device(n) else n for n in tree)

    def _outside(self, tree: tuple[Node, ...]) -> Iterator[Node]:
        """The entries with the ids that they have outside of the user namespace. Devices of the specification keep the host's: root inside,
        even privileged, may use those only that everybody on the host may."""
        linux = self.spec.linux
        given = {normal(device.path, "device")[5:] for device in self._own_devices()}
        for node in tree:
            if node.path in given:
                yield node
                continue
            uid, gid = host_id(linux.uid_mappings, node.uid), host_id(linux.gid_mappings, node.gid)
            yield replace(node, uid=node.uid if uid is None else uid, gid=node.gid if gid is None else gid)

    def _bound_devices(self) -> None:
        nodes = devices.dev_tree(self._own_devices(), ())
        for node in nodes:
            if _is_device(node):
                self.ops.append(_bound_device(f"/dev/{node.path}", node))

    def other_devices(self) -> None:
        """Devices of the specification that are not in /dev."""
        for device in self.spec.linux.devices:
            path = normal(device.path, "device")
            if path.startswith("/dev/"):
                continue
            node = devices.node(device, path.rpartition("/")[2])
            if self.mknod and not self.userns:
                self.ops.append(MakeNode(path, node))
            else:
                self.ops.append(_bound_device(path, node))

    def _cgroup(self, destination: str, options: Options) -> None:
        """The container's own view of its control groups: read-only unless the specification says rw (CVE-2023-25809)."""
        attributes = options.set if options.clear & m.MOUNT_ATTR_RDONLY else options.set | m.MOUNT_ATTR_RDONLY
        if self.cgroup_version == 2:
            self.ops.append(Filesystem(destination, "cgroup2", {"source": "cgroup"}, attributes))
            return
        tree, binds = _cgroup1_view(destination, self.cgroup_paths, attributes)
        data: dict[str, str | None] = {"source": "cgroup", "mode": "755", "size": "64k"}
        self.ops.append(Filesystem(destination, "tmpfs", data, attributes, tree))
        self.ops.extend(binds)


def _cgroup1_view(destination: str, paths: Mapping[str, str], attributes: int) -> tuple[tuple[Node, ...], list[Bind]]:
    """A directory per hierarchy, named as the host mounts it, with the container's group on it; a link for every other name."""
    tree: dict[str, Node] = {}
    binds: list[Bind] = []
    links: dict[str, str] = {}
    for controller, path in paths.items():
        alias = controller.removeprefix("name=")
        name = path[len(_CGROUP_ROOT) + 1 :].partition("/")[0] if path.startswith(_CGROUP_ROOT + "/") else alias
        if name not in tree:
            tree[name] = Node(name, stat.S_IFDIR)
            binds.append(Bind(f"{destination}/{name}", path, False, attributes))
        links[alias] = name
    for alias, name in links.items():
        if alias and "/" not in alias and alias not in tree:
            tree[alias] = Node(alias, stat.S_IFLNK, target=name)
    return tuple(tree.values()), binds


def _mappings(mount: Mount) -> Mappings | None:
    return (mount.uid_mappings, mount.gid_mappings) if mount.uid_mappings or mount.gid_mappings else None


def _is_bind(mount: Mount, options: Options) -> bool:
    return options.bind or mount.type == "bind" or mount.source == SHM


def _bound_device(path: str, node: Node) -> Bind:
    return Bind(path, path, False, set=m.MOUNT_ATTR_NOSUID | m.MOUNT_ATTR_NOEXEC, device=(node.kind, node.device))


def _is_device(node: Node) -> bool:
    return node.kind in (stat.S_IFCHR, stat.S_IFBLK)


def _maps(linux: Linux, gid: str | None) -> bool:
    if gid is None or not gid.isdigit():
        return False
    return any(r.container_id <= int(gid) < r.container_id + r.size for r in linux.gid_mappings)
