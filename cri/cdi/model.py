"""One CDI file as frozen types, and everything that can be wrong with it. Pure.

Decoding is strict about types and about unknown keys: a key that is not understood is an edit that would silently not be made. Each
field may be used from the version on that brought it, as the reference implementation checks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

#: Versions of the specification, oldest first.
VERSIONS: Final = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
HOOKS: Final = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
NO_PERMISSIONS: Final = "none"

_MAX_ID = 2**32 - 2
_VENDOR = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")
_CLASS = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_INTERFACE = re.compile(r"[^/:\s\0]{1,15}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class CdiError(Exception):
    """A file or a name that is no CDI: ``where`` in it (dotted, may be empty) and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}" if where else why)


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """An object of the file."""


class DeviceNode(_Part, frozen=True):
    path: str
    host_path: str = ""
    type: str = ""
    major: int | None = 0
    minor: int | None = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class NetDevice(_Part, frozen=True):
    host_interface_name: str
    name: str


class Mount(_Part, frozen=True):
    host_path: str
    container_path: str
    type: str = ""
    options: tuple[str, ...] | None = ()


class Hook(_Part, frozen=True):
    hook_name: str
    path: str
    args: tuple[str, ...] | None = ()
    env: tuple[str, ...] | None = ()
    timeout: int | None = None  # seconds


class IntelRdt(_Part, frozen=True):
    clos_id: str = msgspec.field(default="", name="closID")
    l3_cache_schema: str = msgspec.field(default="", name="l3CacheSchema")
    mem_bw_schema: str = ""
    schemata: tuple[str, ...] | None = ()
    enable_monitoring: bool = False
    enable_cmt: bool = msgspec.field(default=False, name="enableCMT")
    enable_mbm: bool = msgspec.field(default=False, name="enableMBM")


class Edits(_Part, frozen=True):
    """``containerEdits``, of a device or of the whole file."""

    env: tuple[str, ...] | None = ()
    device_nodes: tuple[DeviceNode, ...] | None = ()
    net_devices: tuple[NetDevice, ...] | None = ()
    mounts: tuple[Mount, ...] | None = ()
    hooks: tuple[Hook, ...] | None = ()
    intel_rdt: IntelRdt | None = None
    additional_gids: tuple[int, ...] | None = ()


class Device(_Part, frozen=True):
    name: str
    annotations: dict[str, str] | None = None
    container_edits: Edits = Edits()


