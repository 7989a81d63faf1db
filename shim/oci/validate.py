"""What a specification must satisfy before anything is made from it. ``Failure("validate", path=<JSON path>)`` names the field.

Whatever writes the bundle has its own, friendlier checks; these hold for every spec, because the core trusts the result: a path that
is not absolute, a sysctl that belongs to the host or an identity that wraps around must not depend on who called.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from shim.errors import Failure
from shim.oci.sandbox import Sandbox
from shim.oci.spec import Capabilities, DeviceCgroup, Hooks, IDMapping, Mount, Namespace, NamespaceType, Process, Resources, Seccomp, Spec

# The kernel keeps (uid_t)-1 for "no change": passing it on would silently leave root's identity.
MAX_ID = 2**32 - 2
HOSTNAME_MAX = 64  # __NEW_UTS_LEN
PROPAGATION = frozenset({"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"})
RUNTIME_DEFAULT = "RuntimeDefault"  # Seccomp.default_action: the core's own profile, for the container's capabilities

# System calls that a launch makes behind the filter. They cannot be asked about, because the listener is handed over by the execve.
LAUNCH = frozenset(
    "execve execveat prctl setresuid setresuid32 setresgid setresgid32 capset clone clone3 fork vfork setsid ioctl exit exit_group".split()
)

_RLIMIT = re.compile(
    "RLIMIT_(AS|CORE|CPU|DATA|FSIZE|LOCKS|MEMLOCK|MSGQUEUE|NICE|NOFILE|NPROC|RSS|RTPRIO|RTTIME|SIGPENDING|STACK)",
)
# Exact names, never prefixes: kernel.shm_rmid_forced is the namespace's, kernel.shutdown_anything would be the host's.
_IPC_SYSCTL = re.compile("kernel/(auto_msgmni|msg(max|mnb|mni|_next_id)|sem(_next_id)?|shm(all|max|mni|_next_id|_rmid_forced))")
_ACTION = re.compile("SCMP_ACT_(KILL|KILL_THREAD|KILL_PROCESS|TRAP|ERRNO|TRACE|ALLOW|LOG|NOTIFY)")
_OPERATOR = re.compile("SCMP_CMP_(NE|LT|LE|EQ|GE|GT|MASKED_EQ)")
_CAPABILITY = re.compile(r"CAP_[A-Z_]{2,40}")
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,5}(KB|MB|GB)")
_CPU_LIST = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_UNIFIED = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
_SYSTEMD_PATH = re.compile(r"[^:/\n]*\.slice:[^:/\n]*:[^:/\n]+|:[^:/\n]*:[^:/\n]+")


def validate(spec: Spec) -> None:
    """Raise Failure for the first field of ``spec`` that cannot be carried out."""
    if not spec.oci_version.startswith("1."):
        _no("ociVersion", f"version {spec.oci_version!r:.40} is not 1.x")
    if not spec.root.path:
        _no("root.path", "empty")
    validate_process(spec.process, "process")
    _names(spec)
    for i, mount in enumerate(spec.mounts):
        _mount(mount, f"mounts[{i}]")
    if spec.hooks is not None:
        _hooks(spec.hooks)
    _linux(spec)


def validate_process(process: Process, at: str = "process") -> None:
    """The part an exec session shares with a container."""
    if not process.args or not process.args[0]:
        _no(f"{at}.args", "nothing to run")
    _texts(f"{at}.args", process.args)
    _absolute(f"{at}.cwd", process.cwd)
    _texts(f"{at}.env", process.env)
    for i, entry in enumerate(process.env):
        if entry.find("=") < 1:
            _no(f"{at}.env[{i}]", "not of the form NAME=value")
    user = process.user
    for name, number in (("uid", user.uid), ("gid", user.gid), *(("additionalGids", g) for g in user.additional_gids)):
        _identity(f"{at}.user.{name}", number)
    _line(f"{at}.user.username", user.username)
    if user.umask is not None and not 0 <= user.umask <= 0o777:
        _no(f"{at}.user.umask", f"{user.umask:o} is no umask")
    if process.capabilities is not None:
        _capabilities(process.capabilities, f"{at}.capabilities")
    seen: set[str] = set()
    for i, limit in enumerate(process.rlimits):
        if not _RLIMIT.fullmatch(limit.type) or limit.type in seen:
            _no(f"{at}.rlimits[{i}].type", f"{limit.type!r:.40} is unknown or repeated")
        if not 0 <= limit.soft <= limit.hard < 2**64:
            _no(f"{at}.rlimits[{i}]", f"want 0 <= soft <= hard, got {limit.soft} and {limit.hard}")
        seen.add(limit.type)
    if process.oom_score_adj is not None and not -1000 <= process.oom_score_adj <= 1000:
        _no(f"{at}.oomScoreAdj", f"{process.oom_score_adj} is outside -1000..1000")
    for name, text in (("apparmorProfile", process.apparmor_profile), ("selinuxLabel", process.selinux_label)):
        _line(f"{at}.{name}", text)
    if process.exec_cpu_affinity is not None:
        for name, text in (("initial", process.exec_cpu_affinity.initial), ("final", process.exec_cpu_affinity.final)):
            if text and not _CPU_LIST.fullmatch(text):
                _no(f"{at}.execCPUAffinity.{name}", "not a list of CPUs")


def validate_sandbox(sandbox: Sandbox) -> None:
    """Raise Failure for the first field of a pod's sandbox record that cannot be carried out."""
    if not sandbox.id:
        _no("id", "empty")
    kinds = set(sandbox.namespaces)
    if len(kinds) != len(sandbox.namespaces):
        _no("namespaces", "repeated")
    allowed = {NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS, NamespaceType.PID, NamespaceType.USER}
    if kinds - allowed:
        _no("namespaces", f"{min(kinds - allowed)} cannot belong to a pod")
    _hostname("hostname", sandbox.hostname, NamespaceType.UTS in kinds)
    if NamespaceType.NETWORK in kinds:
        _absolute("netnsPath", sandbox.netns_path)
    if NamespaceType.USER in kinds and NamespaceType.NETWORK not in kinds:
        _absolute("usernsPath", sandbox.userns_path)  # else it is found through the network namespace
    _line("mountLabel", sandbox.mount_label)
    if sandbox.shm_size < 0:
        _no("shmSize", "negative")
    if sandbox.cgroups_path:
        cgroups_path("cgroupsPath", sandbox.cgroups_path)
    if NamespaceType.PID in kinds and not sandbox.cgroups_path:
        _no("cgroupsPath", "a pod with a PID namespace needs a cgroup for its first process")
    _user_namespace(NamespaceType.USER in kinds, sandbox.uid_mappings, sandbox.gid_mappings, "")
    sysctls("sysctl", sandbox.sysctl, kinds)


