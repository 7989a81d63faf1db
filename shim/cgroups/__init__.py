"""Control groups, versions 1 and 2, behind one set of functions (``manager``)."""

from shim.cgroups.group import Group
from shim.cgroups.layout import Layout, detect
from shim.cgroups.manager import apply, create, freeze, join, kill, open_dir, pids, remove, thaw

__all__ = ["Group", "Layout", "apply", "create", "detect", "freeze", "join", "kill", "open_dir", "pids", "remove", "thaw"]
