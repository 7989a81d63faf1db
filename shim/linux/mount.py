"""The mount API of Linux 5.2 and later, by file descriptor: nothing here resolves an untrusted path twice.

Every fd is close-on-exec. A mount made by ``open_tree(…, OPEN_TREE_CLONE)`` or ``fsmount`` is detached: it vanishes with its last fd
unless ``move_mount`` attaches it, so a crash leaks none.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

from shim.linux.libc import AT_EMPTY_PATH as AT_EMPTY_PATH
from shim.linux.libc import AT_FDCWD as AT_FDCWD
from shim.linux.libc import AT_RECURSIVE as AT_RECURSIVE
from shim.linux.libc import NR, encode, pivot_root, syscall
from shim.linux.libc import fstatfs_type as fstatfs_type

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 1, 2, 4, 8, 32, 4096, 8192, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 1, 2, 4, 8

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_ATIME, MOUNT_ATTR_RELATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_NODIRATIME = 0x70, 0, 0x10, 0x20, 0x80
MOUNT_ATTR_IDMAP, MOUNT_ATTR_NOSYMFOLLOW = 0x100000, 0x200000

OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = FSPICK_CLOEXEC = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_SET_FD, _FSCONFIG_CREATE, _FSCONFIG_RECONFIGURE = 0, 1, 5, 6, 7

PROC_SUPER_MAGIC, SYSFS_MAGIC, DEVPTS_SUPER_MAGIC, TMPFS_MAGIC = 0x9FA0, 0x62656572, 0x1CD1, 0x01021994
OVERLAYFS_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC = 0x794C7630, 0x63677270, 0x27E0EB

_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG = NR["open_tree"], NR["move_mount"], NR["fsopen"], NR["fsconfig"]
_NR_FSMOUNT, _NR_MOUNT_SETATTR = NR["fsmount"], NR["mount_setattr"]
_mount_attr = struct.Struct("=QQQQ")  # attr_set attr_clr propagation userns_fd


def open_tree(dirfd: int, path: str, flags: int = OPEN_TREE_CLONE) -> int:
    """An fd of the mount at ``path`` (empty: of ``dirfd`` itself), a detached copy with OPEN_TREE_CLONE, of all below with AT_RECURSIVE.
    A copy of a shared mount is its peer until ``mount_setattr`` says otherwise."""
    flags |= OPEN_TREE_CLOEXEC | (0 if path else AT_EMPTY_PATH)
    return syscall(_NR_OPEN_TREE, dirfd, encode(path), flags, path=path or f"fd {dirfd}")


def move_mount(source: int, target: int) -> None:
    """Attach a detached mount (or move an attached one) onto what the fd ``target`` refers to."""
    syscall(_NR_MOVE_MOUNT, source, b"", target, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def fsopen(fstype: str) -> int:
    """A file system context; the namespaces it will belong to are the caller's at this moment."""
    return syscall(_NR_FSOPEN, encode(fstype), FSOPEN_CLOEXEC, path=fstype)


def fsconfig_string(fs: int, key: str, value: str) -> None:
    """Set key=value. The kernel takes at most 255 bytes of value and says EINVAL above."""
    _fsconfig(fs, _FSCONFIG_SET_STRING, key, encode(value), 0)


