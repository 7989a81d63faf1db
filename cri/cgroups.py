"""Which cgroup driver this daemon uses, and where that puts the runtime itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cri.config import Config
from cri.errors import StartError
from shim.cgroups import names
from shim.cgroups.layout import Layout

_BOOTED = Path("/run/systemd/system")  # sd_booted(3)
_CGROUPFS_GROUP, _SYSTEMD_SLICE = "/cri-shim", "system.slice"
_DEFAULT_STATE = "/run/cri-shim"


@dataclass(frozen=True, slots=True)
class Driver:
    """``runtime``: where supervisor, stdio and helpers live, in the form of ``Linux.cgroups_path``."""

    name: Literal["cgroupfs", "systemd"]
    runtime: str


def booted_with_systemd() -> bool:
    return _BOOTED.is_dir() and not _BOOTED.is_symlink()


def choose(config: Config) -> Driver:
    """``auto`` is systemd where that is PID 1: there it is the owner of the groups, and two managers of one tree disagree sooner or later.

    So it is with CRI-O and with what kubeadm sets up; a kubelet that asks (RuntimeConfig) takes over what is chosen here. Raises
    StartError.
    """
    wanted, where = config.cgroup.driver, config.cgroup.runtime_cgroup
    name: Literal["cgroupfs", "systemd"] = wanted if wanted != "auto" else "systemd" if booted_with_systemd() else "cgroupfs"
    if name == "cgroupfs":
        if where.endswith(".slice") and not where.startswith("/"):
            raise StartError(f"cgroup.runtime_cgroup: {where!r} is a slice, and the driver is cgroupfs: give a path like {_CGROUPFS_GROUP}")
        return Driver(name, where or _CGROUPFS_GROUP)
    if not booted_with_systemd():
        raise StartError(f'cgroup.driver: "systemd" needs systemd as PID 1, and {_BOOTED} is not there; use "cgroupfs", in the kubelet too')
    if where and not names.is_slice(where):
        raise StartError(f"cgroup.runtime_cgroup: {where!r} is not a slice, and the driver is systemd: give one like {_SYSTEMD_SLICE}")
    scope = "runtime" if config.state == _DEFAULT_STATE else f"runtime-{hashlib.sha256(config.state.encode()).hexdigest()[:8]}"
    return Driver(name, f"{where or _SYSTEMD_SLICE}:{names.PREFIX}:{scope}")


def accounts_swap(layout: Layout, driver: Driver) -> bool:
    """Whether a limit on swap means something here; the supervisor's own group is there by now."""
    if layout.version == 1:
        return Path(layout.controllers.get("memory", "/nonexistent"), "memory.memsw.limit_in_bytes").exists()
    # The root group has no such file.
    return Path(layout.root + names.expand(driver.runtime), "memory.swap.max").exists()
