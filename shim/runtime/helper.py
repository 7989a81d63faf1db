"""A child that is forked before there is anything to do: it waits warm for an order, so that nobody waits for a fork.

Jobs are done one after the other, and the helper is as it was after each: in the host's namespaces, without the job's fds. It never enters
a cgroup or PID namespace of a container. What cannot be undone (a user namespace, hooks, a container in a PID namespace that others live
in, whose stage1 it becomes) is its last. What it was forked with is what any child is forked with.
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
from shim.runtime import create, jobs, launch, pod
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
_ORDERS = 500  # after which it goes, and another takes its place
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
    warm: bool  # there is time before the first order comes

    @property
    def keep(self) -> Collection[int]:
        return frozenset(self.context.fds())

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        process.reset_inherited(self.context.inherited)
        if self.warm:
            warm(self.context)
        gc.freeze()  # a collection then looks at what came after, and copies no page of all that was there
        gc.disable()  # what is garbage goes when this process does
        home = {os.open(f"self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.context.proc): flag for name, flag in _HOME}
        ours = {*launch.STDIO, channel.fileno(), *self.context.fds(), *home}
        bus = cgroups.warm()
        for _ in range(_ORDERS):
            received = channel.receive_order()
            if received is None or not self._obey(*received, channel):
                return
            order = received[0]
            libc.setns(self.context.host_mntns, libc.CLONE_NEWNS)
            if order["job"] in ("pod", "container", "sysctls"):
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
            names, target = order["pod"], fds[len(order["pod"]) + 2 :]
            handles = PodHandles.from_fds(dict(zip(names, fds[2:], strict=False)))
            joined = target[0] if target else None
            return create.Container(
                context, order["id"], fds[0], order["path"], handles, order["slot"], fds[1], joined, order["stdin_once"]
            ).make(channel)
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
