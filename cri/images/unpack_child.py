"""The confined process that applies one layer: forked by the unpack helper, killed by the kernel for any system call it has no use for.

Its descriptors are the archive's pipe, the file that keeps what comes out of it, and a socket to the helper. Nothing here may import,
open or resolve anything of the host after ``confine``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, cast

import zstandard

try:
    # The raw reader: IGzipFile buffers, and every byte would be copied once more.
    from isal.isal_zlib import _GzipReader as Gzip
except ImportError:  # no wheel for this machine

    def Gzip(source: Any, buffersize: int) -> Any:  # type: ignore[no-redef]
        import gzip

        return gzip.GzipFile(fileobj=source)


from cri.images import apply, tar
from cri.images.unpack_filter import Filter
from shim.linux import caps, libc, mount, process

MESSAGE = 60_000  # bytes: below the default socket buffer with room for descriptors
_FDS = 200  # per message; the kernel takes 253
_MEMORY = 2 << 30  # address space: interpreter, buffers, a zstd window of 128 MiB
WINDOW = 1 << 27
READ = 1 << 17
_KEEP = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_EMPTY_GZIP = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0"
OPAQUE, IMPLICIT, RESULT = b"O", b"I", b"R"


class _Stream(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


class Source:
    """The compressed layer: first what an earlier attempt kept of it, then the pipe, of which everything is kept as it is read."""

    def __init__(self, pipe: int, kept: int = -1, have: int = 0) -> None:
        """``kept`` is a file with the layer's first ``have`` bytes, or -1."""
        self._pipe, self._kept, self._have = pipe, kept, have
        self._position = 0
        self._head = b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._head:
            count = min(len(view), len(self._head))
            view[:count] = self._head[:count]
            self._head = self._head[count:]
            return count
        if self._position < self._have:
            count = os.preadv(self._kept, [view[: self._have - self._position]], self._position)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "partial layer")
        else:
            count = os.readv(self._pipe, [view])
            self._keep(view[:count])
        self._position += count
        return count

    def read(self, size: int = READ) -> bytes:
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end."""
        head = b""
        while len(head) < size and (more := self.read(size - len(head))):
            head += more
        self._head = head
        return head

    def _keep(self, view: memoryview) -> None:
        if self._kept < 0:
            return
        position = self._position
        while view:
            count = os.pwrite(self._kept, view, position)
            view, position = view[count:], position + count


def decompressor(source: Source) -> _Stream:
    """By magic, not by media type: registries hold zstd layers labelled gzip, and containerd takes them."""
    head, file = source.peek(4), cast(Any, source)
    if head.startswith(_GZIP):
        return Gzip(file, READ)
    if head == _ZSTD:
        # Seekable and chunked writers produce several frames.
        return zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(file, read_size=READ, read_across_frames=True)
    return source


def unpack(source: Source, limits: apply.Limits, algorithm: str, opaque: Callable[[int], None]) -> tuple[apply.Layer, str, int]:
    """Apply the archive to the current directory: (layer, diff id, bytes of the archive)."""
    digest, total = hashlib.new(algorithm), 0

    def filled(view: memoryview) -> None:
        nonlocal total
        total += len(view)
        if total > limits.size:
            raise apply.LayerError(f"unpacks to more than {limits.size} bytes")
        digest.update(view)

    stream = decompressor(source)
    reader = tar.Reader(lambda view: stream.readinto(view) or 0, filled)
    layer = apply.Layer(opaque, limits)
    layer.apply(reader)
    reader.drain()
    return layer, f"{algorithm}:{digest.hexdigest()}", total


def confine(directory: int, filter: Filter) -> None:
    """Make the layer directory the whole world of this process, with the capabilities that file metadata needs and no
    others, and the system calls of the filter."""
    tree = mount.clone_mount(directory)
    mount.mount_setattr(tree, set=mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC, propagation=mount.MS_PRIVATE)
    libc.unshare(libc.CLONE_NEWNS)
    mount.mount("", "/", "", mount.MS_REC | mount.MS_PRIVATE)
    target = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # any directory of the root: it is about to go
    mount.move_mount(tree, target)
    os.close(target)
    os.fchdir(tree)
    os.close(tree)
    libc.pivot_root(".", ".")
    mount.umount2(".", mount.MNT_DETACH)
    os.chdir("/")
    os.umask(0)
    for what, bound in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 512),
    ):
        resource.setrlimit(what, (bound, bound))
    keep = caps.mask(_KEEP)
    caps.drop_bounding(keep)
    caps.set_ambient(0)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    caps.set_caps(keep, keep, 0)
    process.set_dumpable(False)
    # The kernel forgets it when credentials change.
    process.set_parent_death_signal(signal.SIGKILL)
    os.close(directory)
    filter.install()


class _Reports:
    """The child's end towards the helper: batches of descriptors and names, then one result."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._fds: list[int] = []

    def opaque(self, fd: int) -> None:
        self._fds.append(fd)
        if len(self._fds) >= _FDS:
            self.flush()

    def flush(self) -> None:
        if self._fds:
            socket.send_fds(self._channel, [OPAQUE], self._fds)
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def implicit(self, names: list[bytes]) -> None:
        batch: list[bytes] = []
        length = 0
        for name in names:
            if batch and length + len(name) > MESSAGE - 8192:
                self._channel.send(IMPLICIT + b"\0".join(batch))
                batch, length = [], 0
            batch.append(name)
            length += len(name) + 1
        if batch:
            self._channel.send(IMPLICIT + b"\0".join(batch))

    def result(self, document: dict[str, Any]) -> None:
        self._channel.send(RESULT + json.dumps(document).encode())


