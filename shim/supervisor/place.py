"""The supervisor's own cgroup, which stdio and helpers inherit: their use is accounted apart from the daemon's and the pods'."""

from __future__ import annotations

import os

from shim.cgroups import manager
from shim.cgroups.group import checked_path, read, write
from shim.cgroups.layout import Layout
from shim.cgroups.names import is_scope
from shim.errors import Failure


def enter(layout: Layout, path: str) -> None:
    """Make the group where it is missing and move this process into it, in every hierarchy. Raises Failure."""
    if is_scope(path):
        manager.enter(layout, path)
        return
    path = checked_path(path)
    for mount in layout.hierarchies:
        directory = mount + path
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
            if mount == layout.controllers.get("cpuset") and layout.version == 1:
                _inherit_cpuset(mount, path)
            write(f"{directory}/cgroup.procs", "0")
        except OSError as error:
            raise Failure.wrap("start supervisor", "enter cgroup", error, directory) from error


def _inherit_cpuset(mount: str, path: str) -> None:
    """A new v1 cpuset is empty and takes no process until it has CPUs and memory nodes."""
    directory = mount
    for name in path.strip("/").split("/"):
        parent, directory = directory, f"{directory}/{name}"
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not read(f"{directory}/{file}").strip():
                write(f"{directory}/{file}", read(f"{parent}/{file}").strip())
