"""What a specification is made of, beside the CRI messages: facts of the host, settings of the runtime handler, files of the pod."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cri.cdi.model import Edits
from cri.images.model import ImageConfig
from cri.spec.selinux import Contexts
from protos.runtime.v1 import api_pb2 as v1
from shim.linux.caps import NAMES
from shim.oci import spec as oci


def _no_file(path: str) -> bytes:
    raise FileNotFoundError(2, "no such file", path)


def _no_devices(path: str) -> tuple[oci.Device, ...]:
    raise FileNotFoundError(2, "no such device", path)


def _not_loaded(name: str) -> bool:
    return False


def _private(path: str) -> str:
    return "private"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine, as far as specifications depend on it. ``cri.spec.host.detect`` makes the real one.

    The functions look at the host when they are called (resolv.conf changes, devices come and go) and raise OSError.
    """

    cgroup_version: int = 2
    cgroup_driver: str = "cgroupfs"  # or "systemd"
    hostname: str = "localhost"
    arch: str = "x86_64"  # as uname(2) says
    kernel: tuple[int, int] = (5, 15)
    capabilities: tuple[str, ...] = NAMES  # what a privileged container gets
    swap: bool = True  # the memory controller accounts swap
    hugetlb: bool = True
    hugepage_sizes: frozenset[str] = frozenset()  # as CRI has them ("2MB"); empty: unknown
    seccomp: bool = True
    apparmor: bool = False
    no_apparmor_default: str = ""  # why the default profile cannot be used; empty: it is loaded
    selinux: bool = False
    selinux_contexts: Contexts | None = None  # None: off, or a policy that knows no containers
    recursive_read_only: bool = True  # mount_setattr(AT_RECURSIVE)
    resctrl: bool = False  # Intel RDT's file system is mounted
    ipv6: bool = False  # network namespaces have it, even where it is disabled on the interfaces
    no_user_namespaces: str = ""  # why pods cannot have one; empty: they can
    read: Callable[[str], bytes] = _no_file  # a regular file of bounded size
    devices: Callable[[str], tuple[oci.Device, ...]] = _no_devices  # the device at a path, or those below a directory
    apparmor_loaded: Callable[[str], bool] = _not_loaded  # whether the kernel has a profile of that name
    propagation: Callable[[str], str] = _private  # of the mount a path is on: "shared", "slave" or "private"


@dataclass(frozen=True, slots=True)
class HandlerConfig:
    """Settings of one runtime handler."""

    privileged_without_host_devices: bool = False
    privileged_without_host_devices_all_devices_allowed: bool = False
    exec_cpu_affinity: str = ""  # "first": exec sessions run on the first processor of a container that has a cpuset (as in CRI-O)
    unset_seccomp_profile: str = ""  # for a request that names none: "" (unconfined), "runtime/default", "localhost/<path>"
    unprivileged_ports: bool = True  # pods with a network of their own: ports below 1024 for everyone
    unprivileged_icmp: bool = True  # and ping sockets
    rlimits: tuple[oci.Rlimit, ...] = ()  # empty: those of the supervisor at its start
    hooks: oci.Hooks | None = None  # not in the configuration file
    base: oci.Spec | None = None  # see cri.spec.base
    pod_annotations: tuple[str, ...] = ()  # exact names (CVE-2023-6476: never prefixes) copied into the spec
    container_annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxFiles:
    """Host paths of the pod's files; empty: the container keeps its image's."""

    hosts: str = ""
    hostname: str = ""
    resolv_conf: str = ""


@dataclass(frozen=True, slots=True)
class ContainerInputs:
    """Everything ``container.build`` looks at."""

    container_id: str
    config: v1.ContainerConfig
    pod: v1.PodSandboxConfig
    pod_id: str
    files: SandboxFiles
    image: ImageConfig
    host: HostFacts
    handler: HandlerConfig = field(default_factory=HandlerConfig)
    selinux_level: str = ""  # of the pod
    image_name: str = ""  # for the annotation; else what the request says
    volumes: Mapping[str, str] = field(default_factory=dict)  # VOLUME of the image to a directory of ours
    image_mounts: Mapping[str, str] = field(default_factory=dict)  # destination of an image volume to the image's id
    cdi: tuple[Edits, ...] = ()  # of the request's CDI devices
    block_io: oci.BlockIO | None = None  # of the container's class
