"""Apply one layer's archive to the current root directory, as an overlay lower: whiteouts become 0/0 devices, opaque directories are
reported. Runs in the confined child of ``unpack_worker``; stdlib only. Paths are relative to ``/``, which *is* the layer directory, so
no name or link in the archive leads anywhere else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from cri.images import tar

_WHITEOUT, _AUFS = b".wh.", b".wh..wh."
_OPAQUE = b".wh..wh..opq"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_LIMIT = 4095
_INLINE = 60  # bytes of a symlink that ext4 does not keep in the inode
_BLOCK = 4096  # what a file's data is rounded up to when its disk usage is reckoned; st_blocks is not known before write-back


class LayerError(Exception):
    """The layer cannot be applied: the archive's fault (``errno`` None) or the file system's."""

    def __init__(self, message: str, path: bytes = b"", number: int | None = None) -> None:
        super().__init__(message)
        self.message, self.path, self.errno = message, path, number


class Limits(NamedTuple):
    """Bounds of one layer."""

    entries: int
    size: int  # bytes unpacked, of the archive and of any one file


class Layer:
    """The state of one application. Opaque directories go to ``opaque(fd)`` at once, which takes the descriptor over."""

    def __init__(self, opaque: Callable[[int], None], limits: Limits) -> None:
        self._opaque, self._limits = opaque, limits
        self._known: set[bytes] = {b""}  # directories that exist, by clean name
        self._times: dict[bytes, int] = {}
        self._whiteouts: set[bytes] = set()
        self._root_seen = False
        self._mine = (os.geteuid(), os.getegid())
        self._inherits = False  # some directory hands its group on to what is made in it
        self.implicit: dict[bytes, None] = {}  # directories made without an entry: they take after the layers below
        self.entries = self.bytes = self.inodes = 0
        self.dropped = 0  # attributes left out

    def apply(self, reader: tar.Reader) -> None:
        entry = None
        try:
            for entry in reader:
                self._count_entry()
                self._one(entry, reader)
            for path, mtime in reversed(self._times.items()):
                os.utime(path or b".", ns=(mtime, mtime), follow_symlinks=False)
        except OSError as error:
            raise LayerError(os.strerror(error.errno or 0), entry.name if entry else b"", error.errno) from error
        if not self._root_seen:
            self.implicit[b""] = None

    def _count_entry(self) -> None:
        self.entries += 1
        if self.entries > self._limits.entries:
            raise LayerError(f"more than {self._limits.entries} entries")

    def _one(self, entry: tar.Entry, reader: tar.Reader) -> None:
        path = clean(entry.name)
        if len(path) > _PATH_LIMIT or b"\0" in path or b"\0" in entry.link:
            raise LayerError("name is too long or contains NUL", entry.name[:256])
        parent, _, base = path.rpartition(b"/")
        if not path:
            if entry.kind == tar.DIRECTORY:
                self._root_seen = True
                self._finish_directory(b"", entry)
            return
        if base.startswith(_WHITEOUT) or parent.rpartition(b"/")[2].startswith(_AUFS):
            self._whiteout(parent, base)
            return
        if parent not in self._known:
            self._make_parents(parent)
        if entry.kind == tar.REGULAR:
            self._regular(path, entry, reader)
        elif entry.kind == tar.DIRECTORY:
            self._directory(path, entry)
        elif entry.kind == tar.LINK:
            self._hardlink(path, entry)
        else:
            self._special(path, entry)

    # -- kinds --------------------------------------------------------------------------------------------------------------

    def _regular(self, path: bytes, entry: tar.Entry, reader: tar.Reader) -> None:
        try:
            fd = os.open(path, _NEW, entry.mode & 0o777)
        except FileExistsError:
            self._remove(path)
            fd = os.open(path, _NEW, entry.mode & 0o777)
        try:
            if entry.sparse is None:
                for piece in reader.data():
                    self._write(fd, piece)
                self._account(entry.size)
            else:
                self._sparse(fd, entry, reader)
            # Owner before mode and attributes: chown clears setuid bits and capabilities. What we make is ours already.
            if self._inherits or (entry.uid, entry.gid) != self._mine:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.mode & 0o7000:
                os.fchmod(fd, entry.mode)
            if entry.xattrs:
                self._attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _write(self, fd: int, piece: memoryview) -> None:
        while piece:
            piece = piece[os.write(fd, piece) :]

    def _sparse(self, fd: int, entry: tar.Entry, reader: tar.Reader) -> None:
        if entry.size > self._limits.size:
            raise LayerError(f"sparse file of {entry.size} bytes", entry.name)
        pieces = iter(entry.sparse or ())
        offset = left = 0
        for piece in reader.data():
            while piece:
                while not left:
                    offset, left = next(pieces)
                written = os.pwrite(fd, piece[:left], offset)
                piece, offset, left = piece[written:], offset + written, left - written
        os.ftruncate(fd, entry.size)
        self._account(sum(length for _, length in entry.sparse or ()))

    def _directory(self, path: bytes, entry: tar.Entry) -> None:
        try:
            os.mkdir(path, entry.mode & 0o777)
            self.inodes += 1
            self.bytes += _BLOCK
        except FileExistsError:
            if path not in self._known and not stat.S_ISDIR(os.lstat(path).st_mode):
                hidden = path in self._whiteouts
                self._remove(path)
                os.mkdir(path, entry.mode & 0o777)
                self.inodes += 1
                self.bytes += _BLOCK
                if hidden:  # removed and made anew in one layer: nothing of the lower one may shine through
                    self._make_opaque(path)
        self._known.add(path)
        self.implicit.pop(path, None)
        self._finish_directory(path, entry)

    def _finish_directory(self, path: bytes, entry: tar.Entry) -> None:
        where = path or b"."
        os.chown(where, entry.uid, entry.gid, follow_symlinks=False)
        self._inherits = self._inherits or bool(entry.mode & stat.S_ISGID) or entry.gid != self._mine[1]
        os.chmod(where, entry.mode)  # Linux has no lchmod; the directory was just checked and nothing else runs in here
        if entry.xattrs:
            fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._attributes(fd, entry)
            finally:
                os.close(fd)
        self._times[path] = entry.mtime

    def _hardlink(self, path: bytes, entry: tar.Entry) -> None:
        target = clean(entry.link)
        if target == path:
            return
        for again in (True, False):
            try:
                os.link(target, path, follow_symlinks=False)
                return
            except FileExistsError:
                if not again:
                    raise
                self._remove(path)
            except FileNotFoundError:
                raise LayerError(f"hard link to {target.decode(errors='replace')!r}, which is not in this layer", entry.name) from None

    def _special(self, path: bytes, entry: tar.Entry) -> None:
        for again in (True, False):
            try:
                if entry.kind == tar.SYMLINK:
                    os.symlink(entry.link, path)
                elif entry.kind == tar.FIFO:
                    os.mknod(path, stat.S_IFIFO | 0o600)
                else:
                    kind = stat.S_IFCHR if entry.kind == tar.CHAR else stat.S_IFBLK
                    os.mknod(path, kind | 0o600, os.makedev(entry.major, entry.minor))
                break
            except FileExistsError:
                if not again:
                    raise
                self._remove(path)
        self._account(len(entry.link) if len(entry.link) >= _INLINE else 0)
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        if entry.kind != tar.SYMLINK:
            os.chmod(path, entry.mode)
        if entry.xattrs:
            self._attributes(path, entry)
        os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)

    # -- whiteouts ----------------------------------------------------------------------------------------------------------

    def _whiteout(self, parent: bytes, base: bytes) -> None:
        if base == _OPAQUE:
            if parent not in self._known:
                self._make_parents(parent)
            self._make_opaque(parent)
            return
        if base.startswith(_AUFS) or parent.rpartition(b"/")[2].startswith(_AUFS):
            return  # aufs's own bookkeeping
        name = base[len(_WHITEOUT) :]
        if name in (b"", b".", b".."):
            raise LayerError("whiteout of nothing", base)
        if parent not in self._known:
            self._make_parents(parent)
        path = parent + b"/" + name if parent else name
        try:
            os.mknod(path, stat.S_IFCHR, 0)
            self._whiteouts.add(path)
            self._account(0)
        except FileExistsError:
            # This layer has the name as well, so its own content wins; what lies below must still not show.
            if path in self._known or stat.S_ISDIR(os.lstat(path).st_mode):
                self._make_opaque(path)

    def _make_opaque(self, path: bytes) -> None:
        self._opaque(os.open(path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))

    # -- tree ---------------------------------------------------------------------------------------------------------------

    def _make_parents(self, path: bytes) -> None:
        """Make sure ``path`` is a directory. A symlink in it is followed, inside the layer, as every other unpacker does."""
        made = b""
        for part in path.split(b"/"):
            made = made + b"/" + part if made else part
            if made in self._known:
                continue
            try:
                os.mkdir(made, 0o755)
                self.implicit[made] = None
                self._count_entry()
                self.inodes += 1
                self.bytes += _BLOCK
            except FileExistsError:
                hidden = made in self._whiteouts
                if not os.path.isdir(made):
                    self._remove(made)
                    os.mkdir(made, 0o755)
                    if hidden:
                        self._make_opaque(made)
                    else:
                        self.implicit[made] = None
                elif os.path.islink(made):
                    continue  # not remembered: what it points to may be replaced
            self._known.add(made)

    def _remove(self, path: bytes) -> None:
        """Make way for an entry that replaces an earlier one."""
        if stat.S_ISDIR(os.lstat(path).st_mode):
            self._remove_tree(path)
        else:
            os.unlink(path)
            self._whiteouts.discard(path)

    def _remove_tree(self, path: bytes) -> None:
        """rm -r that forgets what it removes: linear in what there is, however often an archive replaces a directory."""
        pending = [path]
        while pending:
            current = pending[-1]
            below = []
            with os.scandir(current) as entries:
                for found in entries:
                    if found.is_dir(follow_symlinks=False):
                        below.append(found.path)
                    else:
                        os.unlink(found.path)
                        self._whiteouts.discard(found.path)
            if below:
                pending += below
                continue
            os.rmdir(pending.pop())
            self._known.discard(current)
            self._times.pop(current, None)
            self.implicit.pop(current, None)

    def _attributes(self, target: int | bytes, entry: tar.Entry) -> None:
        for name, value in entry.xattrs.items():
            if not allowed(name):
                self.dropped += 1
                continue
            try:
                if isinstance(target, int):
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                # user.* does not exist on symlinks and devices, or on some file systems; a lost capability is an error.
                if not name.startswith(b"user.") or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                self.dropped += 1

    def _account(self, size: int) -> None:
        self.inodes += 1
        self.bytes += -(-size // _BLOCK) * _BLOCK


def allowed(name: bytes) -> bool:
    """Attributes an archive may set. trusted.* and user.overlay.* steer overlayfs; other security.* belong to this host."""
    return name == b"security.capability" or (name.startswith(b"user.") and not name.startswith(b"user.overlay."))


def clean(name: bytes) -> bytes:
    """The name without ``.``, empty and ``..`` components, which cannot climb above the root."""
    if b"." not in name and b"//" not in name and name[:1] != b"/" and name[-1:] != b"/":
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