def sysctl_path(name: str) -> tuple[str, ...] | None:
    """Components below /proc/sys of a sysctl in either notation, None if it is not a name.

    As sysctl(8) reads it: the first separator tells the notation, and the other character then stands for itself, so that
    ``net.ipv4.conf.eth0/100.forwarding`` and ``net/ipv4/conf/eth0.100/forwarding`` are the same file.
    """
    first = next((c for c in name if c in "./"), "")
    if first == ".":
        name = name.translate({ord("."): "/", ord("/"): "."})
    parts = tuple(name.split("/"))
    if len(parts) < 2 or any(p in ("", ".", "..") or any(c in "+=" or not c.isprintable() or c.isspace() for c in p) for p in parts):
        return None
    return parts


def sysctl_namespace(name: str) -> NamespaceType | None:
    """The namespace a sysctl belongs to; None for one of the host (or a name that is none)."""
    parts = sysctl_path(name)
    if parts is None:
        return None
    if parts[0] == "net":
        return NamespaceType.NETWORK
    if parts[:2] == ("fs", "mqueue") and len(parts) == 3:
        return NamespaceType.IPC
    if _IPC_SYSCTL.fullmatch("/".join(parts)):
        return NamespaceType.IPC
    return NamespaceType.UTS if parts == ("kernel", "domainname") else None


