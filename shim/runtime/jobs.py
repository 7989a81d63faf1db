"""Short jobs that may block and therefore run in a child of the supervisor: cgroup removal, limits, killing by group or by tree."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shim import wire
from shim.cgroups import manager as cgroups
from shim.cgroups.group import Group
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.linux import libc
from shim.oci import bundle as bundles
from shim.oci import codec
from shim.oci.spec import Resources
from shim.runtime import inside, pins, pod, program, sysctl
from shim.runtime.channel import Channel
from shim.runtime.context import Context

_ROUNDS = 16  # of looking for processes that were forked while the others were being killed


@dataclass(frozen=True, slots=True)
class RemoveCgroup:
    """Remove a group and what the container made below it; a group that is gone is fine. Then its pidfd's pin, if it has one."""

    group: Group
    pins: int | None = None
    pinned: str = ""

    @property
    def keep(self) -> Collection[int]:
        return () if self.pins is None else (self.pins,)

    def __call__(self, channel: Channel) -> None:
        cgroups.remove(self.group)
        if self.pins is not None and self.pinned:
            pins.unpin(self.pins, (self.pinned,))
        channel.send({"ok": {}})

    def order(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"job": "remove cgroup", "group": self.group.to_json(), "pinned": self.pinned if self.pins is not None else ""}, ()

    def again(self, facts: dict[str, Any]) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Update:
    """Apply new resource limits; ``payload`` is a sealed memfd with OCI resources."""

    layout: Layout
    group: Group
    payload: int

    @property
    def keep(self) -> Collection[int]:
        return (self.payload,)

    def __call__(self, channel: Channel) -> None:
        cgroups.apply(self.layout, self.group, codec.decode(Resources, wire.read_payload(self.payload)))
        channel.send({"ok": {}})


@dataclass(frozen=True, slots=True)
class Explain:
    """The job of saying what a container's report means, in the words of its specification. It always fails: with the reason."""

    bundle: int
    report: str  # hex

    @property
    def keep(self) -> Collection[int]:
        return (self.bundle,)

    def __call__(self, channel: Channel) -> None:
        process, report = bundles.load_spec(self.bundle).process, bytes.fromhex(self.report)
        step, number = program.REPORT.unpack(report)
        raise inside.Program(process, "").failure(number) if step == program.At.EXEC else program.failure(report, "start container")


@dataclass(frozen=True, slots=True)
class KillAll:
    """SIGKILL to every process of the group, also frozen or freshly forked ones."""

    group: Group
    keep: Collection[int] = ()

    def __call__(self, channel: Channel) -> None:
        cgroups.kill(self.group)
        channel.send({"ok": {}})


@dataclass(frozen=True, slots=True)
class KillTree:
    """Signal an exec'd process and all that came of it, and nothing else of the container: its descendants, and whoever still is in
    its session. The leader is stopped first, because its orphans would be adopted by the container's init and lost to the search.
    """

    group: Group
    pidfd: int
    pid: int
    signal: int

    @property
    def keep(self) -> Collection[int]:
        return (self.pidfd,)

    def __call__(self, channel: Channel) -> None:
        try:
            if self.signal == signal.SIGKILL:
                libc.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
            family: set[int] = {self.pid}
            for _ in range(_ROUNDS):
                found = relatives(self.pid, family, cgroups.pids(self.group)) - family
                if not found:
                    break
                family |= found
                for pid in found:
                    _signal(pid, self.signal)
            libc.pidfd_send_signal(self.pidfd, self.signal)
        except ProcessLookupError:
            pass  # it ended on its own: what remains was found by its session, or is the container's
        channel.send({"ok": {}})


def relatives(leader: int, family: Collection[int], candidates: Iterable[int]) -> set[int]:
    """Those of ``candidates`` whose chain of parents meets ``family``, or whose session is the leader's."""
    parents: dict[int, int] = {}
    related: set[int] = set(family)
    for pid in candidates:
        try:
            parent, session = parent_and_session(pid)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                continue
            raise
        parents[pid] = parent
        if session == leader:
            related.add(pid)
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in related and pid not in related}
        grew = bool(more)
        related |= more
    return related


def parent_and_session(pid: int) -> tuple[int, int]:
    """Fields 4 and 6 of /proc/PID/stat."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[3])


def _signal(pid: int, number: int) -> None:
    """By pidfd, so that a recycled pid gets nothing: the fd is opened, then its membership of the family was just seen."""
    try:
        fd = libc.pidfd_open(pid)
        try:
            libc.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)
    except ProcessLookupError:
        return


@dataclass(frozen=True, slots=True)
class Unpin:
    """Release a pinned namespace."""

    path: str
    keep: Collection[int] = ()

    def __call__(self, channel: Channel) -> None:
        pod.unpin(self.path)
        channel.send({"ok": {}})

    def order(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"job": "unpin", "path": self.path}, ()

    def again(self, facts: dict[str, Any]) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Netlink:
    """A rtnetlink socket inside a network namespace: ``{"ok": {"fds": ["netlink"]}}``."""

    namespace: int

    @property
    def keep(self) -> Collection[int]:
        return (self.namespace,)

    def __call__(self, channel: Channel) -> None:
        try:
            libc.setns(self.namespace, libc.CLONE_NEWNET)
        except OSError as error:
            raise Failure.wrap("netlink", "setns", error) from None
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        channel.send({"ok": {"fds": ["netlink"]}}, (sock.fileno(),))


@dataclass(frozen=True, slots=True)
class Sysctls:
    """Parameters of a network namespace, written in order: ``{"ok": {"values": {name: text}, "failed": {name: errno}}}``.

    ``write`` gives text, or None to read only. All are tried; what a failure means is the asker's to know. Names are paths
    below /proc/sys, so that interfaces may have dots in their names.
    """

    context: Context
    namespace: int
    write: Mapping[str, str | None]

    @property
    def keep(self) -> Collection[int]:
        return {self.namespace, *self.context.fds()}

    def order(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"job": "sysctls", "write": dict(self.write)}, (self.namespace,)

    def again(self, facts: dict[str, Any]) -> bool:
        return True

    def __call__(self, channel: Channel) -> None:
        libc.setns(self.namespace, libc.CLONE_NEWNET)
        values, failed = {}, {}
        for name, text in self.write.items():
            if not name.startswith("net/"):
                raise Failure("sysctl", path=name, message="not a parameter of the network")
            try:
                if text is not None:
                    sysctl.write(self.context.proc, name, text)
                values[name] = sysctl.read(self.context.proc, name)
            except OSError as error:
                failed[name] = error.errno
        channel.send({"ok": {"values": values, "failed": failed}})


@dataclass(frozen=True, slots=True)
class Sockets:
    """TCP sockets made inside a network namespace and not connected yet: where they are made decides where connect(2) goes, whoever
    calls it. Several at once, because the fork costs more than they do. Answers
    ``{"ok": {"fds": ["AF_INET-0", …, "AF_INET6-0", …]}}``.
    """

    namespace: int
    count: int  # of each address family

    @property
    def keep(self) -> Collection[int]:
        return (self.namespace,)

    def __call__(self, channel: Channel) -> None:
        try:
            libc.setns(self.namespace, libc.CLONE_NEWNET)
        except OSError as error:
            raise Failure.wrap("sockets", "setns", error) from None
        made: dict[str, socket.socket] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                made |= {f"{family.name}-{n}": socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) for n in range(self.count)}
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                    raise
        channel.send({"ok": {"fds": list(made)}}, [sock.fileno() for sock in made.values()])
