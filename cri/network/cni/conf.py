"""Network configurations as CNI defines them (SPEC.md section 1): parsed and checked, not interpreted. Pure but for ``load``.

A configuration belongs to the plugins: fields that we do not know are passed on unchanged, so it stays the JSON object that it was. What
is refused here could run something else than a plugin or write outside of our directories (CVE-2021-20206: a type ``../../bin/x``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

#: The newest version of the protocol that is spoken here; every older one is, too.
NEWEST = "1.1.0"
OLDEST = "0.1.0"  # what a configuration without a version means
SUFFIXES = (".conf", ".conflist", ".json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})")
_NAME_MAX = 160  # it becomes part of a file name, with a pod id
_SIZE_MAX = 1 << 20

Object = dict[str, Any]


class ConfError(ValueError):
    """A configuration that cannot be used; one line, which quotes nothing of it that could be a secret."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin configuration object."""

    type: str
    capabilities: frozenset[str]
    raw: Mapping[str, Any]

    @property
    def types(self) -> tuple[str, ...]:
        """The plugin and the one that it delegates address management to: both must speak the version that is chosen."""
        ipam = self.raw.get("ipam")
        kind = ipam.get("type") if isinstance(ipam, dict) else None
        return (self.type, kind) if kind else (self.type,)


@dataclass(frozen=True, slots=True)
class NetworkConf:
    """A network: its plugins in the order of ADD. ``versions`` are those that it allows and we speak, newest first."""

    name: str
    versions: tuple[str, ...]
    plugins: tuple[Plugin, ...]
    disable_check: bool = False
    disable_gc: bool = False
    source: str = ""

    def encode(self, version: str) -> bytes:
        """As a configuration list of exactly this version: what is kept until DEL, whatever becomes of the file."""
        fields: Object = {
            "cniVersion": version,
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": True,
            "plugins": [dict(p.raw) for p in self.plugins],
        }
        return json.dumps(fields).encode()


