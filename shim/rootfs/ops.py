"""Executing a plan, in two halves.

``prepare`` runs on the host's side, in the initial user namespace: every host path becomes a detached mount, resolved once.
``attach_root``, ``attach`` and ``seal`` run in the container's own mount namespace, where no host path exists any more: they attach
those mounts, and make new file systems, onto targets that ``openat2`` found inside the root. Nothing after ``attach_root`` imports,
logs or loads anything. A crash leaves no mount behind, because none is in the host's namespace.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

from shim.errors import Failure
from shim.linux import mount as m
from shim.linux import path as paths
from shim.oci.bundle import IMAGE_VOLUME, Recipe
from shim.rootfs import copyup, devices, idmap, overlay, volumes
from shim.rootfs.lean import EMPTY
from shim.rootfs.lean import lean_namespace as lean_namespace
from shim.rootfs.lean import private_proc as private_proc
from shim.rootfs.plan import SHM, Bind, Filesystem, ImageVolume, MakeDirectory, MakeNode, Mask, Op, Readonly, Root

_PHASE = "create container"
_PROTECTED = ("/proc", "/sys", "/dev")
_VERBS: dict[type, str] = {Bind: "mount", Mask: "mask", Readonly: "make read-only", MakeNode: "mknod", MakeDirectory: "mkdir"}
_VERBS[ImageVolume] = IMAGE_VOLUME


@dataclass(slots=True)
class Spare:
    """A mount to be put in many places: the detached one goes first, copies of it (of an attached mount, so on any kernel) after."""

    fd: int
    attached: bool = False

    def take(self, target: int) -> None:
        if not self.attached:
            m.move_mount(self.fd, target)
            self.attached = True
            return
        copy = m.clone_mount(self.fd)
        m.move_mount(copy, target)
        os.close(copy)


@dataclass(slots=True)
class Prepared:
    """Detached mounts by the index of their operation, and what ``attach`` finds out on its way."""

    root: int
    mounts: dict[int, int] = field(default_factory=dict)
    directories: set[int] = field(default_factory=set)  # indexes whose source is a directory
    null: Spare | None = None
    empty: Spare | None = None
    pseudo: dict[str, tuple[int, int]] = field(default_factory=dict)  # "/proc", "/sys" → (mount fd, device number)
    late: list[int] = field(default_factory=list)  # mount fds that become read-only once everything is in place
    own: dict[str, tuple[int, frozenset[str]]] = field(default_factory=dict)  # destination → (mount fd, names that we made in it)

    def close(self, keep: int = -1) -> None:
        """Every fd but ``keep``. The mounts that are attached stay."""
        spares = [spare.fd for spare in (self.null, self.empty) if spare is not None]
        made = (fd for table in (self.pseudo, self.own) for fd, _ in table.values())
        for fd in {self.root, *self.mounts.values(), *spares, *made, *self.late} - {keep, -1}:
            os.close(fd)
        self.root, self.null, self.empty = -1, None, None
        self.mounts, self.pseudo, self.late, self.own = {}, {}, [], {}


# ---- on the host's side


def prepare(
    ops: Sequence[Op],
    recipe: Recipe,
    *,
    shm_fd: int | None = None,
    files: Mapping[str, int] = MappingProxyType({}),
    userns_fd: int | None = None,
) -> Prepared:
    """Detached mounts for everything that has a host path. ``shm_fd`` and, by source, ``files`` are detached mounts and are used up;
    ``userns_fd`` is the pod's user namespace. Raises Failure naming the source."""
    prepared = Prepared(-1)
    namespaces = idmap.Namespaces(userns_fd, next((op.mappings for op in ops if isinstance(op, Root)), None))
    try:
        for index, op in enumerate(ops):
            if isinstance(op, Bind):
                try:
                    _prepare_bind(prepared, index, op, shm_fd, files, namespaces)
                except OSError as error:
                    raise _failed("mount source", error, op.source) from None
            elif isinstance(op, Filesystem) and op.on_the_host:
                try:
                    prepared.mounts[index] = fd = m.new_filesystem(op.fstype, op.options, op.attributes & ~_late(op))
                    if op.tree:
                        devices.build(fd, op.tree)
                except OSError as error:
                    raise _failed(f"mount {op.fstype}", error, op.destination) from None
            elif isinstance(op, Mask) and not any(isinstance(o, Filesystem) and o.destination == "/dev" for o in ops):
                prepared.null = Spare(m.open_tree(m.AT_FDCWD, "/dev/null"))
                if os.fstat(prepared.null.fd).st_rdev != os.makedev(1, 3):
                    raise Failure(_PHASE, "mask", path="/dev/null", message="is not the null device")
        # Last, because with many layers on an old kernel they leave the host's mount namespace.
        for index, op in enumerate(ops):
            if isinstance(op, ImageVolume):
                prepared.mounts[index] = volumes.prepare(op, namespaces)
                prepared.directories.add(index)
        if (userns := namespaces.of_root()) is None:
            prepared.root = overlay.root_mount(recipe)
        else:
            prepared.root = overlay.root_mount(recipe, userns, namespaces.root_ids())
    except BaseException:
        prepared.close()
        raise
    finally:
        namespaces.close()
    return prepared