class File(_Part, frozen=True):
    """A whole file."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...]
    annotations: dict[str, str] | None = None
    container_edits: Edits = Edits()


def parse(tree: object) -> File:
    """The file whose JSON or YAML ``tree`` is. Raises CdiError naming the field."""
    try:
        file = msgspec.convert(tree, File)
    except (msgspec.ValidationError, RecursionError) as error:
        why, _, where = str(error).partition(" - at `$")
        raise CdiError(where.strip("`."), why[:1].lower() + why[1:]) from None
    _check(file)
    return file


def qualified(name: str) -> tuple[str, str]:
    """(kind, device) of ``vendor/class=device``. Raises CdiError."""
    kind, equals, device = name.partition("=")
    if not equals:
        raise CdiError("", f"{name!r:.200} is not of the form vendor/class=device")
    _kind(kind, "")
    if not _NAME.fullmatch(device):
        raise CdiError("", f"{name!r:.200}: {device!r:.100} is not the name of a device")
    return kind, device


def _check(file: File) -> None:
    version = file.cdi_version.removeprefix("v")
    if version not in VERSIONS:
        raise CdiError("cdiVersion", f"version {file.cdi_version!r:.40} is not one of {', '.join(VERSIONS)}")
    _kind(file.kind, "kind")
    if not file.devices:
        raise CdiError("devices", "empty")
    names: set[str] = set()
    for i, device in enumerate(file.devices):
        if not _NAME.fullmatch(device.name):
            raise CdiError(f"devices[{i}].name", f"{device.name!r:.100} is not the name of a device")
        if device.name in names:
            raise CdiError(f"devices[{i}].name", f"{device.name!r:.100} is there twice")
        names.add(device.name)
        if device.container_edits == Edits():
            raise CdiError(f"devices[{i}].containerEdits", "empty")
        _edits(device.container_edits, f"devices[{i}].containerEdits")
    _edits(file.container_edits, "containerEdits")
    for where, least in _needs(file):
        if VERSIONS.index(least) > max(VERSIONS.index(version), VERSIONS.index("0.3.0")):
            raise CdiError(where, f"needs version {least} of the specification, the file says {version}")


def _kind(kind: str, where: str) -> None:
    vendor, slash, name = kind.partition("/")
    if not slash or not _VENDOR.fullmatch(vendor) or not _CLASS.fullmatch(name):
        raise CdiError(where, f"{kind!r:.200} is not of the form vendor/class")


def _edits(edits: Edits, at: str) -> None:
    for i, variable in enumerate(edits.env or ()):
        _variable(variable, f"{at}.env[{i}]")
    for i, node in enumerate(edits.device_nodes or ()):
        _node(node, f"{at}.deviceNodes[{i}]")
    for i, mount in enumerate(edits.mounts or ()):
        _path(mount.host_path, f"{at}.mounts[{i}].hostPath")
        _path(mount.container_path, f"{at}.mounts[{i}].containerPath")
        for option in mount.options or ():
            if not option or _CONTROL.search(option):
                raise CdiError(f"{at}.mounts[{i}].options", f"{option!r:.80} is no option")
    for i, hook in enumerate(edits.hooks or ()):
        _hook(hook, f"{at}.hooks[{i}]")
    _net_devices(edits.net_devices or (), f"{at}.netDevices")
    if edits.intel_rdt is not None:
        name = edits.intel_rdt.clos_id
        if name != "/" and (name in (".", "..") or "/" in name or len(name) > 255 or _CONTROL.search(name)):
            raise CdiError(f"{at}.intelRdt.closID", f"{name!r:.80} is not the name of a directory")
    for i, gid in enumerate(edits.additional_gids or ()):
        if not 0 <= gid <= _MAX_ID:
            raise CdiError(f"{at}.additionalGids[{i}]", f"{gid} is outside 0..{_MAX_ID}")


def _variable(text: str, where: str) -> None:
    if text.find("=") < 1 or "\0" in text:
        raise CdiError(where, f"{text!r:.80} is not of the form NAME=value")


def _path(path: str, where: str) -> None:
    if not path.startswith("/") or _CONTROL.search(path):
        raise CdiError(where, f"{path!r:.200} is not an absolute path")


def _node(node: DeviceNode, at: str) -> None:
    _path(node.path, f"{at}.path")
    if node.host_path:
        _path(node.host_path, f"{at}.hostPath")
    if node.type not in ("", "b", "c", "u", "p"):
        raise CdiError(f"{at}.type", f"{node.type!r:.20} is not b, c, u or p")
    if not (0 <= (node.major or 0) < 2**12 and 0 <= (node.minor or 0) < 2**20):
        raise CdiError(f"{at}.major", f"{node.major}:{node.minor} is no device number")
    if node.file_mode is not None and not 0 <= node.file_mode < 2**32:
        raise CdiError(f"{at}.fileMode", f"{node.file_mode} is no mode")
    if node.permissions != NO_PERMISSIONS and set(node.permissions) - set("rwm"):
        raise CdiError(f"{at}.permissions", f"{node.permissions!r:.20} is not of r, w and m")
    for name, number in (("uid", node.uid), ("gid", node.gid)):
        if number is not None and not 0 <= number <= _MAX_ID:
            raise CdiError(f"{at}.{name}", f"{number} is outside 0..{_MAX_ID}")


def _hook(hook: Hook, at: str) -> None:
    if hook.hook_name not in HOOKS:
        raise CdiError(f"{at}.hookName", f"{hook.hook_name!r:.40} is not one of {', '.join(HOOKS)}")
    _path(hook.path, f"{at}.path")
    for i, variable in enumerate(hook.env or ()):
        _variable(variable, f"{at}.env[{i}]")
    if any("\0" in argument for argument in hook.args or ()):
        raise CdiError(f"{at}.args", "has a NUL")
    if hook.timeout is not None and not 0 < hook.timeout < 2**31:
        raise CdiError(f"{at}.timeout", f"{hook.timeout} is not a positive number of seconds")


def _net_devices(devices: tuple[NetDevice, ...], at: str) -> None:
    seen: set[tuple[str, str]] = set()
    for i, device in enumerate(devices):
        for field, name in (("hostInterfaceName", device.host_interface_name), ("name", device.name)):
            if not _INTERFACE.fullmatch(name) or name in (".", ".."):
                raise CdiError(f"{at}[{i}].{field}", f"{name!r:.40} is not the name of an interface")
            if (field, name) in seen:
                raise CdiError(f"{at}[{i}].{field}", f"{name!r:.40} is there twice")
            seen.add((field, name))


def _needs(file: File) -> Iterator[tuple[str, str]]:
    """(field, version that brought it) of whatever is newer than 0.3.0."""
    if file.annotations:
        yield "annotations", "0.6.0"
    if "." in file.kind.partition("/")[2]:
        yield "kind", "0.6.0"
    every: list[tuple[str, Edits]] = [("containerEdits", file.container_edits)]
    for i, device in enumerate(file.devices):
        if device.annotations:
            yield f"devices[{i}].annotations", "0.6.0"
        if not device.name[0].isalpha():
            yield f"devices[{i}].name", "0.5.0"
        every.append((f"devices[{i}].containerEdits", device.container_edits))
    for at, edits in every:
        yield from _needs_of(edits, at)


def _needs_of(edits: Edits, at: str) -> Iterator[tuple[str, str]]:
    rdt = edits.intel_rdt
    found: tuple[tuple[str, str, Any], ...] = (
        ("mounts.type", "0.4.0", any(mount.type for mount in edits.mounts or ())),
        ("deviceNodes.hostPath", "0.5.0", any(node.host_path for node in edits.device_nodes or ())),
        ("intelRdt", "0.7.0", rdt is not None),
        ("additionalGids", "0.7.0", edits.additional_gids),
        ("netDevices", "1.1.0", edits.net_devices),
        ("intelRdt.schemata", "1.1.0", rdt is not None and (rdt.schemata or rdt.enable_monitoring)),
        ("deviceNodes.permissions", "1.1.0", any(node.permissions == NO_PERMISSIONS for node in edits.device_nodes or ())),
    )
    for field, version, used in found:
        if used:
            yield f"{at}.{field}", version
