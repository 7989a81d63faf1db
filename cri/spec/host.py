"""The host's facts, looked up. The only module here that touches the machine."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Iterator

from cri.spec.inputs import HostFacts
from cri.spec.selinux import Contexts, parse_contexts
from shim.errors import Failure
from shim.linux import caps, libc
from shim.oci import spec as oci

_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_FILE_LIMIT = 1 << 20  # of profiles, hosts and resolv.conf
# File systems of their own that every container gets fresh, and links into /proc.
_SKIP = frozenset({"pts", "shm", "mqueue", "fd", ".lxc", ".lxd-mounts", ".udev"})


def detect(*, cgroup_version: int, cgroup_driver: str, controllers: frozenset[str], swap: bool) -> HostFacts:
    """Facts that stay for the life of the daemon, and functions for those that do not."""
    machine = os.uname()
    release = re.match(r"([0-9]+)\.([0-9]+)", machine.release)
    if release is None:
        raise Failure("detect host", "uname", message=f"release {machine.release!r} has no version")
    return HostFacts(
        cgroup_version=cgroup_version,
        cgroup_driver=cgroup_driver,
        hostname=socket.gethostname(),
        arch=machine.machine,
        kernel=(int(release[1]), int(release[2])),
        capabilities=caps.NAMES[: caps.last_cap() + 1],
        swap=swap,
        hugetlb="hugetlb" in controllers,
        hugepage_sizes=hugepage_sizes(),
        seccomp=os.path.exists("/proc/sys/kernel/seccomp/actions_avail"),
        apparmor=_first_byte("/sys/module/apparmor/parameters/enabled") == b"Y",
        apparmor_loaded=apparmor_loaded,
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
        selinux_contexts=selinux_contexts() if os.path.exists("/sys/fs/selinux/enforce") else None,
        recursive_read_only=recursive_read_only(),
        resctrl=os.path.exists("/sys/fs/resctrl/schemata"),
        ipv6=os.path.exists("/proc/sys/net/ipv6/conf/default/accept_ra"),
        read=read_file,
        devices=devices,
        propagation=propagation,
    )


def hugepage_sizes(directory: str = "/sys/kernel/mm/hugepages") -> frozenset[str]:
    """``hugepages-2048kB`` and its like as cgroup files and CRI name them: 2MB."""
    found = set()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return frozenset()
    for name in names:
        match = re.fullmatch(r"hugepages-([0-9]+)kB", name)
        if match is not None:
            size, unit = int(match[1]), 0
            while size % 1024 == 0 and unit < 2:
                size, unit = size // 1024, unit + 1
            found.add(f"{size}{('KB', 'MB', 'GB')[unit]}")
    return frozenset(found)


def recursive_read_only() -> bool:
    """Whether mount_setattr(2) is there and may be called: asked for nothing, it says EINVAL (ENOSYS or EPERM: a filter above us)."""
    try:
        libc.syscall(libc.NR["mount_setattr"], -1, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, 0, 0)
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def apparmor_loaded(name: str) -> bool:
    """Whether the kernel has a profile of that name. Raises OSError where securityfs is not mounted."""
    with open("/sys/kernel/security/apparmor/profiles", encoding="utf-8", errors="replace") as file:
        return any(line.rpartition(" (")[0] == name for line in file)


def selinux_contexts(directory: str = "/etc/selinux") -> Contexts | None:
    """What the policy that ``config`` names says of containers."""
    try:
        settings = read_file(f"{directory}/config").decode(errors="replace")
        kind = re.search(r"^SELINUXTYPE=[ \t]*([A-Za-z0-9_.-]+)", settings, re.MULTILINE)
        if kind is None:
            return None
        return parse_contexts(read_file(f"{directory}/{kind[1]}/contexts/lxc_contexts").decode(errors="replace"))
    except FileNotFoundError:
        return None


def read_file(path: str) -> bytes:
    """A regular file of at most 1 MiB; a FIFO or device at the path must not hang or flood the daemon."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _FILE_LIMIT:
            raise OSError(22, f"not a regular file of at most {_FILE_LIMIT} bytes", path)
        parts = []
        while part := os.read(fd, _FILE_LIMIT):
            parts.append(part)
            if sum(map(len, parts)) > _FILE_LIMIT:
                raise OSError(27, f"more than {_FILE_LIMIT} bytes", path)
        return b"".join(parts)
    finally:
        os.close(fd)


def devices(path: str) -> tuple[oci.Device, ...]:
    """The device ``path`` leads to, under the name it was asked by; for a directory all devices below it."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        return tuple(_below(path))
    return tuple(_device(path, status))


def _below(directory: str) -> Iterator[oci.Device]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name in _SKIP or entry.is_symlink():
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path)
            else:
                yield from _device(entry.path, entry.stat(follow_symlinks=False))


def _device(path: str, status: os.stat_result) -> Iterator[oci.Device]:
    kind = "c" if stat.S_ISCHR(status.st_mode) else "b" if stat.S_ISBLK(status.st_mode) else ""
    if kind:
        number = status.st_rdev
        yield oci.Device(path, kind, os.major(number), os.minor(number), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def propagation(path: str) -> str:
    """How the mount that ``path`` is on takes part in propagation: "shared", "slave" (perhaps both: shared) or "private"."""
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return propagation_in(file.read(), real)


def propagation_in(mountinfo: str, path: str) -> str:
    """The same from a /proc/<pid>/mountinfo text; of two mounts on one directory the later is the one that is seen."""
    best, found = -1, "private"
    for line in mountinfo.splitlines():
        parts = line.split(" ")
        point = _unescape(parts[4])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            optional = parts[6 : parts.index("-", 6)]
            best = len(point)
            found = next(
                (kind for tag, kind in (("shared:", "shared"), ("master:", "slave")) if any(o.startswith(tag) for o in optional)), "private"
            )
    return found


def _unescape(text: str) -> str:
    """mountinfo writes white space and backslashes as three octal digits."""
    if "\\" not in text:
        return text
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _first_byte(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1)
    except FileNotFoundError:
        return b""
