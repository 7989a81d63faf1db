"""Deleting file trees whose shape and names a container chose.

``shutil.rmtree`` recurses and holds one descriptor for each level: a directory chain of a thousand levels, which any container can make,
would never go away, nor would anything that is deleted after it. Here the depth is bounded: what lies deeper is moved up first.
Every step is below a descriptor that is held and follows no link, so whoever still has a descriptor in the tree (it can be passed to
another container) and renames things in it leads nothing out of it.
"""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEPTH: Final = 64  # descriptors held at most
_ROUNDS: Final = 16  # of looking again at the top, for what somebody added below it while we were there


@dataclass(slots=True)
class _Level:
    fd: int
    name: str  # in the level above
    names: list[str] = field(default_factory=list)
    rounds: int = 0

    def look(self) -> bool:
        """Find what there is (again); False if nothing."""
        self.rounds += 1
        self.names = os.listdir(self.fd)
        return bool(self.names)


def delete(path: Path) -> None:
    """Delete a directory with all that is in it; its absence is fine. Raises OSError for what cannot be deleted."""
    try:
        top = os.open(path, _FLAGS)
    except FileNotFoundError:
        return
    levels = [_Level(top, "")]
    try:
        _empty(levels)
    finally:
        for level in levels:
            os.close(level.fd)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def _empty(levels: list[_Level]) -> None:
    """Depth first; ``levels`` is what is open, the caller's to close."""
    serial = itertools.count()
    levels[0].look()
    while True:
        level = levels[-1]
        if level.names:
            _step(levels, level.names.pop(), serial)
        elif len(levels) == 1:
            if level.rounds >= _ROUNDS or not level.look():
                return
        else:
            levels.pop()
            os.close(level.fd)
            _rmdir(level.name, levels[-1])


def _step(levels: list[_Level], name: str, serial: itertools.count[int]) -> None:
    level = levels[-1]
    try:
        os.unlink(name, dir_fd=level.fd)
        return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    try:
        if len(levels) >= _DEPTH:
            moved = f".{os.getpid()}.{next(serial)}"
            os.rename(name, moved, src_dir_fd=level.fd, dst_dir_fd=levels[0].fd)
            levels[0].names.append(moved)
        elif not _rmdir(name, level):
            below = _Level(os.open(name, _FLAGS, dir_fd=level.fd), name)
            levels.append(below)
            below.look()
    except (FileNotFoundError, NotADirectoryError):
        return  # replaced meanwhile: the top finds it again


def _rmdir(name: str, level: _Level) -> bool:
    """Whether it is gone. What is not empty, because nobody has looked yet or somebody added to it, is found again."""
    try:
        os.rmdir(name, dir_fd=level.fd)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True