def version_key(version: str) -> tuple[int, int, int]:
    """Sorts versions. Raises ConfError."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise ConfError(f"{version[:40]!r} is not a version of CNI")
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)


def at_least(version: str, other: str) -> bool:
    return version_key(version) >= version_key(other)


def choose_version(allowed: Iterable[str], spoken: Iterable[Collection[str]]) -> str:
    """The newest of ``allowed`` (newest first) that every plugin speaks; empty if there is none."""
    sets = list(spoken)
    return next((v for v in allowed if all(v in s for s in sets)), "")


def decode(data: bytes) -> Object:
    """A JSON object that can also be written again and recorded. Raises ConfError for everything else, however it is broken."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
        msgspec.json.encode(value)  # lone surrogates and giant numbers would fail later, in a record
    except (ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise ConfError(f"not JSON: {_position(error)}") from None
    if not isinstance(value, dict):
        raise ConfError(f"a JSON {type(value).__name__} where an object is expected")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _position(error: Exception) -> str:
    """What is wrong and where, without the text itself."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: line {error.lineno} column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else type(error).__name__


def parse(data: bytes, *, source: str = "", extra: Iterable[Plugin] = ()) -> NetworkConf:
    """A ``.conflist``; ``extra`` are plugins from the directory named after the network. Raises ConfError."""
    raw = decode(data)
    plugins: tuple[Plugin, ...] = ()
    if "plugins" in raw:
        items = raw["plugins"]
        if not isinstance(items, list):
            raise ConfError("plugins: not a list")
        plugins = tuple(parse_plugin(p, f"plugins[{i}]") for i, p in enumerate(items))
    plugins += tuple(extra)
    if not plugins:
        raise ConfError("no plugins in it")
    return _network(raw, plugins, source)


def parse_single(data: bytes, *, source: str = "") -> NetworkConf:
    """A ``.conf`` or ``.json``: one plugin, which is a network of its own."""
    raw = decode(data)
    if "type" not in raw and "plugins" in raw:
        raise ConfError("a configuration list: its name must end in .conflist")
    return _network(raw, (parse_plugin(raw, ""),), source)


def _network(raw: Mapping[str, Any], plugins: tuple[Plugin, ...], source: str) -> NetworkConf:
    return NetworkConf(
        name=_network_name(raw),
        versions=_versions(raw),
        plugins=plugins,
        disable_check=_flag(raw, "disableCheck"),
        disable_gc=_flag(raw, "disableGC"),
        source=source,
    )


def _network_name(raw: Mapping[str, Any]) -> str:
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfError("name: must begin with a letter or digit and have only letters, digits, '_', '.' and '-'")
    if len(name) > _NAME_MAX:
        raise ConfError(f"name: longer than {_NAME_MAX} characters")
    return name


def _versions(raw: Mapping[str, Any]) -> tuple[str, ...]:
    single, several = raw.get("cniVersion", ""), raw.get("cniVersions", [])
    if not isinstance(single, str):
        raise ConfError("cniVersion: not a string")
    if not isinstance(several, list) or not all(isinstance(v, str) for v in several):
        raise ConfError("cniVersions: not a list of strings")
    named = {*several, single} - {""} or {OLDEST}
    usable = [v for v in named if version_key(v) <= version_key(NEWEST)]
    if not usable:
        raise ConfError(f"cniVersion: {', '.join(sorted(named))} is newer than {NEWEST}")
    return tuple(sorted(usable, key=version_key, reverse=True))


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):  # libcni takes these
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfError(f"{key}: neither true nor false")
    return value


def parse_plugin(raw: object, where: str) -> Plugin:
    """One plugin configuration object. Raises ConfError."""
    prefix = f"{where}." if where else ""
    if not isinstance(raw, dict):
        raise ConfError(f"{where or 'plugin'}: not an object")
    kind = _type(raw.get("type"), f"{prefix}type")
    ipam = raw.get("ipam")
    if isinstance(ipam, dict) and ipam.get("type"):
        _type(ipam["type"], f"{prefix}ipam.type")  # the plugin runs it, from CNI_PATH
    capabilities = raw.get("capabilities") or {}
    if not isinstance(capabilities, dict) or not all(isinstance(v, bool) for v in capabilities.values()):
        raise ConfError(f"{prefix}capabilities: not an object of true and false")
    return Plugin(kind, frozenset(k for k, on in capabilities.items() if on), raw)


def _type(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfError(f"{where}: missing, or not a string")
    if value in (".", "..") or any(c in "/\\" or not c.isprintable() for c in value) or len(value) > 255:
        raise ConfError(f"{where}: not a plain file name")
    return value


# -- the directory


def files(directory: Path) -> list[Path]:
    """Configuration files, in the order in which they are tried."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(e.path) for e in entries if e.name.endswith(SUFFIXES) and e.is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfError(f"{directory}: {error.strerror}") from None


def load_file(path: Path) -> NetworkConf:
    """The network of one file, with the plugins of the directory beside it that has the network's name. Raises ConfError."""
    data = _read(path)
    if path.suffix != ".conflist":
        return parse_single(data, source=str(path))
    raw = decode(data)
    extra: list[Plugin] = []
    if not _flag(raw, "loadOnlyInlinedPlugins"):
        extra = [parse_plugin(decode(_read(p)), p.name) for p in files(path.parent / _network_name(raw)) if p.suffix == ".conf"]
    elif "plugins" not in raw:
        raise ConfError("loadOnlyInlinedPlugins is true and there are no plugins")
    return parse(data, source=str(path), extra=extra)


def load(directory: Path) -> tuple[NetworkConf | None, list[str]]:
    """The first usable network of a directory, and what is wrong with those before it (with all of them if there is none)."""
    problems: list[str] = []
    for path in files(directory):
        try:
            return load_file(path), problems
        except ConfError as error:
            problems.append(f"{path}: {error}")
    return None, problems


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise ConfError(f"cannot be read: {error.strerror}") from None
    if len(data) > _SIZE_MAX:
        raise ConfError(f"larger than {_SIZE_MAX} bytes")
    return data