def _prepare_bind(
    prepared: Prepared, index: int, op: Bind, shm_fd: int | None, files: Mapping[str, int], namespaces: idmap.Namespaces
) -> None:
    if op.source == SHM:
        if shm_fd is None or shm_fd in prepared.mounts.values():
            raise Failure(_PHASE, "mount", path=op.destination, message="the pod has no shared /dev/shm, or it is mounted twice")
        prepared.mounts[index] = fd = shm_fd
        prepared.directories.add(index)
    elif op.source in files and files[op.source] not in prepared.mounts.values():
        prepared.mounts[index] = fd = files[op.source]
    else:
        if op.propagation in (m.MS_SHARED, m.MS_SLAVE):
            _require_peers(op)
        if op.device is not None:
            _require_device(op.source, op.device)
        flags = m.OPEN_TREE_CLONE | m.AT_RECURSIVE if op.recursive else m.OPEN_TREE_CLONE
        prepared.mounts[index] = fd = m.open_tree(m.AT_FDCWD, op.source, flags)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            prepared.directories.add(index)
        if op.destination == "/proc" and m.fstatfs_type(fd) != m.PROC_SUPER_MAGIC:
            raise Failure(_PHASE, "mount", path=op.source, message="only a procfs may be mounted on /proc")
    on = op.set & ~m.MOUNT_ATTR_RDONLY if op.copyup else op.set  # copy-up has to write first
    if op.recursive:
        m.mount_setattr(fd, set=op.recursive_set, clear=op.recursive_clear, propagation=op.propagation, recursive=True)
        if on or op.clear:
            m.mount_setattr(fd, set=on, clear=op.clear)
    else:
        m.mount_setattr(fd, set=on | op.recursive_set, clear=op.clear | op.recursive_clear, propagation=op.propagation)
    if op.mappings is not None:
        userns = namespaces.of(op.mappings)
        try:
            m.mount_setattr(fd, userns_fd=userns, recursive=op.mappings_recursive)
        except OSError as error:
            raise Failure(_PHASE, "idmap", errno=error.errno, path=op.source, hint="its file system must support idmapped mounts") from None


def _require_device(source: str, device: tuple[int, int]) -> None:
    """A name in the container need not be the device's name on the host, and must not bring in whatever else has that name there."""
    status = os.stat(source)
    if (stat.S_IFMT(status.st_mode), status.st_rdev) != device:
        raise Failure(_PHASE, "device", path=source, message="is another device, or none, on the host and cannot be bound")


def _require_peers(op: Bind) -> None:
    """Propagation from or to a mount that has no peers would be silently none at all: the kubelet's user expects an error."""
    source = os.open(op.source, os.O_PATH | os.O_CLOEXEC)
    try:
        shared, slave = m.propagation_of(source)
    finally:
        os.close(source)
    if op.propagation == m.MS_SHARED and not shared:
        hint = "run mount --make-rshared on the mount that the source is on"
        raise Failure(_PHASE, "mount", path=op.source, message="is not on a shared mount", hint=hint)
    if op.propagation == m.MS_SLAVE and not (shared or slave):
        raise Failure(_PHASE, "mount", path=op.source, message="is neither on a shared nor on a slave mount")


# ---- in the container's mount namespace


def make_visible(ops: Sequence[Op], prepared: Prepared, *, proc_fd: int | None = None) -> None:
    """Make the file systems that a user namespace may have only where such a one can be seen, which the root change ends: before it, in
    all of the container's namespaces. ``proc_fd`` as for ``attach``."""
    for index, op in enumerate(ops):
        if not isinstance(op, Filesystem) or not op.must_be_visible or index in prepared.mounts:
            continue
        if op.fstype != "proc" or proc_fd is None:
            try:
                prepared.mounts[index] = m.new_filesystem(op.fstype, op.options, op.attributes)
            except OSError as error:
                raise _failed(_verb(op), error, op.destination) from None


