"""Mount options as in fstab(5) and the OCI specification, sorted into what the kernel takes them as."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from shim.linux import mount as m

_PROPAGATION = {"private": m.MS_PRIVATE, "shared": m.MS_SHARED, "slave": m.MS_SLAVE, "unbindable": m.MS_UNBINDABLE}
PROPAGATION = {prefix + name: (value, bool(prefix)) for name, value in _PROPAGATION.items() for prefix in ("", "r")}

# option: (attributes set, attributes cleared)
_ATTRIBUTES = {
    "ro": (m.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, m.MOUNT_ATTR_RDONLY),
    "nosuid": (m.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, m.MOUNT_ATTR_NOSUID),
    "nodev": (m.MOUNT_ATTR_NODEV, 0),
    "dev": (0, m.MOUNT_ATTR_NODEV),
    "noexec": (m.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, m.MOUNT_ATTR_NOEXEC),
    "nosymfollow": (m.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, m.MOUNT_ATTR_NOSYMFOLLOW),
    "nodiratime": (m.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, m.MOUNT_ATTR_NODIRATIME),
    "relatime": (m.MOUNT_ATTR_RELATIME, m.MOUNT_ATTR_ATIME),
    "norelatime": (m.MOUNT_ATTR_STRICTATIME, m.MOUNT_ATTR_ATIME),
    "noatime": (m.MOUNT_ATTR_NOATIME, m.MOUNT_ATTR_ATIME),
    "atime": (m.MOUNT_ATTR_RELATIME, m.MOUNT_ATTR_ATIME),
    "strictatime": (m.MOUNT_ATTR_STRICTATIME, m.MOUNT_ATTR_ATIME),
    "nostrictatime": (m.MOUNT_ATTR_RELATIME, m.MOUNT_ATTR_ATIME),
}
_RECURSIVE = {"r" + name: bits for name, bits in _ATTRIBUTES.items()}
_IGNORED = frozenset(("defaults", "async", "loud", "silent", "remount", "auto", "noauto", "user", "nouser", "_netdev", ""))


@dataclass(slots=True)
class Options:
    """What a list of options means. The last of two that contradict each other counts, as for mount(8)."""

    bind: bool = False
    recursive: bool = False
    set: int = 0
    clear: int = 0
    recursive_set: int = 0
    recursive_clear: int = 0
    propagation: int = 0
    copyup: bool = False
    idmap: bool = False
    idmap_recursive: bool = False
    data: dict[str, str | None] = field(default_factory=dict)

    def attribute(self, bits: tuple[int, int]) -> None:
        on, off = bits
        self.set = self.set & ~off | on
        self.clear = self.clear & ~on | off

    def recursive_attribute(self, bits: tuple[int, int]) -> None:
        on, off = bits
        self.recursive_set = self.recursive_set & ~off | on
        self.recursive_clear = self.recursive_clear & ~on | off


@lru_cache(maxsize=256)
def parse(options: tuple[str, ...]) -> Options:
    """Every option is either known here or belongs to the file system: what is left ends up in ``data``. The result is shared between
    mounts with the same options; nobody changes it."""
    result = Options()
    for option in options:
        if (bits := _ATTRIBUTES.get(option)) is not None:
            result.attribute(bits)
        elif (propagation := PROPAGATION.get(option)) is not None:
            result.propagation = propagation[0]
        elif option == "rbind":
            result.bind = result.recursive = True
        elif option == "bind":
            result.bind = True
        elif (bits := _RECURSIVE.get(option)) is not None:
            result.recursive_attribute(bits)
        elif option in ("copyup", "tmpcopyup"):
            result.copyup = True
        elif option in ("idmap", "ridmap"):
            result.idmap, result.idmap_recursive = True, option == "ridmap"
        elif option not in _IGNORED:
            key, equals, value = option.partition("=")
            result.data[key] = value if equals else None
    return result