def child(request: dict[str, Any], directory: int, pipe: int, kept: int, channel: socket.socket, filter: Filter) -> NoReturn:
    """Apply the archive of one request, report, and end."""
    status = 1
    try:
        reports = _Reports(channel)
        source = Source(pipe, kept, int(request["have"]))
        try:
            process.set_parent_death_signal(signal.SIGKILL)
            process.close_all_except([directory, pipe, channel.fileno()] + [kept] * (kept >= 0))
            confine(directory, filter)
            limits = apply.Limits(int(request["entries"]), int(request["size"]))
            layer, diff_id, total = unpack(source, limits, str(request["algorithm"]), reports.opaque)
            reports.flush()
            reports.implicit(list(layer.implicit))
            result: dict[str, Any] = {
                "ok": {
                    "diff_id": diff_id,
                    "archive": total,
                    "bytes": layer.bytes,
                    "inodes": layer.inodes,
                    "entries": layer.entries,
                    "dropped": layer.dropped,
                }
            }
            status = 0
        except BaseException as error:
            result = {"error": explain(error)}
        reports.result(result)
    finally:
        os._exit(status)


def explain(error: BaseException) -> dict[str, Any]:
    """An error as a message."""
    if isinstance(error, apply.LayerError):
        path = error.path[:1024].decode("utf-8", "replace")
        return {"message": error.message, "path": path, "errno": error.errno}
    if isinstance(error, OSError):
        return {"message": "", "path": str(error.filename or "")[:1024], "errno": error.errno}
    if isinstance(error, MemoryError):
        return {"message": f"needs more than {_MEMORY} bytes of memory", "errno": errno.ENOMEM}
    return {"message": f"{type(error).__name__}: {error}"[:1024]}


def warm() -> None:
    """Everything that is loaded at first use, before there is nothing to load from."""
    for encoding in ("utf-8", "ascii", "latin-1"):
        b"x\xff".decode(encoding, "replace")
    os.fsdecode(b"\xff")
    for algorithm in ("sha256", "sha384", "sha512"):
        hashlib.new(algorithm, b"x").hexdigest()
    json.dumps({"x": "\udcff"})
    for archive in (_EMPTY_GZIP, zstandard.ZstdCompressor().compress(b"")):
        read, write = os.pipe()
        os.write(write, archive)
        os.close(write)
        decompressor(Source(read)).readinto(bytearray(1))
        os.close(read)
