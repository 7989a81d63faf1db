"""The unpack helper: one process for all pulls, exec'd by the daemon with an empty environment and one socket.

It loads its decompressors, gives up the network, and then serves three requests (JSON over SOCK_SEQPACKET, descriptors beside it):

``{"op": "unpack", "id", "entries", "size", "algorithm", "have"}`` + (layer directory, pipe[, file that keeps the archive and has its
first ``have`` bytes]): a forked child confines itself into the directory and applies the archive. The child has no way to set
``trusted.overlay.opaque``; it sends the directories here, as descriptors, and this process, which never reads an archive, sets it.

``{"op": "stop", "id", "layer"}``: the child of that request is killed. No answer but that of the request.

``{"op": "settle", "id", "below": [names, topmost first]}`` + (layer directory, directory of snapshots): directories the archive
implied without an entry take mode, owner and attributes of the layers below, else they would hide them with root's 0755.

``{"op": "sync", "id"}`` + (directory): everything written to its file system is on the disk.

Imports: stdlib, decompressors, shim.linux, and stdlib-only modules beside this one.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import stat
import sys
import threading  # noqa: F401  # os.fork looks it up
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from cri.images import apply, unpack_child
from cri.images.unpack_child import IMPLICIT, OPAQUE, RESULT
from cri.images.unpack_filter import Filter
from shim.linux import libc, process

_SYNCFS = {"x86_64": 306, "aarch64": 267}[libc.MACHINE]


class _Job:
    """What a child does."""

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
        self._filter = Filter()
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
                self._unpack(request, *fds)
            elif request["op"] == "stop":
                self._stop(request["layer"])
            elif request["op"] == "settle":
                self._settle(request, *fds)
                self._answer(request["id"], {"ok": {}})
            else:
                self._fork(request, fds[0], lambda channel: _sync(fds[0], channel))
        except OSError as error:
            self._answer(request["id"], {"error": unpack_child.explain(error)})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _answer(self, number: int, document: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the daemon is gone; the next poll says so
            self._daemon.send(json.dumps({"id": number, **document}).encode())

    def _unpack(self, request: dict[str, Any], directory: int, pipe: int, kept: int = -1) -> None:
        self._fork(request, directory, lambda channel: unpack_child.child(request, directory, pipe, kept, channel, self._filter))

    def _fork(self, request: dict[str, Any], directory: int, work: Callable[[socket.socket], NoReturn]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            work(theirs)
        theirs.close()
        job = _Job(request["id"], pid, os.dup(directory), ours)
        self._jobs[ours.fileno()] = job
        self._poll.register(ours, select.POLLIN)

    def _stop(self, number: int) -> None:
        for job in self._jobs.values():
            if job.number == number:
                job.result = {"error": {"message": "stopped"}}
                os.kill(job.pid, signal.SIGKILL)

    def _report(self, job: _Job) -> None:
        message, fds, flags, _ = socket.recv_fds(job.channel, 1 << 17, 253)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                job.result = {"error": {"message": "report too long"}}
                os.kill(job.pid, signal.SIGKILL)
            elif message[:1] == OPAQUE:
                self._make_opaque(job, fds)
            elif message[:1] == IMPLICIT:
                job.implicit += message[1:].split(b"\0")
            elif message[:1] == RESULT:
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


def _sync(directory: int, channel: socket.socket) -> NoReturn:
    """syncfs(2) in a child: it may take seconds."""
    status = 1
    try:
        process.set_parent_death_signal(signal.SIGKILL)
        try:
            libc.syscall(_SYNCFS, directory)
            result: dict[str, Any] = {"ok": {}}
        except OSError as error:
            result = {"error": unpack_child.explain(error)}
        channel.send(RESULT + json.dumps(result).encode())
        status = 0
    finally:
        os._exit(status)


def main(fd: int) -> None:
    daemon = socket.socket(fileno=fd)
    process.close_all_except((0, 1, 2, fd))
    process.set_parent_death_signal(signal.SIGKILL)
    unpack_child.warm()
    libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
    process.set_dumpable(False)
    gc.freeze()
    gc.disable()
    Helper(daemon).run()
    sys.exit(0)
