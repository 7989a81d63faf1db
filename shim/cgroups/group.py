"""One container's control group, and the few file operations that every hierarchy needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shim.cgroups.layout import Layout
from shim.cgroups.names import is_scope, scope
from shim.errors import Failure


@dataclass(frozen=True, slots=True)
class Group:
    """``path`` is relative to each hierarchy's mount and starts with a slash; ``paths`` maps controllers to absolute directories.

    In version 2 every controller has the same directory, which is listed once under the empty name. ``unit`` is the scope whose group
    this is, where systemd made it. It then watches a hierarchy of its own on a hybrid machine, in which the group is ``unified``.
    """

    version: int
    path: str
    paths: dict[str, str]
    unit: str = ""
    unified: str = ""

    @property
    def directories(self) -> tuple[str, ...]:
        """Every directory once; controllers that are mounted together share one."""
        return tuple(dict.fromkeys(self.paths.values()))

    def directory(self, controller: str) -> str | None:
        """Where files of that controller are, or None if the machine lacks it."""
        return self.paths[""] if self.version == 2 else self.paths.get(controller)

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"version": self.version, "path": self.path, "paths": self.paths}
        return {**fields, "unit": self.unit, "unified": self.unified} if self.unit else fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Group:
        unit, unified = str(fields.get("unit", "")), str(fields.get("unified", ""))
        return cls(int(fields["version"]), str(fields["path"]), dict(fields["paths"]), unit, unified)


def group_at(layout: Layout, cgroups_path: str) -> Group:
    """The group that ``Linux.cgroups_path`` names, whether or not it exists."""
    unit = unified = ""
    if is_scope(cgroups_path):
        _, unit, path = scope(cgroups_path)
        unified = layout.unified and layout.unified + path
    else:
        path = checked_path(cgroups_path)
    if layout.version == 2:
        return Group(2, path, {"": layout.root + path}, unit)
    return Group(1, path, {controller: mount + path for controller, mount in layout.controllers.items()}, unit, unified)


def checked_path(path: str) -> str:
    """``path`` with a leading and no trailing slash. Raises Failure for one that names a hierarchy's root or leaves it."""
    if is_scope(path):
        raise Failure("create cgroup", path=path, message="this is a path of the systemd driver, and the cgroupfs driver is in use")
    parts = path.strip("/").split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise Failure("create cgroup", path=path, message="not a path below the hierarchy's root")
    return "/" + "/".join(parts)


def write(path: str, value: str) -> None:
    """One write(2), as control files demand. Raises OSError with the path."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def read(path: str) -> str:
    """The whole file. Raises OSError with the path."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = chunk = os.read(fd, 16384)
        while chunk:  # one file can need several reads, and only an empty one ends it
            chunk = os.read(fd, 16384)
            first += chunk
        return first.decode("utf-8", "replace")
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def read_value(path: str) -> str:
    """A file that holds one value, stripped: one read(2) gets it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode("ascii").strip()
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def make(directory: str, made: list[str]) -> None:
    """A fresh directory, its missing parents first; each is added to ``made``. Raises Failure.

    A leftover of a crash keeps its old limits, so an empty one is replaced; one in use is EEXIST.
    """
    try:
        try:
            os.mkdir(directory, 0o755)
        except FileNotFoundError:
            _make_parents(directory, made)
            os.mkdir(directory, 0o755)
        except FileExistsError:
            try:
                os.rmdir(directory)
            except OSError as error:
                raise OSError(errno.EEXIST, "the group exists and is in use", directory) from error
            os.mkdir(directory, 0o755)
    except OSError as error:
        message = "the group exists and is in use" if error.errno == errno.EEXIST else ""
        raise Failure("create cgroup", "mkdir", errno=error.errno, path=directory, message=message) from error
    made.append(directory)


def _make_parents(directory: str, made: list[str]) -> None:
    missing = []
    parent = os.path.dirname(directory)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for parent in reversed(missing):
        try:
            os.mkdir(parent, 0o755)
        except FileExistsError:  # another container of the same pod was faster
            continue
        made.append(parent)


def undo(made: list[str], error: BaseException) -> None:
    """Remove what ``make`` made, the last first; what cannot be removed is told with ``error``."""
    for directory in reversed(made):
        try:
            os.rmdir(directory)
        except OSError as second:
            # Another container of the same new pod may be in a parent by now.
            if second.errno != errno.EBUSY and isinstance(error, Failure):
                error.message += f" (and removing {directory} failed: {second.strerror})"


def tree(directory: str) -> Iterator[str]:
    """``directory`` and the groups below it, children before parents; nothing if it does not exist."""
    try:
        # In cgroup file systems a directory's link count is 2 plus its subdirectories: no listing is needed for a leaf.
        if os.stat(directory).st_nlink > 2:
            with os.scandir(directory) as entries:
                children = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            for child in children:
                yield from tree(child)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return
        raise
    yield directory


def processes(directory: str) -> set[int]:
    """Processes in ``directory`` and below it. Zombies do not count; a group that vanishes meanwhile has none."""
    found: set[int] = set()
    for group in tree(directory):
        try:
            found.update(map(int, read(f"{group}/cgroup.procs").split()))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # version 2, below a threaded domain: only threads are listed
                found.update(_leaders(read(f"{group}/cgroup.threads").split()))
            elif error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    found.discard(0)  # a process outside our PID namespace
    return found


def _leaders(threads: list[str]) -> Iterator[int]:
    for thread in threads:
        try:
            status = read(f"/proc/{thread}/status")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                continue
            raise
        yield int(status.partition("\nTgid:")[2].split(None, 1)[0])
