"""/dev of a container: the nodes and links that config-linux.md asks for, as data."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from shim.errors import Failure
from shim.oci.spec import Device

_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


@dataclass(frozen=True, slots=True)
class Node:
    """An entry of a file system that is new and not yet visible anywhere. ``path`` is relative, without symlinks or ".."."""

    path: str
    kind: int  # stat.S_IF…
    mode: int = 0o755
    device: int = 0
    target: str = ""  # of a symlink
    uid: int = 0
    gid: int = 0


DEFAULT = (
    Device("/dev/null", "c", 1, 3, 0o666),
    Device("/dev/zero", "c", 1, 5, 0o666),
    Device("/dev/full", "c", 1, 7, 0o666),
    Device("/dev/random", "c", 1, 8, 0o666),
    Device("/dev/urandom", "c", 1, 9, 0o666),
    Device("/dev/tty", "c", 5, 0, 0o666),
)
LINKS = (
    Node("fd", stat.S_IFLNK, target="/proc/self/fd"),
    Node("stdin", stat.S_IFLNK, target="/proc/self/fd/0"),
    Node("stdout", stat.S_IFLNK, target="/proc/self/fd/1"),
    Node("stderr", stat.S_IFLNK, target="/proc/self/fd/2"),
    Node("ptmx", stat.S_IFLNK, target="pts/ptmx"),
)
_DEFAULT_NODES = tuple(Node(d.path[5:], stat.S_IFCHR, 0o666, os.makedev(d.major, d.minor)) for d in DEFAULT)


def node(device: Device, path: str) -> Node:
    """The entry for a device of the specification. Raises Failure for a type that does not exist."""
    kind = _KINDS.get(device.type)
    if kind is None:
        raise Failure("plan root", "device", path=device.path, message=f"unknown device type {device.type!r}")
    mode = 0o666 if device.file_mode is None else device.file_mode & 0o7777
    number = 0 if device.type == "p" else os.makedev(device.major, device.minor)
    return Node(path, kind, mode, number, "", device.uid or 0, device.gid or 0)


@lru_cache(maxsize=64)
def dev_tree(devices: tuple[Device, ...], directories: tuple[str, ...]) -> tuple[Node, ...]:
    """Everything in /dev: mount points, default nodes, links, and the devices of the specification, which win over both.

    ``directories`` and ``Device.path`` are absolute and below /dev.
    """
    entries: dict[str, Node] = {}
    for directory in directories:
        _parents(entries, directory[5:])
        entries.setdefault(directory[5:], Node(directory[5:], stat.S_IFDIR))
    for default in _DEFAULT_NODES:
        entries[default.path] = default
    for link in LINKS:
        entries[link.path] = link
    for device in devices:
        name = device.path[5:]
        if name in ("", "pts", "shm", "mqueue", "fd") or name.startswith("pts/"):
            raise Failure("plan root", "device", path=device.path, message="this name in /dev is taken")
        _parents(entries, name)
        entries[name] = node(device, name)
    return tuple(entries.values())


def _parents(entries: dict[str, Node], name: str) -> None:
    parts = name.split("/")[:-1]
    for index in range(1, len(parts) + 1):
        parent = "/".join(parts[:index])
        entries.setdefault(parent, Node(parent, stat.S_IFDIR))


def build(root: int, tree: Iterable[Node]) -> None:
    """Make the entries below the fd of a file system that nobody else sees yet: no name in it can be a symlink that is not ours."""
    before = os.umask(0)
    try:
        for entry in tree:
            if entry.kind == stat.S_IFLNK:
                os.symlink(entry.target, entry.path, dir_fd=root)
            elif entry.kind == stat.S_IFDIR:
                os.mkdir(entry.path, entry.mode, dir_fd=root)
            else:
                os.mknod(entry.path, entry.kind | entry.mode, entry.device, dir_fd=root)
            if entry.uid or entry.gid:
                os.chown(entry.path, entry.uid, entry.gid, dir_fd=root, follow_symlinks=False)
    except OSError as error:
        raise Failure.wrap("create container", "mknod", error, entry.path) from None
    finally:
        os.umask(before)
