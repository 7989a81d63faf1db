"""What a pod's namespaces need: the ``sandbox.json`` in a pod's state directory. Not part of OCI, which knows no pods."""

from __future__ import annotations

from dataclasses import dataclass, field

from shim.oci.spec import IDMapping, NamespaceType


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Namespaces to create for a pod. A type that is not listed is the host's (or, for PID, each container's own)."""

    id: str
    namespaces: tuple[NamespaceType, ...]  # of network, ipc, uts, pid, user
    hostname: str = ""  # only with a new UTS namespace
    netns_path: str = ""  # where the network namespace is pinned; set when "network" is listed
    userns_path: str = ""  # where the user namespace is pinned; set when "user" is listed and "network" is not
    sysctl: dict[str, str] = field(default_factory=dict)  # already checked: namespaced, no separators
    mount_label: str = ""  # SELinux label of /dev/shm
    shm_size: int = 0  # bytes; 0: no shared /dev/shm (host IPC)
    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()
    cgroups_path: str = ""  # leaf for PID 1 of a pod that shares its PID namespace
