"""A child that is forked before there is anything to do: it waits warm for an order, so that nobody waits for a fork.

Short jobs are done one after the other, and the helper is as it was after each: in the host's namespaces, without the job's fds. An order
to create a container is its last: it becomes that container's stage1. What it was forked with is what any child is forked with.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from shim.cgroups import manager as cgroups
from shim.cgroups import plan as cgroup_plan
from shim.cgroups.group import Group
from shim.linux import libc, process
from shim.oci import bundle as bundles
from shim.oci import codec, validate
from shim.oci.bundle import Recipe
from shim.oci.spec import NamespaceType, Spec
from shim.rootfs import plan as rootfs_plan
from shim.runtime import create, inside, jobs, launch, pod
from shim.runtime.channel import Channel
from shim.runtime.context import Context, PodHandles

# A container as kubelets ask for them: going through it once touches the memory that every creation writes to (reference counts).
_SAMPLE = b"""{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"user":{"uid":0,"gid":0},"args":["/a"],"env":["PATH=/bin","A=b"],
"cwd":"/","capabilities":{"bounding":["CAP_CHOWN","CAP_KILL"],"effective":["CAP_CHOWN","CAP_KILL"],"permitted":["CAP_CHOWN","CAP_KILL"]},
"oomScoreAdj":100},"mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["nosuid","noexec","nodev","relatime","ro"]},
{"destination":"/etc/hosts","type":"bind","source":"/etc/hosts","options":["rbind","rprivate","rw"]},
{"destination":"/dev/shm","type":"bind","source":"pod:shm","options":["rbind"]}],"linux":{"namespaces":[{"type":"mount"},
{"type":"ipc","path":"pod:ipc"},{"type":"pid"}],"cgroupsPath":"/a/b","resources":{"memory":{"limit":67108864},"cpu":{"shares":256,
"quota":50000,"period":100000},"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}]},
"maskedPaths":["/proc/acpi","/proc/kcore"],"readonlyPaths":["/proc/bus","/proc/sys"]}}"""
TITLE = "cri-shim: spare"  # what a kernel keeps of a name is 15 bytes
_RECIPE = b'{"type":"overlay","lower":["/a","/b"],"upper":"/c","work":"/d"}'
_HOME = (("net", libc.CLONE_NEWNET), ("ipc", libc.CLONE_NEWIPC), ("uts", libc.CLONE_NEWUTS))


class Ordered(Protocol):
    """A job that a helper can be told to do, with numbers, names and fds."""

    @property
    def keep(self) -> Collection[int]: ...

    def __call__(self, channel: Channel) -> None: ...

    def order(self) -> tuple[dict[str, Any], tuple[int, ...]]: ...

    def again(self, facts: dict[str, Any]) -> bool:
        """Whether a helper that gave this answer takes another order."""
        ...


@dataclass(frozen=True, slots=True)
class Helper:
    """The job of waiting for orders until the supervisor closes the channel."""

    context: Context

    @property
    def keep(self) -> Collection[int]:
        return frozenset(self.context.fds())

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        warm(self.context)
        gc.freeze()  # a collection then looks at what came after, and copies no page of all that was there
        home = {os.open(f"self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc): flag for name, flag in _HOME}
        ours = {*launch.STDIO, channel.fileno(), *self.context.fds(), *home}
        bus = cgroups.warm()
        while (received := channel.receive_order()) is not None:
            order, fds = received
            if not self._obey(order, fds, channel):
                return
            libc.setns(self.context.host_mntns, libc.CLONE_NEWNS)
            if order["job"] in ("pod", "sysctls"):
                for fd, flag in home.items():
                    libc.setns(fd, flag)
            process.close_all_except(ours | bus)
            bus = cgroups.warm()
            process.set_title(TITLE)

    def _obey(self, order: dict[str, Any], fds: list[int], channel: Channel) -> bool:
        """Do as told; whether this process can go on after it."""
        process.set_title(f"cri-shim: {order['title']}")
        kind, context = order["job"], self.context
        if kind == "container":
            gc.disable()
            names, target = order["pod"], fds[len(order["pod"]) + 1 :]
            handles = PodHandles.from_fds(dict(zip(names, fds[1:], strict=False)))
            create.Container(
                context, order["id"], fds[0], order["path"], handles, order["slot"], target[0] if target else None, order["stdin_once"]
            )(channel)
            return False
        if kind == "pod":
            sandbox = bundles.load_sandbox(fds[0])
            pod.Pod(context, fds[0], order["slot"]).make(sandbox, channel)
            return not {NamespaceType.USER, NamespaceType.PID} & set(sandbox.namespaces)
        if kind == "sysctls":
            jobs.Sysctls(context, fds[0], order["write"])(channel)
        elif kind == "remove cgroup":
            jobs.RemoveCgroup(Group.from_json(order["group"]), context.pins if order["pinned"] else None, order["pinned"])(channel)
        else:
            jobs.Unpin(order["path"])(channel)
        return True


def warm(context: Context) -> None:
    """Go through what creating a container does, as far as that has no effect."""
    spec, recipe = codec.decode(Spec, _SAMPLE), codec.decode(Recipe, _RECIPE)
    validate.validate(spec)
    resources = spec.linux.resources
    if resources is not None:
        cgroup_plan.resources(resources, context.layout)
    rootfs_plan.plan(spec, recipe, cgroup_version=context.layout.version, cgroup_paths=context.layout.controllers)
    inside.Program(spec.process, "/").build()
