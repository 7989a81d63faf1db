"""Capabilities, seccomp, AppArmor, SELinux, masked and read-only paths of a container."""

from __future__ import annotations

from collections.abc import Iterable

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import seccomp as profiles
from cri.spec import selinux, strings
from cri.spec.inputs import HandlerConfig, HostFacts
from cri.spec.process import MAX_ID
from protos.runtime.v1 import api_pb2 as v1
from shim.linux.caps import NUMBERS
from shim.oci import spec as oci

_CONTEXT = "config.linux.security_context"
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
APPARMOR_DEFAULT = "cri-shim-default"  # loaded at the start: ``cri.apparmor``
RUNTIME_DEFAULT = oci.Seccomp("RuntimeDefault")  # expanded by the core, which knows libseccomp

_ALL = "CAP_ALL"


def check_sandbox(context: v1.LinuxSandboxSecurityContext) -> None:
    """What the kubelet says of a pod's own process, which the peers run an image for. Here it is a program of ours, or there is none: it
    belongs to nobody, has no capabilities, groups or writable root, and nothing that could be confined further. So values are checked,
    and that is all that they can do."""
    field = "config.linux.security_context"
    for name in ("run_as_user", "run_as_group"):
        if context.HasField(name) and not 0 <= getattr(context, name).value <= MAX_ID:
            raise InvalidArgument(f"id {getattr(context, name).value} is outside 0..{MAX_ID}", field=f"{field}.{name}")
    if context.HasField("run_as_group") and not context.HasField("run_as_user"):
        raise InvalidArgument(f"group {context.run_as_group.value} is specified without a user", field=f"{field}.run_as_group")
    for i, group in enumerate(context.supplemental_groups):
        if not 0 <= group <= MAX_ID:
            raise InvalidArgument(f"id {group} is outside 0..{MAX_ID}", field=f"{field}.supplemental_groups[{i}]")
    if context.supplemental_groups_policy not in (v1.Merge, v1.Strict):
        raise InvalidArgument("unknown policy", field=f"{field}.supplemental_groups_policy")
    for name in ("seccomp", "apparmor"):
        profile = getattr(context, name)
        if profile.profile_type not in v1.SecurityProfile.ProfileType.values():
            raise InvalidArgument(f"unknown profile type {profile.profile_type}", field=f"{field}.{name}.profile_type")
        if (profile.profile_type == v1.SecurityProfile.Localhost) != bool(profile.localhost_ref):
            raise InvalidArgument("goes with the profile type Localhost", field=f"{field}.{name}.localhost_ref")
    if context.seccomp_profile_path:
        _from_path(context.seccomp_profile_path, f"{field}.seccomp_profile_path")
    selinux.check(context.selinux_options, f"{field}.selinux_options")


def capabilities(context: v1.LinuxContainerSecurityContext, host: HostFacts) -> oci.Capabilities:
    """The sets of the container's first process. Inheritable stays empty (CVE-2022-24769) unless ambient ones are asked for:
    the kernel raises only what is inheritable to ambient."""
    wanted = context.capabilities
    field = f"{_CONTEXT}.capabilities"
    add = _names(wanted.add_capabilities, f"{field}.add_capabilities")
    drop = _names(wanted.drop_capabilities, f"{field}.drop_capabilities")
    ambient = _names(wanted.add_ambient_capabilities, f"{field}.add_ambient_capabilities")
    everything = dict.fromkeys(host.capabilities)
    if context.privileged:
        granted = everything
    else:
        granted = dict(everything) if _ALL in add else dict.fromkeys(DEFAULT_CAPABILITIES)
        if _ALL in drop:
            granted = {}
        granted.update(dict.fromkeys(n for n in add if n != _ALL))
        for name in drop:
            granted.pop(name, None)
    if _ALL in ambient:
        ambient = list(granted)
    if not set(ambient) <= granted.keys():
        raise InvalidArgument("more than the container's capabilities", field=f"{field}.add_ambient_capabilities")
    names = tuple(granted)
    return oci.Capabilities(names, names, tuple(ambient), names, tuple(ambient))


def _names(wanted: Iterable[str], field: str) -> list[str]:
    names = []
    for i, name in enumerate(wanted):
        full = name.upper()
        full = full if full.startswith("CAP_") else f"CAP_{full}"
        # ASCII first: "ſ".upper() is "S".
        if not name.isascii() or (full != _ALL and full not in NUMBERS):
            raise InvalidArgument(f"{name!r:.40} is not a capability", field=f"{field}[{i}]")
        names.append(full)
    return names


