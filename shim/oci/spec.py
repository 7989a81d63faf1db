"""OCI runtime specification 1.2 (config.md, config-linux.md) as frozen types.

Attribute names are the specification's in snake case; ``shim.oci.codec`` maps them to its JSON names. Sequences are tuples and
maps are plain dicts that nobody mutates. A field that is ``None`` or empty is left out of the JSON.

Extensions, all marked below: ``User.username`` with ``User.groups_policy`` (names are looked up inside the root by the child that
assembled it), namespace paths of the form ``pod:<type>`` and ``target:<type>`` (the namespace arrives by fd), mounts of type
``image`` (what they show is in the recipe beside the specification), and ``Seccomp.notifier`` (what the profile refuses is counted by us).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

_REQUIRED = {"required": True}  # written even where it equals our default


class NamespaceType(StrEnum):
    """Linux namespaces by the names config-linux.md uses."""

    PID = "pid"
    NETWORK = "network"
    MOUNT = "mount"
    IPC = "ipc"
    UTS = "uts"
    USER = "user"
    CGROUP = "cgroup"
    TIME = "time"


class GroupsPolicy(StrEnum):
    """How supplementary groups of the image's /etc/group count (CRI SupplementalGroupsPolicy). Extension."""

    MERGE = "Merge"
    STRICT = "Strict"


@dataclass(frozen=True, slots=True)
class Root:
    path: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """Console size in characters."""

    height: int
    width: int


@dataclass(frozen=True, slots=True)
class User:
    uid: int = field(default=0, metadata=_REQUIRED)
    gid: int = field(default=0, metadata=_REQUIRED)
    umask: int | None = None
    additional_gids: tuple[int, ...] = ()
    username: str = ""  # extension on Linux: "name", "name:group", "1000:group"…; resolved inside the root, then wins over uid/gid
    groups_policy: GroupsPolicy | None = None  # extension: MERGE adds the image's groups of the user; None means STRICT


@dataclass(frozen=True, slots=True)
class Capabilities:
    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rlimit:
    type: str  # RLIMIT_NOFILE …
    soft: int
    hard: int


@dataclass(frozen=True, slots=True)
class ExecCPUAffinity:
    initial: str = ""
    final: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """config.md#process. Also the payload of an exec session."""

    args: tuple[str, ...]
    cwd: str = field(default="/", metadata=_REQUIRED)
    env: tuple[str, ...] = ()
    terminal: bool = False
    console_size: Box | None = None
    user: User = field(default_factory=User)
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None
    apparmor_profile: str = ""
    selinux_label: str = ""
    exec_cpu_affinity: ExecCPUAffinity | None = None


@dataclass(frozen=True, slots=True)
class IDMapping:
    container_id: int
    host_id: int
    size: int


@dataclass(frozen=True, slots=True)
class Mount:
    """config.md#mounts. ``options`` as in fstab plus propagation (rprivate, rslave, rshared) and rro for recursive read-only.

    Type "image" is an extension: read-only, the layers and the sub path come from ``bundle.Recipe.volumes``; ``source`` is the image's id.
    """

    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class Hook:
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Hooks:
    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Namespace:
    """``path`` empty: a new one. ``pod:<type>``: the pod's, by fd. ``target:<type>``: the target container's, by fd. Absent: the host's."""

    type: NamespaceType
    path: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    path: str
    type: str  # c, b, u or p
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceCgroup:
    allow: bool
    type: str = ""  # "" or "a": all, c, b
    major: int | None = None  # None: any
    minor: int | None = None
    access: str = ""  # of "rwm"; empty: all three


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; -1 means unlimited."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None  # memory + swap, as in cgroup v1
    kernel: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool | None = None
    check_before_update: bool | None = None


@dataclass(frozen=True, slots=True)
class CPU:
    shares: int | None = None
    quota: int | None = None  # µs per period; -1 means unlimited
    burst: int | None = None  # µs
    period: int | None = None  # µs
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    cpus: str = ""
    mems: str = ""
    idle: int | None = None


@dataclass(frozen=True, slots=True)
class Pids:
    limit: int


@dataclass(frozen=True, slots=True)
class WeightDevice:
    major: int
    minor: int
    weight: int | None = None
    leaf_weight: int | None = None


@dataclass(frozen=True, slots=True)
class ThrottleDevice:
    major: int
    minor: int
    rate: int


@dataclass(frozen=True, slots=True)
class BlockIO:
    weight: int | None = None
    leaf_weight: int | None = None
    weight_device: tuple[WeightDevice, ...] = ()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_read_iops_device: tuple[ThrottleDevice, ...] = field(default=(), metadata={"json": "throttleReadIOPSDevice"})
    throttle_write_iops_device: tuple[ThrottleDevice, ...] = field(default=(), metadata={"json": "throttleWriteIOPSDevice"})


@dataclass(frozen=True, slots=True)
class HugepageLimit:
    page_size: str  # 2MB, 1GB …
    limit: int  # bytes


@dataclass(frozen=True, slots=True)
class InterfacePriority:
    name: str
    priority: int


@dataclass(frozen=True, slots=True)
class NetworkResources:
    class_id: int | None = field(default=None, metadata={"json": "classID"})
    priorities: tuple[InterfacePriority, ...] = ()


@dataclass(frozen=True, slots=True)
class Resources:
    """config-linux.md#control-groups."""

    devices: tuple[DeviceCgroup, ...] = ()
    memory: Memory | None = None
    cpu: CPU | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = field(default=None, metadata={"json": "blockIO"})
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    network: NetworkResources | None = None
    unified: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SeccompArg:
    index: int
    value: int
    op: str
    value_two: int = 0


@dataclass(frozen=True, slots=True)
class SeccompRule:
    names: tuple[str, ...]
    action: str
    errno_ret: int | None = None
    args: tuple[SeccompArg, ...] = ()


@dataclass(frozen=True, slots=True)
class Seccomp:
    """config-linux.md#seccomp."""

    default_action: str
    default_errno_ret: int | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""
    notifier: str = ""  # extension: "log" counts the calls that the profile refuses, "stop" ends the container for them as well
    syscalls: tuple[SeccompRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Linux:
    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()
    devices: tuple[Device, ...] = ()
    cgroups_path: str = ""  # absolute: below each hierarchy's mount; "slice:prefix:name" with the systemd driver
    resources: Resources | None = None
    rootfs_propagation: str = ""
    seccomp: Seccomp | None = None
    sysctl: dict[str, str] = field(default_factory=dict)
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    mount_label: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """One container: the ``config.json`` of its bundle."""

    oci_version: str
    root: Root
    process: Process
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    linux: Linux = field(default_factory=Linux)

    def namespace(self, kind: NamespaceType) -> Namespace | None:
        """The namespace entry of that type, or None where the container uses the host's."""
        return next((n for n in self.linux.namespaces if n.type is kind), None)
