"""Where a container's or pod's cgroup is."""

from __future__ import annotations

import posixpath

from cri.errors import InvalidArgument
from cri.spec import strings
from shim.cgroups import names

DEFAULT_PARENT = "/cri-shim.pods"  # for clients that name none; the kubelet always does

_FIELD = "sandbox_config.linux.cgroup_parent"


def path(parent: str, name: str, driver: str) -> str:
    """``Linux.cgroups_path`` of the group ``name`` (an id of ours) below the pod's cgroup parent."""
    strings.line(parent, _FIELD)
    if ".." in parent.split("/"):
        raise InvalidArgument("contains '..'", field=_FIELD)
    if driver == "systemd":
        # The kubelet sends the whole path of the slice; systemd knows it by its last component.
        slice_name = posixpath.basename(strings.clean(parent)) if parent else names.DEFAULT_SLICE
        if not names.is_slice(slice_name):
            raise InvalidArgument(
                f"{parent!r:.200} is not a slice, but the cgroup driver is systemd",
                field=_FIELD,
                hint="set the same cgroup driver in the kubelet and here",
            )
        return f"{slice_name}:{names.PREFIX}:{name}"
    return posixpath.join(strings.clean(parent or DEFAULT_PARENT), name)
