"""``cri-shim doctor``: what this machine has of what cri-shim needs; each check says what it found and how to fix it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cri import apparmor
from cri.cgroups import booted_with_systemd, choose
from cri.config import Config
from cri.errors import StartError
from cri.spec.host import selinux_contexts
from cri.startup import KERNEL_FLOOR, kernel_version
from shim.cgroups import layout as cgroups
from shim.cgroups.names import expand
from shim.errors import Failure
from shim.linux import caps

Level = Literal["ok", "note", "fail"]

#: Where an overlay's upper directory cannot be.
_NO_UPPER = frozenset({"overlay", "nfs", "nfs4", "9p", "vfat", "exfat", "squashfs", "iso9660", "erofs"})
_NEEDED_CAPABILITIES = (
    "CAP_SYS_ADMIN",
    "CAP_NET_ADMIN",
    "CAP_MKNOD",
    "CAP_CHOWN",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_KILL",
    "CAP_DAC_OVERRIDE",
)
_NEEDED_CONTROLLERS = ("cpu", "memory", "pids", "cpuset")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``fail``: the daemon or every pod will not work; ``note``: something that may matter is missing."""

    check: str
    level: Level
    found: str
    fix: str = ""


def main(config: Config, *, as_json: bool = False) -> int:
    """Prints the findings; 1 if something required failed."""
    failed = False
    for finding in examine(config):
        failed |= finding.level == "fail"
        if as_json:
            print(json.dumps({"check": finding.check, "level": finding.level, "found": finding.found, "fix": finding.fix}))
            continue
        print(f"{_mark(finding.level)} {finding.check:<14} {finding.found}")
        if finding.fix:
            print(f"{'':21}→ {finding.fix}")
    return 1 if failed else 0


def _mark(level: Level) -> str:
    word = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[level]
    color = {"ok": "32", "note": "33", "fail": "31;1"}[level]
    return f"\x1b[{color}m{word}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else word


