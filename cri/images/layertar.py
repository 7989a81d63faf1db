"""The archive of one unpacked layer, always the same for the same directory."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import Any, Protocol

from cri.images.apply import allowed

_CHUNK = 1 << 20
_OPAQUE = "trusted.overlay.opaque"
_NONE = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


class Output(Protocol):
    def write(self, data: bytes, /) -> int: ...


def write_layer(directory: str, out: Output) -> None:
    """The tree below ``directory``, by name, in PAX format. No link is followed and nothing outside is looked at."""
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _Layer(root, out).write()
    finally:
        os.close(root)


class _Layer:
    def __init__(self, root: int, out: Output) -> None:
        self._root, self._out = root, out
        self._links: dict[int, str] = {}  # inode → first name
        self._size = 0

    def write(self) -> None:
        pending = ["."]  # popped from the end
        while pending:
            path = pending.pop()
            facts = os.lstat(path, dir_fd=self._root)
            if stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0:
                parent, slash, name = path.rpartition("/")
                self._marker(f"{parent}{slash}.wh.{name}")
                continue
            self._member(path, facts)
            if stat.S_ISDIR(facts.st_mode):
                if self._opaque(path):
                    self._marker(".wh..wh..opq" if path == "." else f"{path}/.wh..wh..opq")
                below = sorted(map(os.fsencode, self._names(path)), reverse=True)
                pending += [os.fsdecode(n) if path == "." else f"{path}/{os.fsdecode(n)}" for n in below]
        end = bytes(2 * tarfile.BLOCKSIZE)
        self._put(end + bytes(-(self._size + len(end)) % tarfile.RECORDSIZE))

    def _names(self, path: str) -> list[str]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def _member(self, path: str, facts: os.stat_result) -> None:
        pax: dict[str, str] = {}
        info = self._info(path, facts, pax)
        if not stat.S_ISDIR(facts.st_mode) and facts.st_nlink > 1:
            first = self._links.setdefault(facts.st_ino, path)
            if first != path:
                info.type, info.linkname, info.size = tarfile.LNKTYPE, first, 0
        if info.type != tarfile.LNKTYPE:
            for name in self._attributes(path):
                value = os.getxattr(self._where(path), name, follow_symlinks=False)
                pax[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
        info.pax_headers = pax
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        if info.type == tarfile.REGTYPE:
            self._data(path, info.size)

    def _info(self, path: str, facts: os.stat_result, pax: dict[str, str]) -> tarfile.TarInfo:
        # tarfile writes the slash that ends a directory's name.
        info = tarfile.TarInfo("./" if path == "." else path)
        info.uid, info.gid, info.mode = facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)
        info.mtime = facts.st_mtime_ns // 1_000_000_000
        if fraction := facts.st_mtime_ns % 1_000_000_000:
            pax["mtime"] = _decimal(facts.st_mtime_ns, fraction)
        kinds: dict[Any, bytes] = {
            stat.S_IFREG: tarfile.REGTYPE,
            stat.S_IFDIR: tarfile.DIRTYPE,
            stat.S_IFLNK: tarfile.SYMTYPE,
            stat.S_IFCHR: tarfile.CHRTYPE,
            stat.S_IFBLK: tarfile.BLKTYPE,
            stat.S_IFIFO: tarfile.FIFOTYPE,
        }
        info.type = kinds[stat.S_IFMT(facts.st_mode)]
        if info.type == tarfile.REGTYPE:
            info.size = facts.st_size
        elif info.type == tarfile.SYMTYPE:
            info.linkname = os.readlink(path, dir_fd=self._root)
        elif info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = os.major(facts.st_rdev), os.minor(facts.st_rdev)
        return info

    def _attributes(self, path: str) -> list[str]:
        try:
            found = os.listxattr(self._where(path), follow_symlinks=False)
        except OSError as error:
            if error.errno in _NONE:
                return []
            raise
        return sorted(n for n in found if allowed(os.fsencode(n)))

    def _opaque(self, path: str) -> bool:
        try:
            return os.getxattr(self._where(path), _OPAQUE, follow_symlinks=False) == b"y"
        except OSError as error:
            if error.errno in _NONE:
                return False
            raise

    def _where(self, path: str) -> str:
        return f"/proc/self/fd/{self._root}/{path}"

    def _data(self, path: str, size: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._root)
        try:
            left = size
            while left:
                chunk = os.read(fd, min(_CHUNK, left))
                if not chunk:
                    raise OSError(errno.EIO, "file became shorter while it was read", path)
                self._put(chunk)
                left -= len(chunk)
        finally:
            os.close(fd)
        self._put(bytes(-size % tarfile.BLOCKSIZE))

    def _marker(self, path: str) -> None:
        """An empty file that means something. When its place in overlayfs was made says nothing about the image."""
        info = tarfile.TarInfo(path)
        info.mode = 0o644
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _put(self, data: bytes) -> None:
        self._size += len(data)
        if data:
            self._out.write(data)


def _decimal(nanoseconds: int, fraction: int) -> str:
    if nanoseconds >= 0:
        return f"{nanoseconds // 1_000_000_000}.{fraction:09d}"
    return f"-{-nanoseconds // 1_000_000_000}.{-nanoseconds % 1_000_000_000:09d}"
