"""Where this machine's control groups are: one unified hierarchy, or the hierarchies of version 1."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from shim.errors import Failure

ROOT = "/sys/fs/cgroup"
SYSTEMD = "name=systemd"


@dataclass(frozen=True, slots=True)
class Layout:
    """``controllers`` maps a controller to the directory its hierarchy is mounted at.

    Version 1 covers "hybrid" too, where cgroup2 is mounted beside the hierarchies without any controller (``unified``). Controllers
    mounted together share a directory. Hierarchies without a controller are listed by their name, ``name=systemd`` for one.
    """

    version: int
    root: str
    controllers: dict[str, str]
    unified: str = ""

    @property
    def hierarchies(self) -> tuple[str, ...]:
        """Every mount point once."""
        return tuple(dict.fromkeys(self.controllers.values())) if self.version == 1 else (self.root,)

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "root": self.root, "controllers": self.controllers, "unified": self.unified}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Layout:
        return cls(int(fields["version"]), str(fields["root"]), dict(fields["controllers"]), str(fields.get("unified", "")))


def detect(root: str = ROOT) -> Layout:
    """The layout of the mounts at and below ``root``. Raises Failure where there are none."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        layout = parse(file.read(), root)
    if layout.version == 1:
        return layout
    try:
        with open(f"{layout.root}/cgroup.controllers", encoding="ascii") as file:
            names = file.read().split()
    except OSError as error:
        raise Failure.wrap("detect cgroups", "read", error) from error
    return Layout(2, layout.root, dict.fromkeys(names, layout.root))


def parse(mountinfo: str, root: str) -> Layout:
    """The layout that a /proc/<pid>/mountinfo text describes; version 2 without its controllers, which only the kernel can list.

    Later lines win, as the later of two mounts on one directory is the one that is seen.
    """
    controllers: dict[str, str] = {}
    unified = ""
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields, tail = mount.split(" "), source.split(" ")
        if len(fields) < 6 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        point = _unescape(fields[4])
        if point != root and os.path.dirname(point) != root:
            continue
        if tail[0] == "cgroup2":
            unified = point
            continue
        for option in tail[2].split(","):
            if option.startswith("name=") or option in _V1:
                controllers[option] = point
    if unified == root:
        return Layout(2, root, {})
    if not controllers:
        raise Failure("detect cgroups", path=root, message="no cgroup file system is mounted", hint=f"mount -t cgroup2 cgroup2 {root}")
    return Layout(1, root, controllers, unified)


# Superblock options of a version 1 mount that are controllers, and not "rw", "xattr", "release_agent=…" and the like.
_V1 = frozenset(
    (
        *("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids"),
        *("hugetlb", "net_cls", "net_prio", "perf_event", "rdma", "misc", "debug"),
    )
)


def _unescape(path: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes as three octal digits."""
    if "\\" not in path:
        return path
    for code in ("\\040", "\\011", "\\012", "\\134"):
        path = path.replace(code, chr(int(code[1:], 8)))
    return path