def fsconfig_flag(fs: int, key: str) -> None:
    _fsconfig(fs, _FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_fd(fs: int, key: str, fd: int) -> None:
    _fsconfig(fs, _FSCONFIG_SET_FD, key, None, fd)


def fsconfig_create(fs: int) -> None:
    """Make or find the superblock."""
    _fsconfig(fs, _FSCONFIG_CREATE, None, None, 0)


def fsconfig_reconfigure(fs: int) -> None:
    """What remount does, on a context from ``fspick``."""
    _fsconfig(fs, _FSCONFIG_RECONFIGURE, None, None, 0)


def fsmount(fs: int, attributes: int = 0) -> int:
    """The detached mount of a created context."""
    try:
        return syscall(_NR_FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        raise _explained(fs, error) from None


def _fsconfig(fs: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    try:
        syscall(_NR_FSCONFIG, fs, command, None if key is None else encode(key), value, aux)
    except OSError as error:
        raise _explained(fs, error, key or "") from None


def _explained(fs: int, error: OSError, key: str = "") -> OSError:
    """The error with what the file system logged into its context, which is where the reason is ("e overlay: …")."""
    number = error.errno or 0
    lines = []
    with suppress(OSError):  # ENODATA ends the log
        for _ in range(8):
            lines.append(os.read(fs, 1024).decode(errors="replace").strip())
    text = "; ".join([os.strerror(number), *lines])
    return OSError(number, text, key) if key else OSError(number, text)


def detail(error: OSError) -> str:
    """What an error says beyond its number: for a message that is built from the number already."""
    return (error.strerror or "").removeprefix(os.strerror(error.errno or 0)).lstrip("; ")


def mount_setattr(
    fd: int, *, set: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int | None = None, recursive: bool = False
) -> None:
    """Change the mount behind ``fd``; with ``recursive`` all mounts below too, atomically. ``userns_fd`` makes it an idmapped mount."""
    if set & (MOUNT_ATTR_NOATIME | MOUNT_ATTR_STRICTATIME):
        clear |= MOUNT_ATTR_ATIME  # the access time modes are one field, and the kernel wants all of it cleared
    if userns_fd is not None:
        set |= MOUNT_ATTR_IDMAP
    data = _mount_attr.pack(set, clear, propagation, 0 if userns_fd is None else userns_fd)
    syscall(_NR_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), data, 32)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2), whose ``data`` may fill a page."""
    syscall(NR["mount"], encode(source), encode(target), encode(fstype) or None, flags, encode(data) or None, path=target)


def umount2(target: str, flags: int = 0) -> None:
    syscall(NR["umount2"], encode(target), flags, path=target)


def new_filesystem(fstype: str, options: Mapping[str, str | None] = MappingProxyType({}), attributes: int = 0) -> int:
    """A detached mount of a new file system; an option without a value is a flag, "source" is what mountinfo shows."""
    fs = fsopen(fstype)
    try:
        for key, value in options.items():
            if value is None:
                fsconfig_flag(fs, key)
            else:
                fsconfig_string(fs, key, value)
        fsconfig_create(fs)
        return fsmount(fs, attributes)
    finally:
        os.close(fs)


def new_proc() -> int:
    """A detached procfs of the caller's own PID namespace (not the one its children will get)."""
    return new_filesystem("proc", {"source": "proc"}, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)


def attach(source: int, target: str) -> None:
    """``move_mount`` onto a path that nobody else can change."""
    fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        move_mount(source, fd)
    finally:
        os.close(fd)


def bind(source: str, target: str) -> None:
    """Bind one file or directory (not what is mounted below it) over another, both by path."""
    fd = open_tree(AT_FDCWD, source)
    try:
        attach(fd, target)
    finally:
        os.close(fd)


def make_private(target: str) -> None:
    """Cut a tree of mounts off from its peers, in both directions."""
    mount("none", target, "", MS_REC | MS_PRIVATE)


def enter_root(fd: int) -> None:
    """Make the mount behind ``fd``, attached somewhere in this mount namespace, its root and drop the old root with all below it."""
    os.fchdir(fd)
    pivot_root(".", ".")  # the old root is now mounted on top of the new one, and "." still names the new one's directory
    umount2(".", MNT_DETACH)
    os.chdir("/")


def empty_root() -> None:
    """Make the root of this mount namespace, which nobody else may share, an empty read-only file system."""
    make_private("/")
    root = new_filesystem("tmpfs", {"source": "none", "size": "4k", "nr_inodes": "2", "mode": "555"}, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV)
    try:
        attach(root, "/")
        enter_root(root)
    finally:
        os.close(root)


def clone_mount(fd: int, *, recursive: bool = False) -> int:
    """A detached copy of what the fd refers to. EINVAL for a mount of another namespace, and before Linux 6.15 for a detached one."""
    return open_tree(fd, "", OPEN_TREE_CLONE | (AT_RECURSIVE if recursive else 0))


def propagation_of(fd: int) -> tuple[bool, bool]:
    """(shared, slave) of the mount behind ``fd``, from mountinfo: before any root change."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        wanted = next(line.split()[1] for line in info if line.startswith(b"mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            if line.startswith(wanted + b" "):
                optional = line.split(b" - ")[0].split()[6:]
                return any(o.startswith(b"shared:") for o in optional), any(o.startswith(b"master:") for o in optional)
    raise OSError(errno.ENOENT, "mount of another namespace")
