"""The unpack helper: one process per pull, exec'd by the daemon with an empty environment and one socket.

It loads its decompressors, gives up the network, and then serves three requests (JSON over SOCK_SEQPACKET, descriptors beside it):

``{"op": "unpack", "id", "entries", "size", "algorithm"}`` + (layer directory, pipe): a forked child confines itself into the
directory and applies the archive from the pipe. The child has no way to set ``trusted.overlay.opaque``; it sends the directories
here, as descriptors, and this process, which never reads an archive, sets it.

``{"op": "settle", "id", "below": [names, topmost first]}`` + (layer directory, directory of snapshots): directories the archive
implied without an entry take mode, owner and attributes of the layers below, else they would hide them with root's 0755.

``{"op": "sync", "id"}`` + (directory): everything written to its file system is on the disk.

Imports: stdlib, decompressors, shim.linux, and two stdlib-only modules beside this one.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import resource
import select
import signal
import socket
import stat
import sys
import threading  # noqa: F401  # os.fork looks it up
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Protocol

import zstandard

try:
    # The raw reader: IGzipFile buffers, and every byte would be copied once more.
    from isal.isal_zlib import _GzipReader as Gzip
except ImportError:  # no wheel for this machine

    def Gzip(source: Any, buffersize: int) -> Any:  # type: ignore[no-redef]
        import gzip

        return gzip.GzipFile(fileobj=source)


from cri.images import apply, tar
from shim.linux import caps, libc, mount, process

_SYNCFS = {"x86_64": 306, "aarch64": 267}[libc.MACHINE]
_MESSAGE = 60_000  # bytes: below the default socket buffer with room for descriptors
_FDS = 200  # per message; the kernel takes 253
_MEMORY = 2 << 30  # address space of a child: interpreter, buffers, a zstd window of 128 MiB
_WINDOW = 1 << 27
_KEEP = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_EMPTY_GZIP = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0"
_OPAQUE, _IMPLICIT, _RESULT = b"O", b"I", b"R"


class _Stream(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


# -- child ------------------------------------------------------------------------------------------------------------------


def decompressor(source: io.BufferedReader[Any]) -> _Stream:
    """By magic, not by media type: registries hold zstd layers labelled gzip, and containerd takes them."""
    head = source.peek(4)[:4]
    if head.startswith(_GZIP):
        return Gzip(source, 1 << 18)
    if head == _ZSTD:
        # Seekable and chunked writers produce several frames.
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(source, read_across_frames=True)
    return source


def unpack(
    source: io.BufferedReader[Any], limits: apply.Limits, algorithm: str, opaque: Callable[[int], None]
) -> tuple[apply.Layer, str, int]:
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


def confine(directory: int) -> None:
    """Make the layer directory the whole world of this process, with the capabilities that file metadata needs and no others."""
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
            socket.send_fds(self._channel, [_OPAQUE], self._fds)
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def implicit(self, names: list[bytes]) -> None:
        batch: list[bytes] = []
        length = 0
        for name in names:
            if batch and length + len(name) > _MESSAGE - 8192:
                self._channel.send(_IMPLICIT + b"\0".join(batch))
                batch, length = [], 0
            batch.append(name)
            length += len(name) + 1
        if batch:
            self._channel.send(_IMPLICIT + b"\0".join(batch))

    def result(self, document: dict[str, Any]) -> None:
        self._channel.send(_RESULT + json.dumps(document).encode())


def _child(request: dict[str, Any], directory: int, pipe: int, channel: socket.socket) -> NoReturn:
    status = 1
    try:
        reports = _Reports(channel)
        try:
            process.set_parent_death_signal(signal.SIGKILL)
            process.close_all_except((directory, pipe, channel.fileno()))
            confine(directory)
            process.set_parent_death_signal(signal.SIGKILL)  # the kernel forgets it when credentials change
            os.close(directory)
            source: io.BufferedReader[Any] = io.BufferedReader(io.FileIO(pipe), 1 << 18)
            with source:
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
            result = {"error": _explain(error)}
        reports.result(result)
    finally:
        os._exit(status)


def _explain(error: BaseException) -> dict[str, Any]:
    if isinstance(error, apply.LayerError):
        path = error.path[:1024].decode("utf-8", "replace")
        return {"message": error.message, "path": path, "errno": error.errno}
    if isinstance(error, OSError):
        return {"message": "", "path": str(error.filename or "")[:1024], "errno": error.errno}
    if isinstance(error, MemoryError):
        return {"message": f"needs more than {_MEMORY} bytes of memory", "errno": errno.ENOMEM}
    return {"message": f"{type(error).__name__}: {error}"[:1024]}


# -- helper -----------------------------------------------------------------------------------------------------------------


class _Job:
    """One layer in a child."""

    def __init__(self, number: int, pid: int, directory: int, channel: socket.socket) -> None:
        self.number, self.pid, self.directory, self.channel = number, pid, directory, channel
        self.device = os.fstat(directory).st_dev
        self.implicit: list[bytes] = []
        self.result: dict[str, Any] | None = None


class Helper:
    """The loop of the trusted half."""

    def __init__(self, daemon: socket.socket) -> None:
        self._daemon = daemon
        self._jobs: dict[int, _Job] = {}  # by channel fd
        self._implicit: dict[int, list[bytes]] = {}  # by request, until settled
        self._poll = select.poll()
        self._poll.register(daemon, select.POLLIN)

    def run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._daemon.fileno():
                    if not self._request():
                        return
                elif fd in self._jobs:
                    self._report(self._jobs[fd])

    def _request(self) -> bool:
        message, fds, flags, _ = socket.recv_fds(self._daemon, 1 << 17, 8)
        if not message or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return False  # children die with this process
        request = json.loads(message)
        try:
            if request["op"] == "unpack":
                self._start(request, *fds)
            elif request["op"] == "settle":
                self._settle(request, *fds)
                self._answer(request["id"], {"ok": {}})
            else:
                libc.syscall(_SYNCFS, *fds)  # may take seconds, and nothing else is asked of this process by then
                self._answer(request["id"], {"ok": {}})
        except OSError as error:
            self._answer(request["id"], {"error": _explain(error)})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _answer(self, number: int, document: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the daemon is gone; the next poll says so
            self._daemon.send(json.dumps({"id": number, **document}).encode())

    def _start(self, request: dict[str, Any], directory: int, pipe: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _child(request, directory, pipe, theirs)
        theirs.close()
        job = _Job(request["id"], pid, os.dup(directory), ours)
        self._jobs[ours.fileno()] = job
        self._poll.register(ours, select.POLLIN)

    def _report(self, job: _Job) -> None:
        message, fds, flags, _ = socket.recv_fds(job.channel, 1 << 17, 253)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                job.result = {"error": {"message": "report too long"}}
                os.kill(job.pid, signal.SIGKILL)
            elif message[:1] == _OPAQUE:
                self._make_opaque(job, fds)
            elif message[:1] == _IMPLICIT:
                job.implicit += message[1:].split(b"\0")
            elif message[:1] == _RESULT:
                job.result = job.result or json.loads(message[1:])
            else:
                self._finish(job)
        finally:
            for fd in fds:
                os.close(fd)

    def _make_opaque(self, job: _Job, fds: list[int]) -> None:
        try:
            for fd in fds:
                # The child is confined, not trusted: nothing but a directory of the layer's own file system gets the mark.
                found = os.fstat(fd)
                if not stat.S_ISDIR(found.st_mode) or found.st_dev != job.device:
                    raise OSError(errno.ENOTDIR, "opaque mark on something that is not a directory of the layer")
                os.setxattr(fd, "trusted.overlay.opaque", b"y")
        except OSError as error:
            job.result = {"error": {"message": "set trusted.overlay.opaque", "errno": error.errno}}
            os.kill(job.pid, signal.SIGKILL)

    def _finish(self, job: _Job) -> None:
        self._poll.unregister(job.channel)
        del self._jobs[job.channel.fileno()]
        job.channel.close()
        os.close(job.directory)
        _, status = os.waitpid(job.pid, 0)
        result = job.result
        if result is None:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            result = {"error": {"message": f"unpack process ended with {how}"}}
        if "ok" in result and job.implicit:
            self._implicit[job.number] = job.implicit
            result["ok"]["implicit"] = len(job.implicit)
        self._answer(job.number, result)

    def _settle(self, request: dict[str, Any], directory: int, snapshots: int) -> None:
        names = self._implicit.pop(request["layer"], [])
        below: list[int] = []
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = [os.open(f"{name}/fs", flags, dir_fd=snapshots) for name in request["below"]]
            for name in sorted(names):
                _take_after(directory, below, os.fsdecode(name))
        finally:
            for fd in below:
                os.close(fd)


_FIND = 0x04 | 0x08 | 0x02  # RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS


def _take_after(layer: int, below: list[int], name: str) -> None:
    """Give the implied directory ``name`` the attributes of the topmost one below it."""
    path = name or "."
    for lower in below:
        try:
            found = libc.openat2(lower, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0, _FIND)
        except FileNotFoundError:
            continue
        except OSError:
            return  # a whiteout, file or symlink is what was there: nothing to take after
        try:
            _copy_attributes(layer, path, found)
        finally:
            os.close(found)
        return


def _copy_attributes(layer: int, path: str, found: int) -> None:
    try:
        target = libc.openat2(layer, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0, _FIND)
    except OSError:
        return  # reached through a symlink of the archive: that directory has, or is, its own entry
    try:
        facts = os.fstat(found)
        os.fchown(target, facts.st_uid, facts.st_gid)
        os.fchmod(target, stat.S_IMODE(facts.st_mode))
        for attribute in os.listxattr(found):
            if apply.allowed(os.fsencode(attribute)):
                os.setxattr(target, attribute, os.getxattr(found, attribute))
        os.utime(target, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    finally:
        os.close(target)


def _warm() -> None:
    """Everything that is loaded at first use, before there is nothing to load from."""
    for encoding in ("utf-8", "ascii", "latin-1"):
        b"x\xff".decode(encoding, "replace")
    os.fsdecode(b"\xff")
    for algorithm in ("sha256", "sha384", "sha512"):
        hashlib.new(algorithm, b"x").hexdigest()
    json.dumps({"x": "\udcff"})
    zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(io.BytesIO(b""), read_across_frames=True).read(1)
    Gzip(io.BytesIO(_EMPTY_GZIP), 1 << 18).readinto(bytearray(1))


def main(fd: int) -> None:
    daemon = socket.socket(fileno=fd)
    process.close_all_except((0, 1, 2, fd))
    process.set_parent_death_signal(signal.SIGKILL)
    _warm()
    libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
    process.set_dumpable(False)
    gc.freeze()
    gc.disable()
    Helper(daemon).run()
    sys.exit(0)
