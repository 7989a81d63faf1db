"""Children forked ahead of their work, for exec sessions: forking a warm interpreter costs as much as the rest of a short exec.

A spare holds none of any container's fds: it is forked before the request is there, and gets them with its orders. Spares are forked a
few at a time, a moment after one has been used, when nobody waits: each fork write-protects the supervisor's memory, and what it then
copies back as it goes on is paid once for all of them. A burst that uses them up falls back to forking.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from shim.cgroups import Group
from shim.linux import process
from shim.oci import codec
from shim.oci.spec import Process
from shim.runtime.channel import Channel
from shim.runtime.context import Context
from shim.runtime.exec import Exec
from shim.supervisor.children import Children, Job
from shim.supervisor.loop import Timer

_MAX_FDS = 8
_MANY, _LOW = 4, 1  # fork up to so many when so few are left
_QUIET = 1.0  # s
_DELAY = 0.003  # s after use until the next are forked: by then the exit of a short command has been told
_SAMPLE = b'{"args":["a"],"cwd":"/","env":["A=b"],"user":{"uid":1},"capabilities":{"bounding":["CAP_CHOWN"]},"rlimits":[]}'


@dataclass(frozen=True, slots=True)
class Spare:
    """The job: wait for orders, then do as ``Exec`` does. End of file before that means that it is not needed."""

    context: Context

    @property
    def keep(self) -> Collection[int]:
        return tuple(self.context.fds())

    def __call__(self, channel: Channel) -> None:
        codec.decode(Process, _SAMPLE)  # writes to pages that the real one will write to, while nobody waits for it
        sock = socket.socket(fileno=channel.fileno())
        data, ancillary, _, _ = sock.recvmsg(32 * 1024, socket.CMSG_SPACE(_MAX_FDS * 4))
        sock.detach()
        if not data:
            return
        process.set_title("cri-shim: exec")
        fds = array.array("i")
        for _, _, part in ancillary:
            fds.frombytes(part)
        self._exec(json.loads(data), list(fds), channel)
        os.close(channel.fileno())  # the supervisor waits for its end of file, and our exit first has memory to give back

    def _exec(self, orders: dict[str, Any], fds: list[int], channel: Channel) -> None:
        named = dict(zip(orders["fds"], fds, strict=True))
        order(self.context, Group.from_json(orders["cgroup"]), orders["slot"], named)(channel)


def order(context: Context, group: Group, slot: int, fds: dict[str, int], *, in_cgroup: bool = False) -> Exec:
    """The job with its fds by name: init, bundle, payload, and those of stdin, stdout and stderr that are given."""
    streams = (fds.get("stdin"), fds.get("stdout"), fds.get("stderr"))
    return Exec(context, group, fds["init"], fds["bundle"], fds["payload"], slot, *streams, in_cgroup)


class Spares:
    """``take`` a child that is ready, if there is one."""

    def __init__(self, children: Children, context: Context) -> None:
        self._children, self._context = children, context
        self._jobs: deque[Job] = deque()
        self._timer: Timer | None = None
        self._soon = False

    def prepare(self) -> None:
        """See to it that there are enough: soon if few are left, else once it is quiet."""
        soon = len(self._jobs) <= _LOW
        if self._timer is not None:
            if self._soon or not soon:
                return
            self._timer.cancel()
        self._soon = soon
        self._timer = self._children.loop.call_later(_DELAY if soon else _QUIET, self._fork)

    def _fork(self) -> None:
        self._timer = None
        while len(self._jobs) < _MANY:
            self._jobs.append(self._children.run(Spare(self._context), "spare"))

    def take(self, group: Group, slot: int, fds: dict[str, int]) -> Job | None:
        """A child that has got orders to be ``Exec`` with these fds by field name; None when there is none ready."""
        while self._jobs:
            job = self._jobs.popleft()
            if job.process.ended.done:  # somebody killed it
                job.close()
                continue
            self.prepare()
            job.title = "exec"
            job.send({"cgroup": group.to_json(), "slot": slot, "fds": list(fds)}, tuple(fds.values()))
            return job
        self.prepare()
        return None