def seccomp(
    context: v1.LinuxContainerSecurityContext, caps: oci.Capabilities, host: HostFacts, handler: HandlerConfig
) -> oci.Seccomp | None:
    """None: unconfined. A privileged container always is; one whose request says nothing gets the handler's choice."""
    if context.HasField("seccomp"):
        profile, field = context.seccomp, f"{_CONTEXT}.seccomp"
    elif context.seccomp_profile_path:  # deprecated, but crictl users have it
        field = f"{_CONTEXT}.seccomp_profile_path"
        profile = _from_path(context.seccomp_profile_path, field)
    elif handler.unset_seccomp_profile:
        field = "unset_seccomp_profile"
        profile = _from_path(handler.unset_seccomp_profile, field)
    else:
        return None
    if profile.profile_type != v1.SecurityProfile.Localhost and profile.localhost_ref:
        raise InvalidArgument("set, but the profile type is not Localhost", field=f"{field}.localhost_ref")
    if context.privileged or profile.profile_type == v1.SecurityProfile.Unconfined:
        return None
    if not host.seccomp:
        raise InvalidArgument("this kernel has no seccomp filters", field=field)
    if profile.profile_type == v1.SecurityProfile.RuntimeDefault:
        return RUNTIME_DEFAULT
    if profile.profile_type != v1.SecurityProfile.Localhost:
        raise InvalidArgument(f"unknown profile type {profile.profile_type}", field=field)
    return _localhost(profile.localhost_ref, f"{field}.localhost_ref", caps, host)


def _from_path(path: str, field: str) -> v1.SecurityProfile:
    if path in ("runtime/default", "docker/default"):
        return v1.SecurityProfile(profile_type=v1.SecurityProfile.RuntimeDefault)
    if path == "unconfined":
        return v1.SecurityProfile(profile_type=v1.SecurityProfile.Unconfined)
    if not path.startswith("localhost/"):
        raise InvalidArgument(f"{path!r:.120} is not a profile", field=field)
    return v1.SecurityProfile(profile_type=v1.SecurityProfile.Localhost, localhost_ref=path)


def _localhost(ref: str, field: str, caps: oci.Capabilities, host: HostFacts) -> oci.Seccomp:
    path = strings.absolute(ref.removeprefix("localhost/"), field)
    try:
        text = host.read(path)
    except OSError as e:
        raise InvalidArgument(f"{path!r:.200}: {e.strerror}", field=field) from None
    return profiles.parse(text, field=field, caps=caps.bounding, arch=host.arch, kernel=host.kernel)


def apparmor(context: v1.LinuxContainerSecurityContext, host: HostFacts) -> str:
    """Name of the profile to change to at exec, empty for none. As with containerd a request that says nothing gets the default profile
    where the kernel has AppArmor, and a privileged container only what it names."""
    explicit, field = True, f"{_CONTEXT}.apparmor"
    if context.HasField("apparmor"):
        profile = context.apparmor
    elif context.apparmor_profile:
        field = f"{_CONTEXT}.apparmor_profile"
        profile = _from_path(context.apparmor_profile, field)
    else:
        explicit, profile = False, v1.SecurityProfile(profile_type=v1.SecurityProfile.RuntimeDefault)
    kind = profile.profile_type
    if kind not in v1.SecurityProfile.ProfileType.values():
        raise InvalidArgument(f"unknown profile type {kind}", field=field)
    if kind != v1.SecurityProfile.Localhost and profile.localhost_ref:
        raise InvalidArgument("set, but the profile type is not Localhost", field=f"{field}.localhost_ref")
    if kind == v1.SecurityProfile.Localhost:
        return _loaded_profile(profile.localhost_ref.removeprefix("localhost/"), f"{field}.localhost_ref", host)
    if kind == v1.SecurityProfile.Unconfined or context.privileged or not host.apparmor:
        return ""
    if host.no_apparmor_default:
        if explicit:
            raise FailedPrecondition(f"{field}: the default profile is not loaded: {host.no_apparmor_default}")
        return ""
    return APPARMOR_DEFAULT


def _loaded_profile(name: str, field: str, host: HostFacts) -> str:
    if not host.apparmor:
        raise InvalidArgument("AppArmor is not enabled on this host", field=field)
    strings.word(name, field)
    try:
        known = host.apparmor_loaded(name)
    except OSError as e:
        raise FailedPrecondition(f"{field}: loaded profiles cannot be read: {e}", hint="mount securityfs on /sys/kernel/security") from None
    if not known:
        raise InvalidArgument(f"the profile {name!r:.120} is not loaded", field=field, hint="apparmor_parser -r loads it")
    return name


def masked_paths(linux: v1.LinuxContainerConfig) -> tuple[str, ...]:
    """Paths to hide. The kubelet sends its list, or none for ``procMount: Unmasked``: so an empty list means none, and only a
    request without any security context gets the defaults."""
    if not linux.HasField("security_context"):
        return MASKED_PATHS
    return _paths(linux.security_context, linux.security_context.masked_paths, "masked_paths")


def readonly_paths(linux: v1.LinuxContainerConfig) -> tuple[str, ...]:
    """Paths to make read-only, by the same rule."""
    if not linux.HasField("security_context"):
        return READONLY_PATHS
    return _paths(linux.security_context, linux.security_context.readonly_paths, "readonly_paths")


def _paths(context: v1.LinuxContainerSecurityContext, paths: Iterable[str], name: str) -> tuple[str, ...]:
    checked = tuple(strings.absolute(path, f"{_CONTEXT}.{name}[{i}]") for i, path in enumerate(paths))
    return () if context.privileged else checked
