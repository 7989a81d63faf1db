"""The CDI files of this node, and what the devices of a request mean.

Files may change at any moment (a driver writes them when it is installed, a DRA driver for every claim): directories are listed for each
request that has devices, and a file is read again when its inode, size or time has changed. All of it may block: call it in a thread.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri.cdi import model
from cri.cdi.model import CdiError, Edits, File
from cri.errors import FailedPrecondition, InvalidArgument

#: Beginning of the annotations that name devices: ``cdi.k8s.io/PLUGIN_ID = "vendor/class=name,…"``.
ANNOTATION: Final = "cdi.k8s.io/"

_SUFFIXES = (".json", ".yaml")
_LIMIT = 16 << 20  # bytes of one file

log = logging.getLogger("cri.cdi")


@dataclass(frozen=True, slots=True)
class _Read:
    """A file as it was when its inode looked like ``signature``."""

    signature: tuple[int, ...]
    file: File | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Who describes a device: the file with the highest priority, or several of one directory, which is nobody."""

    priority: int
    path: str
    file: File
    conflict: str = ""


def requested(devices: Iterable[str], annotations: Mapping[str, str]) -> list[str]:
    """The names that a request has, in its CDI devices and then in its annotations, each once. Raises InvalidArgument."""
    names: dict[str, str] = {name: f"config.CDI_devices[{i}].name" for i, name in enumerate(devices)}
    for key in sorted(annotations):
        if key.startswith(ANNOTATION):
            for name in annotations[key].split(","):
                names.setdefault(name, f"config.annotations[{key!r:.100}]")
    for name, field in names.items():
        try:
            model.qualified(name)
        except CdiError as error:
            raise InvalidArgument(str(error), field=field) from None
    return list(names)


class Registry:
    """All files below the directories; a later directory overrides an earlier one, device by device."""

    def __init__(self, directories: Sequence[str]) -> None:
        self.directories = tuple(directories)
        self._files: dict[str, _Read] = {}

    def resolve(self, names: Sequence[str]) -> tuple[Edits, ...]:
        """The edits of these devices, in order; those of a whole file before its first device's. Raises FailedPrecondition naming every
        device that nobody describes, the directories and the files that cannot be used."""
        table, broken = self._load()
        found: list[Edits] = []
        included: set[str] = set()
        missing: list[str] = []
        for name in names:
            entry = table.get(name)
            if entry is None or entry.conflict:
                missing.append(f"{name} (described by both {entry.path} and {entry.conflict})" if entry else name)
                continue
            if entry.path not in included:
                included.add(entry.path)
                found.append(entry.file.container_edits)
            device = model.qualified(name)[1]
            found.append(next(d.container_edits for d in entry.file.devices if d.name == device))
        if missing:
            text = f"unresolvable CDI devices {', '.join(missing)}; looked in {', '.join(self.directories) or 'no directory'}"
            if broken:
                text += f"; unusable there: {'; '.join(broken)}"
            raise FailedPrecondition(text)
        return tuple(edits for edits in found if edits != Edits())

    def survey(self) -> tuple[list[str], list[str]]:
        """(devices that can be had, what is wrong), for people."""
        table, problems = self._load()
        fine = sorted(name for name, entry in table.items() if not entry.conflict)
        return fine, problems + [f"{n}: described by both {e.path} and {e.conflict}" for n, e in sorted(table.items()) if e.conflict]

    def _load(self) -> tuple[dict[str, _Entry], list[str]]:
        table: dict[str, _Entry] = {}
        broken: list[str] = []
        seen: dict[str, _Read] = {}
        for priority, directory in enumerate(self.directories):
            for path in _listing(directory, broken):
                read = seen[path] = self._read(path)
                if read.file is None:
                    broken.append(f"{path}: {read.error}")
                    continue
                for device in read.file.devices:
                    name = f"{read.file.kind}={device.name}"
                    before = table.get(name)
                    conflict = before.path if before is not None and before.priority == priority else ""
                    table[name] = _Entry(priority, path, read.file, conflict)
        self._files = seen
        return table, broken

    def _read(self, path: str) -> _Read:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            with open(fd, "rb") as file:
                status = os.fstat(fd)
                signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                known = self._files.get(path)
                if known is not None and known.signature == signature:
                    return known
                if not stat.S_ISREG(status.st_mode):
                    return _Read(signature, None, "not a regular file")
                data = file.read(_LIMIT + 1)
        except OSError as error:
            return _Read((), None, error.strerror or str(error))
        try:
            return _Read(signature, parse(path, data))
        except CdiError as error:
            log.warning("CDI file %s cannot be used: %s", path, error)
            return _Read(signature, None, str(error))


def parse(path: str, data: bytes) -> File:
    """A file by its name's ending. Raises CdiError."""
    if len(data) > _LIMIT:
        raise CdiError("", f"longer than {_LIMIT} bytes")
    try:
        tree = json.loads(data) if path.endswith(".json") else _yaml(data)
    except (ValueError, RecursionError) as error:
        raise CdiError("", f"not {'JSON' if path.endswith('.json') else 'YAML'}: {error}"[:300]) from None
    return model.parse(tree)


def _yaml(data: bytes) -> object:
    import yaml  # a node without YAML files never needs it

    try:
        return yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _listing(directory: str, broken: list[str]) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        broken.append(f"{directory}: {error.strerror}")
        return []
    return [str(Path(directory, name)) for name in names if name.endswith(_SUFFIXES) and not name.startswith(".")]
