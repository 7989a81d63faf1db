"""Running a further process in a container: stage1 joins everything, restricts itself and forks last.

What can be seen from inside the container is the forked process, which has the final credentials and does nothing but execve
(CVE-2016-9962). The payload is read before anything is joined and holds nothing but this process's own description.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

from shim import lsm, wire
from shim.cgroups import manager as cgroups
from shim.cgroups.group import Group
from shim.errors import Failure
from shim.linux import libc
from shim.oci import codec
from shim.oci.spec import ExecCPUAffinity, Process
from shim.runtime import inside, kept, launch, listener, userns
from shim.runtime.channel import Channel
from shim.runtime.context import Context
from shim.runtime.final import Final, start_clean

_NAMESPACES = (
    libc.CLONE_NEWNS | libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS | libc.CLONE_NEWPID | libc.CLONE_NEWCGROUP
)


@dataclass(frozen=True, slots=True)
class Exec:
    """The job of ``exec.start``. Answers ``{"ok": {"fds": ["report", "console"?]}}`` and then goes on: its end means that execve succeeded
    or, with something in the report, failed; the pid is in the slot."""

    context: Context
    group: Group
    init: int  # pidfd of the container's first process
    bundle: int  # directory fd
    payload: int  # sealed memfd with an OCI process
    slot: int
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    in_cgroup: bool = False  # born in the container's cgroup (v2)

    @property
    def keep(self) -> Collection[int]:
        fds = {self.init, self.bundle, self.payload, *self.context.fds()}
        return fds | {fd for fd in (self.stdin, self.stdout, self.stderr) if fd is not None}

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        process = codec.decode(Process, wire.read_payload(self.payload))
        if not process.args:
            raise Failure("exec", message="no command", path="process.args")
        lsm.apply(self.context.proc, lsm.before_keyring(process))
        start_clean(self.context, process.oom_score_adj)
        container = kept.load(self.bundle)
        if container.notifies:
            listener.go_on_in_child(channel)
        stdio = None if process.terminal else self._stdio()
        affinity = process.exec_cpu_affinity or ExecCPUAffinity()
        inside.set_affinity(affinity.initial)
        if not self.in_cgroup:
            cgroups.join(self.group)
        inside.set_affinity(affinity.final)
        if container.root is not None:
            inside.raise_hard_limits(process)
            if stdio is not None:
                inside.give_stdio(stdio, container.root)
        try:
            if container.root is None:
                libc.setns(self.init, _NAMESPACES)
            else:
                libc.setns(self.init, _NAMESPACES | libc.CLONE_NEWUSER)  # all of them or none, by our rights outside
                userns.become_root()
                launch.ids_changed()
        except OSError as error:
            raise Failure.wrap("exec", "join namespaces", error) from None
        rootfd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        home = container.home
        if process.user.username or process.user.groups_policy is not None:  # not by CRI: its exec sessions are the container's user
            resolved = inside.resolve_user(process, rootfd)
            process, home = replace(process, user=resolved.user), resolved.home
        final, master = Final.prepare(process, home, rootfd, stdio, container.filter())
        os.close(inside.enter_cwd(rootfd, process.cwd))
        fds = {} if final.listened else {"report": channel.report()}
        if master is not None:
            fds["console"] = master
        channel.send({"ok": {"fds": list(fds)}}, tuple(fds.values()))
        lsm.apply(self.context.proc, lsm.on_exec(process))
        final.close_others(channel)
        if not final.listened:
            channel.narrow()
        final.run_in_child(self.context.slots.address(self.slot))

    def _stdio(self) -> tuple[int, int, int]:
        """The given fds, /dev/null of the host's devtmpfs for the others."""
        given = (self.stdin, self.stdout, self.stderr)
        modes = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)
        pairs = zip(given, modes, strict=True)
        fds = tuple(os.open("/dev/null", mode | os.O_CLOEXEC) if fd is None else fd for fd, mode in pairs)
        return fds[0], fds[1], fds[2]

