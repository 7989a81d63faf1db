"""What died with an earlier supervisor in the middle of its creation, found again by what its directory says it wanted.

Its stage1 died with that supervisor (``launch.die_with_supervisor``), so all it can have left is a cgroup with processes nobody knows:
a container's init that found nobody to tell, or the PID 1 of a pod.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from shim import cgroups
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci import bundle as bundles
from shim.supervisor.table import Core, forget


async def release(core: Core, kind: str, name: str, otherwise: str = "") -> None:
    """Kill and remove the cgroup of the unknown pod or container ``name`` (``kind``: "pods", "containers"), if it has a directory that
    tells, or the one at the cgroups path ``otherwise``."""
    try:
        directory = os.open(f"{kind}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=core.state)
    except FileNotFoundError:
        if otherwise:
            await core.children.call(Leftovers(core.context.layout, kind, None, otherwise), "delete leftovers")
        return
    try:
        await core.children.call(Leftovers(core.context.layout, kind, directory, otherwise), "delete leftovers")
        forget(directory)
    finally:
        os.close(directory)


class Leftovers:
    """A job: find the cgroup that a directory names, kill what is in it and remove it."""

    def __init__(self, layout: Layout, kind: str, directory: int | None, otherwise: str) -> None:
        self._layout, self._kind, self._directory, self._otherwise = layout, kind, directory, otherwise
        self.keep = () if directory is None else (directory,)

    def __call__(self, channel: Any) -> None:
        where = self._otherwise
        try:
            if self._directory is not None and self._kind == "pods":
                where = bundles.load_sandbox(self._directory).cgroups_path
            elif self._directory is not None:
                where = bundles.load_spec(self._directory).linux.cgroups_path
        except Failure as failure:
            if failure.errno != errno.ENOENT and failure.phase != "decode":  # torn: its writer died before anybody read it
                raise
        if where:
            group = cgroups.group_at(self._layout, where)
            cgroups.kill(group)
            cgroups.remove(group)
        channel.send({"ok": {}})
