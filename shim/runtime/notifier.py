"""The child that holds the listener of a container's, or an exec session's, seccomp filter.

With ``listenerPath`` it passes the listener on to the agent that listens there (config-linux.md#containerprocessstate) and ends. Else it
answers itself: a refused call fails as the profile says, is counted in the bundle's ``seccomp.json`` and, with the action "stop", ends the
container. It needs nobody: supervisor and daemon may come and go, what it has counted is in the file. It ends when no process
runs under the filter any more. If it is killed, refused calls fail with ENOSYS from then on (the kernel's answer) and are not counted.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from types import FrameType

from shim.errors import Failure
from shim.linux import libc
from shim.oci import bundle as bundles
from shim.oci.spec import Seccomp, Spec
from shim.oci.validate import RUNTIME_DEFAULT
from shim.runtime.channel import Channel
from shim.seccomp import notify, profile

CONNECT = 10.0  # s for the agent behind listenerPath to take the listener
_FLUSH = 0.1  # s between two writes of the record
_QUIET, _LATEST = 5.0, 30.0  # s: a container is stopped after so long without a further refusal, and so long after the first one
_GRACE = 10.0  # s between SIGTERM and SIGKILL
_WITHDRAWN = 0.2  # s after which a read of a question that was withdrawn gives up


@dataclass(frozen=True, slots=True)
class Notifier:
    """Answers ``{"ok": {}}`` when the listener is in good hands, and then may go on for as long as the filter is in use."""

    listener: int
    bundle: int  # directory fd
    container: str
    bundle_path: str
    pid: int  # of the process with the filter
    init: int  # pidfd of the container's first process
    status: str  # of the container: "creating", "running"

    @property
    def keep(self) -> Collection[int]:
        return {self.listener, self.bundle, self.init}

    def __call__(self, channel: Channel) -> None:
        spec = bundles.load_spec(self.bundle)
        seccomp = spec.linux.seccomp
        if seccomp is None:
            raise Failure("seccomp", "listener", message="the container has no profile")
        if seccomp.listener_path:
            self._pass_on(spec, seccomp)
            channel.send({"ok": {}})
            return
        capabilities = spec.process.capabilities.bounding if spec.process.capabilities else ()
        marker = seccomp.default_action == RUNTIME_DEFAULT
        rules = profile.default(capabilities, os.uname().machine) if marker else seccomp
        counter = _Counter(self, rules, stops=seccomp.notifier == "stop")
        channel.send({"ok": {}})
        counter.run()

    def _pass_on(self, spec: Spec, seccomp: Seccomp) -> None:
        state = {
            "ociVersion": spec.oci_version, "id": self.container, "status": self.status, "pid": self.pid, "bundle": self.bundle_path,
            "annotations": spec.annotations,
        }  # fmt: skip
        message = {
            "ociVersion": spec.oci_version, "fds": ["seccompFd"], "pid": self.pid, "metadata": seccomp.listener_metadata, "state": state
        }  # fmt: skip
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(CONNECT)
                sock.connect(seccomp.listener_path)
                data = json.dumps(message).encode()
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.listener]))
                sent = sock.sendmsg([data], [rights], socket.MSG_NOSIGNAL)
                while sent < len(data):
                    sent += sock.send(data[sent:], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Failure.wrap("seccomp", "hand over the listener", error, seccomp.listener_path) from None


class _Withdrawn(Exception):
    pass


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise _Withdrawn


@dataclass(slots=True)
class _Counter:
    """Answers questions until nobody can ask any more."""

    job: Notifier
    profile: Seccomp
    stops: bool
    by_name: dict[str, int] = field(init=False)
    default: int = field(init=False)
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    fresh: dict[str, int] = field(default_factory=dict)  # not in the record yet
    written: float = 0.0
    first: float | None = None
    last: float = 0.0
    killing: float | None = None  # when SIGTERM was sent

    def run(self) -> None:
        self.by_name, self.default = notify.answers(self.profile)
        signal.signal(signal.SIGALRM, _alarm)
        poll = select.poll()
        poll.register(self.job.listener, select.POLLIN)
        while True:
            wait = self._wait()
            events = poll.poll(None if wait is None else max(0.0, wait) * 1000)
            if any(event & select.POLLIN for _, event in events):
                self._answer()
            elif events:
                break  # POLLHUP: the last process with this filter has ended
            self._act()
        self._flush()

    def _wait(self) -> float | None:
        """Seconds until something is to be done."""
        now, due = time.monotonic(), []
        if self.fresh:
            due.append(self.written + _FLUSH)
        if self.stops and self.first is not None:
            due.append(self._stop_at() if self.killing is None else self.killing + _GRACE)
        return min(due) - now if due else None

    def _stop_at(self) -> float:
        return min(self.last + _QUIET, (self.first or 0.0) + _LATEST)

    def _answer(self) -> None:
        question = self._receive()
        if question is None:
            return
        key = (question.arch, question.number)
        name = self.names.get(key)
        if name is None:
            from shim.seccomp import libseccomp  # not before it is needed: what is imported here costs memory in the supervisor

            name = self.names[key] = libseccomp.name(*key) or f"call_{question.number}"
        number = self.by_name.get(name, self.default)
        if number:
            notify.refuse(self.job.listener, question, number)
        else:
            _kill(question.pid)
        self.fresh[name] = self.fresh.get(name, 0) + 1
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last

    def _receive(self) -> notify.Question | None:
        """Between poll and this the asking thread may have been killed; then the read would wait for the next question."""
        try:
            signal.setitimer(signal.ITIMER_REAL, _WITHDRAWN)
            question = notify.receive(self.job.listener)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except _Withdrawn:
            return None
        return question

    def _act(self) -> None:
        now = time.monotonic()
        if self.fresh and now >= self.written + _FLUSH:
            self._flush()
        if not self.stops or self.first is None:
            return
        if self.killing is None and now >= self._stop_at():
            self._flush(stopped=True)
            self.killing = now
            self._signal(signal.SIGTERM)
        elif self.killing is not None and now >= self.killing + _GRACE:
            self.killing = now
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            libc.pidfd_send_signal(self.job.init, number)
        except ProcessLookupError:
            return  # it has ended; what else runs under the filter ends with it

    def _flush(self, *, stopped: bool = False) -> None:
        if not self.fresh and not stopped:
            return
        notify.count(self.job.bundle, self.fresh, stopped=stopped)
        for name, number in sorted(self.fresh.items()):
            line = f"container {self.job.container}: seccomp refused {name}, {number} time{'s' if number > 1 else ''}\n"
            os.write(2, line.encode())
        if stopped:
            os.write(2, f"container {self.job.container}: is stopped for forbidden system calls\n".encode())
        self.fresh.clear()
        self.written = time.monotonic()


def _kill(thread: int) -> None:
    try:
        os.kill(thread, signal.SIGKILL)
    except ProcessLookupError:
        return
