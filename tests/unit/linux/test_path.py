"""Paths inside a root that somebody else controls; no privilege needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.linux import path as p


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    fd = os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def where(fd: int, tmp_path: Path) -> str:
    """The path below the root that ``fd`` refers to; closes it."""
    name = os.readlink(f"/proc/self/fd/{fd}")
    os.close(fd)
    assert name.startswith(str(tmp_path / "root"))
    return name.removeprefix(str(tmp_path / "root"))


@pytest.mark.parametrize(
    "links, asked, made",
    [
        ({}, "/a/b/c", "/a/b/c"),
        ({}, "a//./b/", "/a/b"),
        ({}, "/", ""),
        ({"var": "/run"}, "/var/x", "/run/x"),  # dangling, absolute: made inside the root
        ({"var": "../../../../outside"}, "/var/x", "/outside/x"),  # clamped
        ({"a": "b", "b": "c/d"}, "/a/e", "/c/d/e"),
        ({"a": "."}, "/a/a/a/x", "/x"),
        ({"a": "b/../c"}, "/a", None),  # ".." behind a missing part
        ({"a": "a"}, "/a/x", None),
        ({"a": "b", "b": "a"}, "/a/x", None),
        ({}, "/a/../b", None),
    ],
)
def test_mkdir_all(root: int, tmp_path: Path, links: dict[str, str], asked: str, made: str | None) -> None:
    for name, target in links.items():
        os.symlink(target, name, dir_fd=root)
    if made is None:
        with pytest.raises(OSError) as caught:
            p.mkdir_all_in_root(root, asked)
        assert caught.value.errno in (errno.ELOOP, errno.ENOENT)
    else:
        assert where(p.mkdir_all_in_root(root, asked), tmp_path) == made
    assert not list((tmp_path / "outside").iterdir())


def test_dotdot_over_what_exists_is_fine(root: int, tmp_path: Path) -> None:
    os.mkdir("a", dir_fd=root)
    assert where(p.mkdir_all_in_root(root, "/a/../../b"), tmp_path) == "/b"


def test_a_file_in_the_way(root: int) -> None:
    os.close(os.open("file", os.O_CREAT, dir_fd=root))
    for call in (p.mkdir_all_in_root, p.create_file_in_root):
        with pytest.raises(NotADirectoryError):
            call(root, "/file/x")


@pytest.mark.parametrize(
    "links, asked, made",
    [
        ({}, "/etc/hosts", "/etc/hosts"),
        ({"etc": "/usr/etc"}, "/etc/hosts", "/usr/etc/hosts"),
        ({"f": "/g"}, "/f", "/g"),
        ({"f": "../../outside/f"}, "/f", "/outside/f"),
    ],
)
def test_create_file(root: int, tmp_path: Path, links: dict[str, str], asked: str, made: str) -> None:
    for name, target in links.items():
        os.symlink(target, name, dir_fd=root)
    assert where(p.create_file_in_root(root, asked), tmp_path) == made
    assert where(p.create_file_in_root(root, asked), tmp_path) == made  # now it exists
    assert not list((tmp_path / "outside").iterdir())


def test_create_file_gives_up_on_loops_and_directories_of_no_name(root: int) -> None:
    os.symlink("loop", "loop", dir_fd=root)
    for asked in ("/loop", "/missing/.."):
        with pytest.raises(OSError) as caught:
            p.create_file_in_root(root, asked)
        assert caught.value.errno in (errno.ELOOP, errno.ENOENT)


def test_a_fifo_blocks_nobody(root: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root" / "hosts")
    assert where(p.create_file_in_root(root, "/hosts"), tmp_path) == "/hosts"


def test_magic_links_are_refused(root: int, tmp_path: Path) -> None:
    proc = os.open("/proc", os.O_PATH)
    for name in ("self/root/etc", "self/cwd", f"self/fd/{root}"):
        with pytest.raises(OSError) as caught:
            p.open_in_root(proc, name)
        assert caught.value.errno == errno.ELOOP
    os.close(proc)


def test_open_beneath_follows_no_link(root: int) -> None:
    os.symlink("/", "link", dir_fd=root)
    os.mkdir("dir", dir_fd=root)
    os.close(p.open_beneath(root, "dir"))
    with pytest.raises(OSError) as caught:
        p.open_beneath(root, "link", os.O_PATH | os.O_DIRECTORY)
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    with pytest.raises(OSError):
        p.open_beneath(root, "..")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from(["a", "b", "c", "..", ".", "/"]), min_size=1, max_size=4), max_size=3),
    st.lists(st.sampled_from(["a", "b", "c", "..", "x"]), min_size=1, max_size=5),
)
def test_nothing_is_ever_made_outside(tmp_path_factory: pytest.TempPathFactory, links: dict[str, list[str]], asked: list[str]) -> None:
    base = tmp_path_factory.mktemp("walk")
    (base / "root").mkdir()
    root = os.open(base / "root", os.O_PATH | os.O_DIRECTORY)
    try:
        for name, target in links.items():
            os.symlink("/".join(target), name, dir_fd=root)
        for call in (p.mkdir_all_in_root, p.create_file_in_root):
            try:
                fd = call(root, "/".join(asked))
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR):
                    raise
            else:
                assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(base / "root"))
                os.close(fd)
        assert os.listdir(base) == ["root"]
    finally:
        os.close(root)


def test_no_fd_is_left_behind(root: int) -> None:
    os.symlink("nowhere", "link", dir_fd=root)
    before = len(os.listdir("/proc/self/fd"))
    for call in (p.mkdir_all_in_root, p.create_file_in_root):
        for asked in ("/a/b", "/link/c", "/x/../y", "/link/../../z/.."):
            try:
                os.close(call(root, asked))
            except OSError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_atomic(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    p.write_atomic(directory, "record", b"one", sync=True)
    p.write_atomic(directory, "record", b"two", 0o640)
    assert (tmp_path / "record").read_bytes() == b"two"
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o640
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        p.write_atomic(directory, "taken", b"x")
    assert sorted(os.listdir(tmp_path)) == ["record", "taken"]
    os.close(directory)