def sysctls(at: str, settings: dict[str, str], own: Collection[NamespaceType]) -> None:
    """Only sysctls of the namespaces in ``own`` may be set, one per entry (CVE-2022-0811: a value that smuggled a second one)."""
    for name, value in settings.items():
        where = f"{at}[{name!r:.80}]"
        kind = sysctl_namespace(name)
        if kind is None:
            _no(where, "not a namespaced sysctl")
        if kind not in own:
            _no(where, f"the {kind} namespace is the host's")
        if "+" in value or any(not c.isprintable() and c != "\t" for c in value):
            _no(where, "value has a separator or a control character")


def cgroups_path(at: str, path: str) -> None:
    """An absolute path without dots, or systemd's ``slice:prefix:name``."""
    _line(at, path)
    if _SYSTEMD_PATH.fullmatch(path):
        return
    parts = path.split("/")
    if not path.startswith("/") or len(parts) < 2 or any(p in ("", ".", "..") for p in parts[1:]):
        _no(at, f"{path!r:.120} is neither an absolute path nor slice:prefix:name")


def _no(path: str, message: str) -> None:
    raise Failure("validate", path=path, message=message)


def _line(at: str, text: str) -> None:
    """No newline or NUL: the text ends up in a file of lines or a C string."""
    if "\n" in text or "\0" in text:
        _no(at, "has a newline or a NUL")


def _texts(at: str, texts: Iterable[str]) -> None:
    for i, text in enumerate(texts):
        if "\0" in text:
            _no(f"{at}[{i}]", "has a NUL")