def examine(config: Config) -> Iterator[Finding]:
    """Runs all checks; one that breaks is a finding too."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        *(_kernel, _python, _capabilities, _cgroups, _overlay, _user_namespaces, _seccomp, _limits, _oom_score, _directories),
        *(_images, _network, _fuse, _security_modules, _cdi),
    )
    for check in checks:
        try:
            yield from check(config)
        except (OSError, Failure, subprocess.SubprocessError) as error:
            yield Finding(check.__name__.strip("_").replace("_", " "), "fail", f"could not be checked: {error}")


def _kernel(config: Config) -> Iterator[Finding]:
    release, floor = os.uname().release, ".".join(map(str, KERNEL_FLOOR))
    if kernel_version() < KERNEL_FLOOR:
        yield Finding("kernel", "fail", f"Linux {release}", f"needs {floor} or later: upgrade the kernel")
        return
    yield Finding("kernel", "ok", f"Linux {release} on {platform.machine()} (needs {floor})")
    if platform.machine() not in ("x86_64", "aarch64"):
        yield Finding("architecture", "fail", platform.machine(), "system call numbers are known for x86_64 and aarch64 only")
    if kernel_version() < (6, 15):
        what = "exit codes of containers that end while supervisor and daemon are both dead read as 255 (Linux 6.15+ keeps them)"
        yield Finding("exit codes", "note", what)


def _python(config: Config) -> Iterator[Finding]:
    found = f"Python {platform.python_version()} at {sys.executable}"
    yield Finding(
        "python", "ok" if sys.version_info >= (3, 11) else "fail", found, "" if sys.version_info >= (3, 11) else "needs 3.11 or later"
    )


def _capabilities(config: Config) -> Iterator[Finding]:
    held = _effective()
    missing = [name for name in _NEEDED_CAPABILITIES if not held >> caps.NAMES.index(name) & 1]
    if os.geteuid() != 0:
        yield Finding("user", "fail", f"user {os.geteuid()}", "run as root: sudo cri-shim …")
    if missing:
        yield Finding("capabilities", "fail", f"missing {', '.join(missing)}", "run on the host, or in a container that is privileged")
    else:
        yield Finding("capabilities", "ok", "everything that is needed")


def _effective() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _cgroups(config: Config) -> Iterator[Finding]:
    layout = cgroups.detect()
    controllers = sorted(c for c in layout.controllers if "=" not in c)
    missing = [c for c in _NEEDED_CONTROLLERS if c not in controllers]
    if layout.version == 1 and "devices" not in controllers:
        missing.append("devices")
    found = f"version {layout.version}, {', '.join(controllers)}"
    if missing:
        fix = "boot with cgroup_enable=memory" if missing == ["memory"] else "mount or enable them, see cgroups(7)"
        yield Finding("cgroups", "fail", f"{found}; without {', '.join(missing)}", fix)
    else:
        yield Finding("cgroups", "ok", found)
    if "hugetlb" not in controllers:
        yield Finding("cgroups", "note", "no hugetlb controller: limits on huge pages are refused")
    for hierarchy in layout.hierarchies:
        probe = Path(hierarchy) / f"cri-shim-doctor-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            yield Finding(
                "cgroups", "fail", f"no group can be made in {hierarchy}: {error.strerror}", "run as root, with /sys/fs/cgroup mounted rw"
            )
    yield from _cgroup_driver(config)


def _cgroup_driver(config: Config) -> Iterator[Finding]:
    try:
        driver = choose(config)
    except StartError as error:
        yield Finding("cgroup driver", "fail", str(error), 'driver = "auto" under [cgroup] takes what this machine has')
        return
    how = "configured" if config.cgroup.driver != "auto" else "systemd is PID 1" if driver.name == "systemd" else "systemd is not PID 1"
    if driver.name == "cgroupfs":
        advice = "systemd is PID 1 and manages groups, too: use its driver, in the kubelet as well" if booted_with_systemd() else ""
        yield Finding("cgroup driver", "note" if advice else "ok", f"cgroupfs ({how})", advice)
        return
    from shim.cgroups.bus import Bus

    try:
        bus = Bus("reach systemd", 5.0)
        version = bus.property("Version")
        bus.close()
    except Failure as failure:
        yield Finding("cgroup driver", "fail", f"systemd ({how}): {failure}", "apt install dbus; systemctl start dbus.socket")
        return
    yield Finding("cgroup driver", "ok", f"systemd {version} ({how}), runtime in {expand(driver.runtime)}")


def _overlay(config: Config) -> Iterator[Finding]:
    if not _filesystem("overlay"):
        yield Finding(
            "overlay", "fail", "the kernel has no overlay file system", "modprobe overlay; echo overlay > /etc/modules-load.d/overlay.conf"
        )
        return
    kind, point = _mount_of(Path(config.root))
    if kind in _NO_UPPER:
        yield Finding(
            "overlay",
            "fail",
            f"{config.root} is on {kind} ({point}), which cannot hold writable layers",
            "set root to a directory on ext4, xfs, btrfs or tmpfs",
        )
        return
    yield Finding("overlay", "ok", f"available; {config.root} is on {kind} ({point})")


def _filesystem(name: str) -> bool:
    def known() -> bool:
        return name in Path("/proc/filesystems").read_text().split()

    if not known() and shutil.which("modprobe") and os.geteuid() == 0:
        subprocess.run(["modprobe", "-q", name], check=False, timeout=20)
    return known()


def _mount_of(path: Path) -> tuple[str, str]:
    """File system type and mount point of what a path is, or will be, on."""
    while not path.exists():
        path = path.parent
    device, real = os.stat(path).st_dev, str(path.resolve())
    found = ("unknown", "")
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, tail = line.split(" - ")[0].split(), line.split(" - ")[1].split()
        point = fields[4]
        inside = point == "/" or f"{real}/".startswith(f"{point}/")
        if fields[2] == f"{os.major(device)}:{os.minor(device)}" and inside and len(point) >= len(found[1]):
            found = (tail[0], point)
    return found


def _user_namespaces(config: Config) -> Iterator[Finding]:
    limit = _read("/proc/sys/user/max_user_namespaces")
    if not Path("/proc/self/ns/user").exists() or limit in ("0", ""):
        yield Finding("user ns", "note", "user namespaces are off", "sysctl -w user.max_user_namespaces=15000, if pods are to use them")
    elif kernel_version() < (6, 3):
        yield Finding("user ns", "note", f"up to {limit}, but not for pods: this kernel cannot idmap a tmpfs", "Linux 6.3 or later")
    else:
        yield Finding("user ns", "ok", f"up to {limit}")


def _seccomp(config: Config) -> Iterator[Finding]:
    actions = _read("/proc/sys/kernel/seccomp/actions_avail")
    if not actions:
        yield Finding("seccomp", "fail", "the kernel has no seccomp filters", "needs CONFIG_SECCOMP_FILTER")
        return
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        yield Finding("seccomp", "fail", "libseccomp.so.2 is not installed", "apt install libseccomp2 (or dnf install libseccomp)")
        return
    yield Finding("seccomp", "ok", "kernel filters and libseccomp")


def _limits(config: Config) -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    # A container costs the supervisor and stdio some ten descriptors each.
    enough = files == resource.RLIM_INFINITY or files >= 65536
    yield Finding(
        "limits",
        "ok" if enough else "note",
        f"{many} open files",
        "" if enough else "LimitNOFILE=1048576 in the unit, or ulimit -Hn 1048576",
    )
    pids = int(_read("/proc/sys/kernel/pid_max") or 0)
    if pids < 65536:
        yield Finding("limits", "note", f"kernel.pid_max is {pids}", "sysctl -w kernel.pid_max=4194304")


def _oom_score(config: Config) -> Iterator[Finding]:
    # What the kernel says to a process that tries is better than reading capability bits: containers and LSMs refuse as well.
    script = "echo -999 > /proc/self/oom_score_adj"
    tried = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=False, timeout=10)
    if tried.returncode == 0:
        yield Finding("oom_score_adj", "ok", "can be lowered")
        return
    has = bool(_effective() >> caps.NAMES.index("CAP_SYS_RESOURCE") & 1)
    why = "refused" if has else "no CAP_SYS_RESOURCE"
    now = _read("/proc/self/oom_score_adj")
    yield Finding(
        "oom_score_adj",
        "note",
        f"cannot be lowered ({why}): values below {now} and raised hard limits are clamped",
        "run as root on the host itself",
    )


def _directories(config: Config) -> Iterator[Finding]:
    for name, directory in (("root", config.root), ("state", config.state)):
        path = Path(directory)
        if path.exists():
            mode = path.stat().st_mode & 0o777
            wide = "" if mode == 0o700 else f", mode {mode:04o} (the daemon makes it 0700)"
            yield Finding(name, "ok", f"{path}{wide}")
        else:
            yield Finding(name, "ok", f"{path} will be made")
    kind, _ = _mount_of(Path(config.state))
    if kind not in ("tmpfs", "ramfs"):
        yield Finding("state", "note", f"{config.state} is on {kind}, not tmpfs: it survives a reboot for nothing")
    parent = Path(config.root)
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as file:
            os.setxattr(file.name, "trusted.overlay.cri-shim", b"y")
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            yield Finding(
                "root", "fail", f"{parent} takes no trusted.* attributes: {error.strerror}", "use ext4, xfs, btrfs or tmpfs, as root"
            )
        else:
            raise


def _images(config: Config) -> Iterator[Finding]:
    from cri.images import checks

    for line in checks.examine(config.images):
        yield Finding(*line)


def _network(config: Config) -> Iterator[Finding]:
    if config.network.mode == "cni":
        yield from _cni(config)
        return
    version = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=False, timeout=10) if shutil.which("nft") else None
    if version is None:
        yield Finding("nftables", "fail", "no nft program", "apt install nftables")
    else:
        listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False, timeout=10)
        level: Level = "ok" if listed.returncode == 0 else "fail"
        fix = (
            ""
            if listed.returncode == 0
            else f"modprobe nf_tables ({listed.stderr.strip().splitlines()[0] if listed.stderr.strip() else 'no message'})"
        )
        yield Finding("nftables", level, version.stdout.split(" (")[0].strip(), fix)
    for module in ("bridge", "veth"):
        built_in = Path(f"/sys/module/{module}").exists()
        loadable = (
            bool(shutil.which("modprobe")) and subprocess.run(["modprobe", "-n", "-q", module], check=False, timeout=10).returncode == 0
        )
        if not built_in and not loadable:
            # A built-in veth leaves no trace in /sys/module, so this cannot be a failure.
            yield Finding(module, "note", f"no module {module} is loaded or loadable; fine if it is built in")
    forwarding = _read("/proc/sys/net/ipv4/ip_forward")
    writable = os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK) and not os.statvfs("/proc/sys").f_flag & os.ST_RDONLY
    if forwarding == "1":
        yield Finding("forwarding", "ok", "net.ipv4.ip_forward is 1")
    elif writable:
        yield Finding(
            "forwarding", "note", "net.ipv4.ip_forward is 0; the daemon turns it on", "sysctl -w net.ipv4.ip_forward=1, to have it at boot"
        )
    else:
        yield Finding(
            "forwarding", "fail", "net.ipv4.ip_forward is 0 and /proc/sys is read-only", "sysctl -w net.ipv4.ip_forward=1 on the host"
        )


def _cni(config: Config) -> Iterator[Finding]:
    from cri.errors import CriError
    from cri.network.cni import conf
    from cri.network.cni.execute import Plugins

    cni = config.network.cni
    try:
        network, problems = conf.load(Path(cni.conf_dir))
    except conf.ConfError as error:
        network, problems = None, [str(error)]
    for problem in problems:
        yield Finding("cni", "note", problem, "correct it, or remove it")
    if network is None:
        yield Finding(
            "cni",
            "note",
            f"no network in {cni.conf_dir}: pods need host network until there is one",
            'install a CNI network, or set mode = "bridge" under [network]',
        )
        return
    yield Finding("cni", "ok", f"network {network.name} of {network.source}, CNI {', '.join(network.versions)}")
    plugins = Plugins(cni.bin_dirs, cni.timeout)
    for kind in sorted({kind for plugin in network.plugins for kind in plugin.types}):
        try:
            plugins.find(kind)
        except CriError as error:
            yield Finding("cni", "fail", str(error), "apt install containernetworking-plugins has the standard ones")


def _fuse(config: Config) -> Iterator[Finding]:
    if not Path("/dev/fuse").exists():
        yield Finding("fuse", "note", "no /dev/fuse: containers that ask for it will not start", "modprobe fuse")
    else:
        yield Finding("fuse", "ok", "/dev/fuse")


def _security_modules(config: Config) -> Iterator[Finding]:
    active = [m for m in _read("/sys/kernel/security/lsm").split(",") if m in ("apparmor", "selinux")]
    yield Finding("lsm", "ok", ", ".join(active) or "neither AppArmor nor SELinux is active")
    if "apparmor" in active and apparmor.parser() is None:
        yield Finding("apparmor", "note", "no apparmor_parser: containers get no default profile", "apt install apparmor")
    if "selinux" in active and selinux_contexts() is None:
        yield Finding("selinux", "note", "no lxc_contexts: containers are not labelled", "apt install selinux-policy-default")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cdi(config: Config) -> Iterator[Finding]:
    if not config.runtime.enable_cdi:
        return
    from cri.cdi.registry import Registry

    devices, problems = Registry(config.runtime.cdi_spec_dirs).survey()
    for problem in problems:
        yield Finding("cdi", "note", problem, "devices of this file cannot be used until it is mended")
    if devices:
        yield Finding("cdi", "ok", f"{len(devices)} devices: {', '.join(devices[:8])}{', …' if len(devices) > 8 else ''}")