def attach_root(prepared: Prepared) -> int:
    """Make the prepared root the root of this mount namespace and drop everything else in it. The fd stays ``prepared``'s."""
    try:
        prepared.empty = Spare(_empty_directory())
        m.attach(prepared.root, "/")
        m.enter_root(prepared.root)
    except OSError as error:
        raise Failure.wrap(_PHASE, "pivot_root", error, "/") from None
    return prepared.root


def _empty_directory() -> int:
    """What masked directories show: the lean namespace's empty directory, which costs no file system of its own."""
    try:
        fd = m.open_tree(m.AT_FDCWD, EMPTY)
    except FileNotFoundError:
        return m.new_filesystem("tmpfs", {"source": "none", "size": "4k", "nr_inodes": "1", "mode": "555"}, m.MOUNT_ATTR_RDONLY)
    m.mount_setattr(fd, set=m.MOUNT_ATTR_RDONLY | m.MOUNT_ATTR_NOSUID | m.MOUNT_ATTR_NODEV | m.MOUNT_ATTR_NOEXEC)
    return fd


def attach(ops: Sequence[Op], prepared: Prepared, rootfd: int, *, proc_fd: int | None = None) -> None:
    """Everything of the plan, in its order. Runs in all of the container's namespaces; for "proc" as a process of its PID namespace,
    unless ``proc_fd`` is a detached procfs of it. Raises Failure naming the destination."""
    for index, op in enumerate(ops):
        where = getattr(op, "destination", "")
        try:
            if isinstance(op, (Bind, ImageVolume)):
                _attach_bind(prepared, rootfd, index, op)
            elif isinstance(op, Filesystem):
                _attach_filesystem(prepared, rootfd, index, op, proc_fd)
            elif isinstance(op, Mask):
                for where in op.paths:
                    _mask(prepared, rootfd, where)
            elif isinstance(op, Readonly):
                for where in op.paths:
                    _readonly(prepared, rootfd, where)
            elif isinstance(op, MakeNode):
                _make_node(rootfd, op)
            elif isinstance(op, MakeDirectory):
                os.close(paths.mkdir_all_in_root(rootfd, where))
        except OSError as error:
            raise _failed(_verb(op), error, where) from None


def seal(ops: Sequence[Op], prepared: Prepared, rootfd: int) -> None:
    """Last: verify that /proc and /sys are what was mounted there, make read-only what has to be, close every fd but ``rootfd``'s."""
    for where, (_, device) in prepared.pseudo.items():
        fd = paths.open_in_root(rootfd, where, resolve=paths.RESOLVE_NO_SYMLINKS)
        if os.fstat(fd).st_dev != device:
            raise Failure(_PHASE, "verify", path=where, message="something else was mounted over it")
        os.close(fd)
    for fd in prepared.late:
        m.mount_setattr(fd, set=m.MOUNT_ATTR_RDONLY)
    for op in ops:
        if isinstance(op, Root) and (op.readonly or op.propagation):
            m.mount_setattr(rootfd, set=m.MOUNT_ATTR_RDONLY if op.readonly else 0, propagation=op.propagation)
    prepared.close(keep=rootfd)


def _failed(operation: str, error: OSError, path: str) -> Failure:
    return Failure(_PHASE, operation, errno=error.errno, path=path, message=m.detail(error))


def _verb(op: Op) -> str:
    if isinstance(op, Filesystem):
        return f"mount {op.fstype}"
    return _VERBS.get(type(op), "root")


def _attach_bind(prepared: Prepared, rootfd: int, index: int, op: Bind | ImageVolume) -> None:
    fd = prepared.mounts.pop(index)
    directory = index in prepared.directories
    target = _target(prepared, rootfd, op.destination, directory=directory)
    if isinstance(op, Bind) and op.copyup and directory:
        copyup.copy_into_empty(target, fd)
        if op.set & m.MOUNT_ATTR_RDONLY:
            m.mount_setattr(fd, set=m.MOUNT_ATTR_RDONLY)
    m.move_mount(fd, target)
    os.close(target)
    if op.destination == "/sys" or op.destination == "/proc":
        prepared.pseudo[op.destination] = fd, os.fstat(fd).st_dev
    else:
        os.close(fd)


