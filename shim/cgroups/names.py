"""What systemd calls a container's group, and where it puts it. Pure: ``slice:prefix:name`` in, unit and path out."""

from __future__ import annotations

import re
from typing import NamedTuple

from shim.errors import Failure

PREFIX = "cri-shim"  # of our scopes: cri-shim-<id>.scope
DEFAULT_SLICE = "system.slice"  # for clients that name none; the kubelet always does

# unit_name_is_valid(): these characters, and no more than 255 of them.
_UNIT = re.compile(r"[A-Za-z0-9:_.\\-]{1,255}")


class Scope(NamedTuple):
    """A transient scope unit of ours. ``path`` is its group below each hierarchy's mount."""

    slice: str
    unit: str
    path: str


def is_scope(cgroups_path: str) -> bool:
    """Whether this is the systemd driver's form of ``Linux.cgroups_path``."""
    return cgroups_path.count(":") == 2 and "/" not in cgroups_path


def scope(cgroups_path: str) -> Scope:
    """Raises Failure for what systemd would not take as names, or would read as something else."""
    slice_name, prefix, name = cgroups_path.split(":")
    slice_name, unit = slice_name or DEFAULT_SLICE, f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if not is_slice(slice_name):
        raise Failure("create cgroup", path=slice_name, message="not the name of a slice")
    if not name or not _UNIT.fullmatch(unit):
        raise Failure("create cgroup", path=unit, message="not the name of a scope")
    return Scope(slice_name, unit, f"{slice_path(slice_name)}/{unit}")


def is_slice(name: str) -> bool:
    """systemd.slice(5): a dash leads from a slice to one inside it, so no part between dashes may be empty. ``-.slice`` is the root."""
    stem = name.removesuffix(".slice")
    return stem != name and bool(_UNIT.fullmatch(name)) and ":" not in name and (stem == "-" or all(stem.split("-")))


def slice_path(name: str) -> str:
    """``a-b.slice`` lies in ``a.slice``; the root slice is the hierarchy's own root."""
    if name == "-.slice":
        return ""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))


def expand(cgroups_path: str) -> str:
    """The path of the group that ``Linux.cgroups_path`` names, whichever driver it is meant for."""
    return scope(cgroups_path).path if is_scope(cgroups_path) else cgroups_path
