"""Deleting trees that somebody made to be hard to delete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cri.state import trees


def chain(top: Path, depth: int, width: int = 0) -> None:
    """Directories in directories; by descriptor, because no path is that long."""
    fd = os.open(top, os.O_RDONLY)
    for level in range(depth):
        for number in range(width):
            os.mkdir(f"side{number}", dir_fd=fd)
            os.close(os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("d" * (1 + level % 200), dir_fd=fd)
        below = os.open("d" * (1 + level % 200), os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


@pytest.mark.parametrize(("depth", "width"), [(0, 0), (3, 2), (63, 0), (64, 1), (65, 1), (5000, 0), (300, 3)])
def test_however_deep(tmp_path: Path, depth: int, width: int) -> None:
    top = tmp_path / "top"
    top.mkdir()
    chain(top, depth, width)
    before = len(os.listdir("/proc/self/fd"))
    trees.delete(top)
    assert not top.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_absent_is_fine_and_links_are_not_followed(tmp_path: Path) -> None:
    trees.delete(tmp_path / "none")
    keep, top = tmp_path / "keep", tmp_path / "top"
    keep.mkdir()
    (keep / "file").touch()
    (top / "a").mkdir(parents=True)
    (top / "a" / "link").symlink_to(keep)
    (top / "dangling").symlink_to("/does/not/exist")
    os.mkfifo(top / "a" / "fifo")
    trees.delete(top)
    assert not top.exists() and (keep / "file").exists()
    (tmp_path / "alias").symlink_to(keep)
    with pytest.raises(OSError, match="alias"):
        trees.delete(tmp_path / "alias")
    assert (keep / "file").exists()