def _attach_filesystem(prepared: Prepared, rootfd: int, index: int, op: Filesystem, proc_fd: int | None) -> None:
    late = _late(op)
    attributes = op.attributes & ~late
    if index in prepared.mounts:
        fd = prepared.mounts.pop(index)
    elif op.fstype == "proc" and proc_fd is not None:
        fd = os.dup(proc_fd)
        m.mount_setattr(fd, set=attributes)
    else:
        fd = m.new_filesystem(op.fstype, op.options, attributes)
    if op.tree and not op.on_the_host:
        devices.build(fd, op.tree)
    target = _target(prepared, rootfd, op.destination, directory=True)
    if op.copyup:
        copyup.copy_into_empty(target, fd)
    m.move_mount(fd, target)
    os.close(target)
    if op.propagation:
        m.mount_setattr(fd, propagation=op.propagation)
    if late:
        prepared.late.append(fd)
    if op.fstype in ("proc", "sysfs"):
        prepared.pseudo[op.destination] = fd, os.fstat(fd).st_dev
    elif op.tree:
        prepared.own[op.destination] = fd, frozenset(node.path for node in op.tree if node.kind != stat.S_IFLNK)
    elif not late:
        os.close(fd)


def _late(op: Filesystem) -> int:
    """The read-only attribute of a tmpfs, which first gets mount points and the like."""
    return op.attributes & m.MOUNT_ATTR_RDONLY if op.fstype == "tmpfs" else 0


def _target(prepared: Prepared, rootfd: int, destination: str, *, directory: bool) -> int:
    """An O_PATH fd to mount on, made if missing."""
    if destination in _PROTECTED:
        return _protected_target(rootfd, destination[1:])
    parent, _, name = destination.rpartition("/")
    if parent in prepared.own and name in prepared.own[parent][1]:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=prepared.own[parent][0])
    try:
        fd = paths.mkdir_all_in_root(rootfd, destination) if directory else paths.create_file_in_root(rootfd, destination)
    except NotADirectoryError:
        raise Failure(_PHASE, "mount", path=destination, message="the way there leads over something that is not a directory") from None
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode) and not directory:
        os.close(fd)
        raise Failure(_PHASE, "mount", path=destination, message="the source is a file and the destination in the image a directory")
    for where, (_, device) in prepared.pseudo.items():
        # A symlink in the image or a volume that leads into /proc or /sys (CVE-2023-27561, CVE-2019-19921).
        if status.st_dev == device and not destination.startswith(where + "/"):
            os.close(fd)
            raise Failure(_PHASE, "mount", path=destination, message=f"leads into {where}")
    return fd


def _protected_target(rootfd: int, name: str) -> int:
    """/proc, /sys and /dev: made if missing, refused if the image has a symlink there (CVE-2019-19921, CVE-2026-41579)."""
    try:
        try:
            return paths.open_beneath(rootfd, name, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=rootfd)
            return paths.open_beneath(rootfd, name, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise Failure(_PHASE, "mount", path=f"/{name}", message="the image has something other than a directory there") from None


def _locate(prepared: Prepared, rootfd: int, path: str) -> int | None:
    """An O_PATH fd for masking; None if there is nothing. Below /proc and /sys, in the very mounts that were made, whatever a raced
    volume put over their names."""
    try:
        for where, (fd, _) in prepared.pseudo.items():
            if path.startswith(where + "/"):
                return paths.open_in_root(fd, path[len(where) + 1 :])
        return paths.open_in_root(rootfd, path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _mask(prepared: Prepared, rootfd: int, path: str) -> None:
    target = _locate(prepared, rootfd, path)
    if target is None:
        return
    spare = prepared.empty if stat.S_ISDIR(os.fstat(target).st_mode) else prepared.null or _our_null(prepared)
    if spare is None:
        raise Failure(_PHASE, "mask", path=path, message="nothing to mask it with")
    spare.take(target)
    os.close(target)


def _our_null(prepared: Prepared) -> Spare:
    """The null device in the /dev that we made, never what the image may have under that name (CVE-2025-31133)."""
    fd = os.open("null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=prepared.own["/dev"][0])
    prepared.null = Spare(fd, attached=True)
    if os.fstat(fd).st_rdev != os.makedev(1, 3):
        raise Failure(_PHASE, "mask", path="/dev/null", message="is not the null device")
    return prepared.null


def _readonly(prepared: Prepared, rootfd: int, path: str) -> None:
    target = _locate(prepared, rootfd, path)
    if target is None:
        return
    copy = m.clone_mount(target, recursive=True)
    m.mount_setattr(copy, set=m.MOUNT_ATTR_RDONLY, recursive=True)
    m.move_mount(copy, target)
    os.close(copy)
    os.close(target)


def _make_node(rootfd: int, op: MakeNode) -> None:
    directory = paths.mkdir_all_in_root(rootfd, op.destination.rpartition("/")[0] or "/")
    try:
        with suppress(FileNotFoundError):
            os.unlink(op.node.path, dir_fd=directory)
        devices.build(directory, (op.node,))
    finally:
        os.close(directory)
