"""The files of an image archive, a directory or a tar file (compressed or not), for random access. All of it blocks: for a thread.

An archive is as hostile as a registry: names are looked up, never created; no link leads out of it; sizes and counts are bounded.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

from cri.images import apply, tar
from shim.errors import Failure
from shim.linux import libc
from shim.linux import path as paths

_PHASE = "read archive"
_MEMBERS = 200_000
_LINKS = 8
_CHUNK = 1 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file: ``size`` bytes at ``offset`` of ``fd``."""

    fd: int
    offset: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, min(count, self.size - offset), self.offset + offset)


class Members(Protocol):
    """Close it; members are good until then."""

    path: str

    def find(self, name: str) -> Member | None:
        """By its relative name, which is valid text without NUL."""

    def close(self) -> None: ...


def open_members(path: Path, scratch: Path) -> Members:
    """``scratch``: a directory for what has to be decompressed first. Raises Failure."""
    try:
        # A FIFO or a device must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise Failure.wrap(_PHASE, "open", error, str(path)) from error
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISDIR(kind):
            return DirectoryMembers(str(path), fd)
        if not stat.S_ISREG(kind):
            raise Failure(_PHASE, path=str(path), message="neither a regular file nor a directory")
        fd = _decompressed(fd, path, scratch)
        return TarMembers(str(path), fd)
    except BaseException:
        os.close(fd)
        raise


class DirectoryMembers:
    def __init__(self, path: str, fd: int) -> None:
        self.path, self._directory = path, fd
        self._open: dict[str, Member] = {}

    def find(self, name: str) -> Member | None:
        if name not in self._open:
            flags, resolve = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, paths.RESOLVE_BENEATH | paths.RESOLVE_NO_SYMLINKS
            try:
                fd = libc.openat2(self._directory, name, flags, 0, resolve)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise Failure.wrap(_PHASE, "open", error, f"{self.path}/{name}") from error
            facts = os.fstat(fd)
            self._open[name] = Member(fd, 0, facts.st_size)
            if not stat.S_ISREG(facts.st_mode):
                raise Failure(_PHASE, path=f"{self.path}/{name}", message="not a regular file")
        return self._open[name]

    def close(self) -> None:
        for member in self._open.values():
            os.close(member.fd)
        self._open.clear()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


class TarMembers:
    """The whole file is read once for the positions of its members; of one name the last counts, as when it is unpacked."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self._fd = path, fd
        self._members: dict[bytes, Member] = {}
        self._links: dict[bytes, bytes] = {}
        try:
            self._index()
        except tar.BadArchive as error:
            raise Failure(_PHASE, path=path, message=str(error)) from error

    def _index(self) -> None:
        with open(self._fd, "rb", buffering=0, closefd=False) as raw:
            reader = tar.Reader(lambda view: raw.readinto(view) or 0)
            for count, entry in enumerate(reader):
                if count >= _MEMBERS:
                    raise tar.BadArchive(f"more than {_MEMBERS} members")
                name = apply.clean(entry.name)
                self._members.pop(name, None)
                self._links.pop(name, None)
                if entry.kind == tar.REGULAR and entry.sparse is None:
                    self._members[name] = Member(self._fd, reader.offset, entry.size)
                elif entry.kind == tar.LINK:
                    self._links[name] = apply.clean(entry.link)
                elif entry.kind == tar.SYMLINK:  # docker save, for a layer that is there twice
                    self._links[name] = apply.clean(name.rpartition(b"/")[0] + b"/" + entry.link)

    def find(self, name: str) -> Member | None:
        found = apply.clean(os.fsencode(name))
        for _ in range(_LINKS):
            if found not in self._links:
                break
            found = self._links[found]
        return self._members.get(found)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def compressed(head: bytes) -> bool:
    """By the first bytes."""
    return head.startswith(_GZIP) or head.startswith(_ZSTD)


def _decompressed(fd: int, path: Path, scratch: Path) -> int:
    """The file itself, or a nameless decompressed copy of it (``docker save | gzip``); takes ``fd`` over."""
    head = os.pread(fd, 4, 0)
    if not compressed(head):
        return fd
    copy = os.open(scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "rb", closefd=False) as raw:
            source: Any = gzip.GzipFile(fileobj=raw) if head.startswith(_GZIP) else _zstd(raw)
            while chunk := source.read(_CHUNK):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(copy, view) :]
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        os.close(copy)
        raise Failure(_PHASE, path=str(path), message=f"cannot be decompressed: {error}") from error
    except OSError as error:
        os.close(copy)
        raise Failure.wrap(_PHASE, "decompress", error, str(path)) from error
    os.lseek(copy, 0, os.SEEK_SET)
    os.close(fd)
    return copy


def _zstd(raw: io.BufferedReader) -> zstandard.ZstdDecompressionReader:
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw, read_across_frames=True)
