"""Where the control groups of containers and pods are, as directories."""

from __future__ import annotations

import posixpath

from shim.cgroups.group import Group
from shim.cgroups.layout import Layout


def of(layout: Layout, cgroups_path: str) -> Group:
    """The group that ``Linux.cgroups_path`` of a spec names, whichever driver wrote it."""
    path = expand(cgroups_path)
    if layout.version == 2:
        return Group(2, path, {"": layout.root + path})
    # Named hierarchies have no controller and thus nothing to read.
    return Group(1, path, {name: top + path for name, top in layout.controllers.items() if not name.startswith("name=")})


def parent(layout: Layout, cgroup_parent: str) -> Group:
    """A pod's own group from ``PodSandboxConfig.linux.cgroup_parent``; for the systemd driver only the slice's name in it counts."""
    name = posixpath.basename(cgroup_parent.rstrip("/"))
    return of(layout, slice_path(name) if name.endswith(".slice") else posixpath.normpath("/" + cgroup_parent.strip("/")))


def expand(cgroups_path: str) -> str:
    """``slice:prefix:name``, the systemd driver's form, as the path that systemd makes of it; other paths as they are."""
    if cgroups_path.count(":") != 2 or "/" in cgroups_path:
        return cgroups_path
    slice_name, prefix, name = cgroups_path.split(":")
    return f"{slice_path(slice_name or 'system.slice')}/{prefix}-{name}.scope"


def slice_path(name: str) -> str:
    """systemd.slice(5): ``a-b.slice`` lies in ``a.slice``; the root slice is ``-.slice``."""
    if name == "-.slice":
        return ""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))
