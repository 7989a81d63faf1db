"""Image content into a fresh volume (CRI: an image VOLUME without a mount of the request's; OCI: tmpcopyup).

A walk by fds that follows no symlink: an image may try to have something else copied (CVE-2022-23648, CVE-2018-15664). It runs after the
root change, so that even a followed link could only have led into the image.
"""

from __future__ import annotations

import errno
import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 30
_MAX_DEPTH = 400  # each level holds two fds


def copy_into_empty(source: int, destination: int) -> bool:
    """Copy what the directory ``source`` (O_PATH will do) holds into ``destination``, with owners, modes, times and attributes, the top
    directory's too. Nothing at all if the destination has an entry already. Devices and sockets are left out."""
    into = os.open(".", _DIRECTORY, dir_fd=destination)
    try:
        with os.scandir(into) as entries:
            if next(entries, None) is not None:
                return False
        out_of = os.open(".", _DIRECTORY, dir_fd=source)
        try:
            status = os.fstat(out_of)
            _Copy(into, status.st_dev).tree(out_of, into, "", 0)
            _attributes(out_of, into, status)
        finally:
            os.close(out_of)
    finally:
        os.close(into)
    return True


class _Copy:
    """One copy: where it goes, which file system it may not leave, which hard links it has seen."""

    def __init__(self, top: int, device: int) -> None:
        self.top, self.device = top, device
        self.links: dict[tuple[int, int], str] = {}  # (device, inode) → path of the copy

    def tree(self, source: int, destination: int, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, "directories are nested too deep to be copied", prefix)
        for name in os.listdir(source):
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                self.directory(source, destination, name, prefix, depth)
            elif kind == stat.S_IFREG:
                self.file(source, destination, name, prefix)
            elif kind == stat.S_IFLNK:
                os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=destination)
                _owner(name, destination, status)
            elif kind == stat.S_IFIFO:
                os.mkfifo(name, status.st_mode & 0o777, dir_fd=destination)
                _owner(name, destination, status)

    def directory(self, source: int, destination: int, name: str, prefix: str, depth: int) -> None:
        below = os.open(name, _DIRECTORY, dir_fd=source)
        try:
            status = os.fstat(below)
            if status.st_dev != self.device:  # a mount is not the image's content
                return
            os.mkdir(name, 0o700, dir_fd=destination)
            into = os.open(name, _DIRECTORY, dir_fd=destination)
            try:
                self.tree(below, into, f"{prefix}{name}/", depth + 1)
                _attributes(below, into, status)
            finally:
                os.close(into)
        finally:
            os.close(below)

    def file(self, source: int, destination: int, name: str, prefix: str) -> None:
        # O_NONBLOCK: should it have become a FIFO since the stat, nobody waits for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ESTALE, "changed while it was copied", prefix + name)
            key = status.st_dev, status.st_ino
            if status.st_nlink > 1 and (first := self.links.setdefault(key, prefix + name)) != prefix + name:
                os.link(first, name, src_dir_fd=self.top, dst_dir_fd=destination, follow_symlinks=False)
                return
            out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=destination)
            try:
                _content(fd, out)
                _attributes(fd, out, status)
            finally:
                os.close(out)
        finally:
            os.close(fd)


def _content(source: int, destination: int) -> None:
    try:
        while os.copy_file_range(source, destination, _CHUNK):
            pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # Between two kinds of file system. Both offsets stand where the copy got to.
        while os.sendfile(destination, source, None, _CHUNK):
            pass


def _owner(name: str, destination: int, status: os.stat_result) -> None:
    os.chown(name, status.st_uid, status.st_gid, dir_fd=destination, follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=destination, follow_symlinks=False)


def _attributes(source: int, destination: int, status: os.stat_result) -> None:
    """Owner first, because changing it clears set-id bits; times last."""
    os.fchown(destination, status.st_uid, status.st_gid)
    os.fchmod(destination, stat.S_IMODE(status.st_mode))
    for name in _attribute_names(source):
        try:
            os.setxattr(destination, name, os.getxattr(source, name))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):  # the volume's file system, or our rights, do not have it
                raise
    os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))


def _attribute_names(source: int) -> list[str]:
    try:
        return os.listxattr(source)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