def _absolute(at: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        _no(at, f"{path!r:.120} is not an absolute path")


def _identity(at: str, number: int) -> None:
    if not 0 <= number <= MAX_ID:
        _no(at, f"{number} is outside 0..{MAX_ID}")


def _hostname(at: str, name: str, own_uts: bool) -> None:
    if not name:
        return
    if not own_uts:
        _no(at, "set, but the UTS namespace is the host's")
    if len(name.encode()) > HOSTNAME_MAX or not name.isprintable():
        _no(at, f"longer than {HOSTNAME_MAX} bytes or not printable")


def _names(spec: Spec) -> None:
    # A pod's hostname is set once, by the pod; a container that joins its namespace would set it for everyone.
    own = spec.namespace(NamespaceType.UTS) is not None
    _hostname("hostname", spec.hostname, own)
    _hostname("domainname", spec.domainname, own)


def _capabilities(caps: Capabilities, at: str) -> None:
    for field in ("bounding", "effective", "inheritable", "permitted", "ambient"):
        for name in getattr(caps, field):
            if not _CAPABILITY.fullmatch(name):
                _no(f"{at}.{field}", f"{name!r:.40} is not a capability")
    if not set(caps.effective) <= set(caps.permitted):
        _no(f"{at}.effective", "more than permitted")
    # capabilities(7): only what is both permitted and inheritable can be ambient. Inheritable for nothing else is CVE-2022-24769.
    if not set(caps.ambient) <= set(caps.permitted) & set(caps.inheritable):
        _no(f"{at}.ambient", "more than permitted and inheritable")


def _mount(mount: Mount, at: str) -> None:
    _absolute(f"{at}.destination", mount.destination)
    _line(f"{at}.destination", mount.destination)
    for i, option in enumerate(mount.options):
        if not option or "\0" in option or "\n" in option:
            _no(f"{at}.options[{i}]", "empty or with a control character")
    if len([o for o in mount.options if o in PROPAGATION]) > 1:
        _no(f"{at}.options", "more than one propagation")
    bind = mount.type == "bind" or not {"bind", "rbind"}.isdisjoint(mount.options)
    if bind and not mount.source.startswith(("/", "pod:")):
        _no(f"{at}.source", f"{mount.source!r:.120} is not an absolute path")
    if not bind and not mount.type:
        _no(f"{at}.type", "empty")
    if bool(mount.uid_mappings) != bool(mount.gid_mappings):
        _no(f"{at}.uidMappings", "uid and gid mappings come together")
    _mappings(f"{at}.uidMappings", mount.uid_mappings)
    _mappings(f"{at}.gidMappings", mount.gid_mappings)


def _mappings(at: str, mappings: Iterable[IDMapping]) -> None:
    for i, m in enumerate(mappings):
        for number in (m.container_id, m.host_id):
            _identity(f"{at}[{i}]", number)
        if m.size < 1 or max(m.container_id, m.host_id) + m.size - 1 > MAX_ID:
            _no(f"{at}[{i}].size", f"{m.size} does not fit")


def _hooks(hooks: Hooks) -> None:
    for field, at in (
        ("prestart", "prestart"),
        ("create_runtime", "createRuntime"),
        ("create_container", "createContainer"),
        ("start_container", "startContainer"),
        ("poststart", "poststart"),
        ("poststop", "poststop"),
    ):
        for i, hook in enumerate(getattr(hooks, field)):
            _absolute(f"hooks.{at}[{i}].path", hook.path)
            if hook.timeout is not None and hook.timeout < 1:
                _no(f"hooks.{at}[{i}].timeout", "not positive")


def _linux(spec: Spec) -> None:
    linux = spec.linux
    kinds = _namespaces(linux.namespaces)
    _user_namespace(NamespaceType.USER in kinds, linux.uid_mappings, linux.gid_mappings, "linux.")
    for i, device in enumerate(linux.devices):
        _absolute(f"linux.devices[{i}].path", device.path)
        if device.type not in ("c", "b", "u", "p"):
            _no(f"linux.devices[{i}].type", f"{device.type!r:.20} is not c, b, u or p")
        if not (0 <= device.major < 2**12 and 0 <= device.minor < 2**20):
            _no(f"linux.devices[{i}]", f"{device.major}:{device.minor} is no device number")
        for number in (device.uid, device.gid):
            if number is not None:
                _identity(f"linux.devices[{i}]", number)
    if linux.cgroups_path:
        cgroups_path("linux.cgroupsPath", linux.cgroups_path)
    if linux.resources is not None:
        validate_resources(linux.resources, "linux.resources")
    if linux.rootfs_propagation and linux.rootfs_propagation not in PROPAGATION:
        _no("linux.rootfsPropagation", f"{linux.rootfs_propagation!r:.40} is unknown")
    if linux.seccomp is not None:
        validate_seccomp(linux.seccomp, "linux.seccomp")
    sysctls("linux.sysctl", linux.sysctl, kinds)
    for name, paths in (("maskedPaths", linux.masked_paths), ("readonlyPaths", linux.readonly_paths)):
        for i, path in enumerate(paths):
            _absolute(f"linux.{name}[{i}]", path)


def _namespaces(namespaces: Iterable[Namespace]) -> set[NamespaceType]:
    kinds: set[NamespaceType] = set()
    for i, namespace in enumerate(namespaces):
        if namespace.type in kinds:
            _no(f"linux.namespaces[{i}].type", f"{namespace.type} is repeated")
        path = namespace.path
        if path and not path.startswith("/") and path not in (f"pod:{namespace.type}", f"target:{namespace.type}"):
            _no(f"linux.namespaces[{i}].path", f"{path!r:.120} is neither absolute nor the pod's nor the target's")
        kinds.add(namespace.type)
    if NamespaceType.MOUNT not in kinds:
        _no("linux.namespaces", "a container without its own mount namespace is not supported")
    return kinds


def _user_namespace(own: bool, uids: tuple[IDMapping, ...], gids: tuple[IDMapping, ...], at: str) -> None:
    if not own and (uids or gids):
        _no(f"{at}uidMappings", "id mappings without a user namespace")
    if own and not (uids and gids):
        _no(f"{at}uidMappings", "a user namespace needs uid and gid mappings")
    _mappings(f"{at}uidMappings", uids)
    _mappings(f"{at}gidMappings", gids)


def validate_resources(resources: Resources, at: str = "resources") -> None:
    """Also for the payload of an update."""
    for i, rule in enumerate(resources.devices):
        _device_rule(rule, f"{at}.devices[{i}]")
    for i, page in enumerate(resources.hugepage_limits):
        if not _PAGE_SIZE.fullmatch(page.page_size) or not 0 <= page.limit < 2**64:
            _no(f"{at}.hugepageLimits[{i}]", f"{page.page_size!r:.20} {page.limit} is not a page size and a limit")
    for key, value in resources.unified.items():
        # A file name in the cgroup's directory: a slash would leave it.
        if not _UNIFIED.fullmatch(key):
            _no(f"{at}.unified", f"{key!r:.80} is not a cgroup file")
        if "\0" in value:
            _no(f"{at}.unified[{key}]", "has a NUL")
    cpu, memory = resources.cpu, resources.memory
    if cpu is not None:
        for name, text in (("cpus", cpu.cpus), ("mems", cpu.mems)):
            if text and not _CPU_LIST.fullmatch(text):
                _no(f"{at}.cpu.{name}", f"{text!r:.80} is not a list of CPUs or nodes")
        for name, number in (("shares", cpu.shares), ("period", cpu.period), ("burst", cpu.burst)):
            if number is not None and not 0 <= number < 2**64:
                _no(f"{at}.cpu.{name}", f"{number} is negative or too large")
    if memory is not None:
        for name, number in (("limit", memory.limit), ("reservation", memory.reservation), ("swap", memory.swap)):
            if number is not None and not -1 <= number < 2**63:
                _no(f"{at}.memory.{name}", f"{number} is below -1 or too large")


def _device_rule(rule: DeviceCgroup, at: str) -> None:
    if rule.type not in ("", "a", "b", "c"):
        _no(f"{at}.type", f"{rule.type!r:.20} is not a, b or c")
    if set(rule.access) - set("rwm"):
        _no(f"{at}.access", f"{rule.access!r:.20} has more than r, w and m")


def validate_seccomp(seccomp: Seccomp, at: str) -> None:
    """Actions, names and comparisons of a filter; the core's own profile passes."""
    if seccomp.notifier not in ("", "log", "stop"):
        _no(f"{at}.notifier", f"{seccomp.notifier!r:.40} is neither log nor stop")
    _listener(seccomp, at)
    if seccomp.default_action == RUNTIME_DEFAULT:
        return
    for where, action in (("defaultAction", seccomp.default_action), *(("syscalls", r.action) for r in seccomp.syscalls)):
        if not _ACTION.fullmatch(action):
            _no(f"{at}.{where}", f"{action!r:.40} is not an action")
    for i, rule in enumerate(seccomp.syscalls):
        if not rule.names:
            _no(f"{at}.syscalls[{i}].names", "empty")
        for j, arg in enumerate(rule.args):
            if not _OPERATOR.fullmatch(arg.op) or not 0 <= arg.index <= 5 or not 0 <= arg.value < 2**64 or not 0 <= arg.value_two < 2**64:
                _no(f"{at}.syscalls[{i}].args[{j}]", "unknown operator, index above 5 or value outside 64 bits")


def _listener(seccomp: Seccomp, at: str) -> None:
    """Somebody must answer what is asked, and nothing may be asked before he can: a launch would wait for an answer for ever."""
    asked = [rule for rule in seccomp.syscalls if rule.action == "SCMP_ACT_NOTIFY"]
    if asked and not seccomp.listener_path:
        _no(f"{at}.listenerPath", "empty, but the profile has SCMP_ACT_NOTIFY")
    if seccomp.listener_path:
        _absolute(f"{at}.listenerPath", seccomp.listener_path)
        if not asked:
            _no(f"{at}.listenerPath", "set, but nothing of the profile is SCMP_ACT_NOTIFY")
        if seccomp.notifier:
            _no(f"{at}.notifier", "the profile has a listener of its own")
    elif seccomp.listener_metadata:
        _no(f"{at}.listenerMetadata", "set without listenerPath")
    for rule in asked:
        for name in LAUNCH & set(rule.names):
            _no(f"{at}.syscalls", f"{name} with SCMP_ACT_NOTIFY: a container is started with it before anybody listens")
