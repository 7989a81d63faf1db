"""The processes of a group as /proc shows them: descriptors, sockets, limits. Slow with many; call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import islice
from typing import Final, NamedTuple

# How much of one container is looked at: a container decides how many processes and descriptors there are. The sums end there.
_PROCESSES: Final = 4096
_DESCRIPTORS: Final = 20_000
_GONE: Final = (FileNotFoundError, ProcessLookupError)


class Processes(NamedTuple):
    """Sums over a group. ``open_files`` is the soft limit of the first process, None for no limit or no process."""

    processes: int = 0
    threads: int = 0
    descriptors: int = 0
    sockets: int = 0
    open_files: int | None = None


def read(pids: Collection[int], first: int) -> Processes:
    """What the processes hold; those that have ended meanwhile hold nothing."""
    threads = descriptors = sockets = 0
    for pid in islice(pids, _PROCESSES):
        try:
            process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except _GONE:
            continue
        try:
            # The size of the directory is their number, since Linux 6.2; before, it is 0.
            count = os.stat("fd", dir_fd=process).st_size
            names = _list(process, "fd", max(_DESCRIPTORS - descriptors, 0))
            threads += len(_list(process, "task", _PROCESSES))
            sockets += _sockets(process, names)
            descriptors += max(count, len(names))
        except _GONE:
            continue
        finally:
            os.close(process)
    return Processes(len(pids), threads, descriptors, sockets, _open_files(first))


def _list(process: int, name: str, most: int) -> list[str]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in islice(entries, most)]
    finally:
        os.close(fd)


def _sockets(process: int, names: list[str]) -> int:
    found = 0
    for name in names:
        try:
            found += os.readlink(f"fd/{name}", dir_fd=process).startswith("socket:")
        except _GONE:
            continue  # closed meanwhile
    return found


def _open_files(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as file:
            text = file.read()
    except _GONE:
        return None
    return soft_limit(text, "Max open files")


def soft_limit(limits: str, name: str) -> int | None:
    """From /proc/<pid>/limits; None for ``unlimited`` and for a name that is not there."""
    for line in limits.splitlines():
        if line.startswith(name):
            value = line[len(name) :].split()[0]
            return int(value) if value.isdigit() else None
    return None
