"""Paths inside an untrusted root, resolved by the kernel through the root's fd.

Whoever controls the root may rename, link and mount while we look (CVE-2021-30465, CVE-2024-45310): so nothing is checked by name and
used by name. ``openat2`` with RESOLVE_IN_ROOT clamps ".." and absolute symlinks to the root atomically, magic links are refused
always, and missing parts are made one by one below an fd already held.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from itertools import count

from shim.linux import libc

RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16

_O_PATH, _O_DIRECTORY, _O_NOFOLLOW = os.O_PATH, os.O_DIRECTORY, os.O_NOFOLLOW
_PROC_SUPER_MAGIC = 0x9FA0
_RACES = 256  # a busy host renames all the time, and each rename anywhere can make one lookup with ".." fail
_LINKS = 40  # the kernel's own limit (MAXSYMLINKS)
_serial = count()


def open_in_root(root: int, path: str, flags: int = _O_PATH, mode: int = 0, *, resolve: int = 0, no_magiclinks: bool = True) -> int:
    """Open ``path`` as a process chrooted at the fd ``root`` would see it. Additional RESOLVE_ flags in ``resolve``."""
    resolve |= RESOLVE_IN_ROOT | (RESOLVE_NO_MAGICLINKS if no_magiclinks else 0)
    for _ in range(_RACES):
        try:
            return libc.openat2(root, path or ".", flags, mode, resolve)
        except BlockingIOError:  # EAGAIN
            os.sched_yield()
    raise OSError(errno.EAGAIN, "path kept changing while it was resolved", path)


def open_beneath(directory: int, name: str, flags: int = _O_PATH, mode: int = 0) -> int:
    """Open one component, or several, below an fd that is held; a symlink there is ELOOP."""
    return libc.openat2(directory, name, flags | _O_NOFOLLOW, mode, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)


def _components(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def mkdir_all_in_root(root: int, path: str, mode: int = 0o755) -> int:
    """An O_PATH fd of the directory, its missing parts made with ``mode`` (under the umask).

    A symlink to something missing is followed inside the root and made there, as /var/run → /run in images needs. ".." behind a missing
    part is ENOENT. A part that is not a directory is ENOTDIR.
    """
    try:
        return open_in_root(root, path, _O_PATH | _O_DIRECTORY)
    except FileNotFoundError:
        pass
    for _ in range(_LINKS):
        result = _make_from(root, _components(path), mode)
        if isinstance(result, int):
            return result
        path = result
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _make_from(root: int, parts: list[str], mode: int) -> int | str:
    """Make what is missing of ``parts``; or, where a dangling symlink stands in the way, the path with that link expanded."""
    directory, known = _longest_prefix(root, parts)
    try:
        for index in range(known, len(parts)):
            name = parts[index]
            if name == "..":
                raise FileNotFoundError(errno.ENOENT, "'..' behind a missing directory", "/".join(parts))
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=directory)
            try:
                child = open_beneath(directory, name, _O_PATH | _O_DIRECTORY)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                return _expand(directory, parts, index)
            os.close(directory)
            directory = child
        result, directory = directory, -1
        return result
    finally:
        if directory >= 0:
            os.close(directory)


def _longest_prefix(root: int, parts: list[str]) -> tuple[int, int]:
    """(fd, n): the directory that the first n parts lead to, for the largest n that exists."""
    for known in range(len(parts) - 1, 0, -1):
        try:
            return open_in_root(root, "/".join(parts[:known]), _O_PATH | _O_DIRECTORY), known
        except FileNotFoundError:
            continue
    return open_in_root(root, ".", _O_PATH | _O_DIRECTORY), 0


def _expand(directory: int, parts: list[str], index: int) -> str:
    if libc.fstatfs_type(directory) == _PROC_SUPER_MAGIC:
        # The text of a magic link names a file of the host or of ours, and creating that path in the root is nobody's wish.
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), "/".join(parts))
    try:
        target = os.readlink(parts[index], dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a link: a file where a directory is needed
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/".join(parts[: index + 1])) from None
        raise
    before = [] if target.startswith("/") else parts[:index]
    return "/".join([*before, target, *parts[index + 1 :]])


def create_file_in_root(root: int, path: str, mode: int = 0o644) -> int:
    """An O_PATH fd of ``path``; where nothing is there, an empty file is made, with its directories. Nothing that exists is opened for
    reading or writing, so a FIFO or device planted there blocks nobody."""
    for _ in range(_LINKS):
        try:
            return open_in_root(root, path, _O_PATH)
        except FileNotFoundError:
            pass
        parts = _components(path)
        if not parts or parts[-1] == "..":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        directory = mkdir_all_in_root(root, "/".join(parts[:-1]))
        try:
            os.close(os.open(parts[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory))
            return open_beneath(directory, parts[-1])
        except FileExistsError:  # a dangling symlink, or somebody was faster
            try:
                path = _expand(directory, parts, len(parts) - 1)
            except NotADirectoryError:
                continue
        finally:
            os.close(directory)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def write_atomic(directory: int, name: str, data: bytes, mode: int = 0o600, *, sync: bool = False) -> None:
    """Replace ``name`` in the directory fd by a file holding ``data``, whole or not at all; ``sync``: also after a power cut."""
    temporary = f".{name}.{os.getpid()}.{next(_serial)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(temporary, dir_fd=directory)
        raise
    if sync:
        os.fsync(directory)
