"""Where the control groups of containers and pods are, as directories."""

from __future__ import annotations

import posixpath

from shim.cgroups.group import Group
from shim.cgroups.layout import Layout
from shim.cgroups.names import expand, slice_path


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
