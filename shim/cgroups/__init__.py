"""Control groups, versions 1 and 2, made by us or by systemd, behind one set of functions (``manager``)."""

from shim.cgroups.group import Group, group_at
from shim.cgroups.layout import Layout, detect
from shim.cgroups.manager import apply, begin, create, freeze, join, kill, open_dir, pids, remove, thaw, use_systemd

__all__ = [
    "Group",
    "Layout",
    "apply",
    "begin",
    "create",
    "detect",
    "freeze",
    "group_at",
    "join",
    "kill",
    "open_dir",
    "pids",
    "remove",
    "thaw",
    "use_systemd",
]
