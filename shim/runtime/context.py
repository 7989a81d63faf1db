"""What the supervisor lends its children: fds and facts that were found once, at its start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shim.cgroups.layout import Layout
from shim.linux.process import Inherited
from shim.runtime.slots import PidSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    layout: Layout
    host_mntns: int  # fd of the host's mount namespace
    lean_mntns: int  # fd of an almost empty one; unsharing from it costs the same whatever the host has mounted
    proc: int  # fd of a procfs mounted nowhere: what is written through it lands in procfs, whatever a container mounted
    pins: int | None = None  # fd of the mount namespace with the containers' pidfds; None where the kernel cannot bind them
    seccomp_cache: int  # fd of the directory with compiled filters
    inherited: Inherited  # limits, affinity and umask that the supervisor was started with; containers get these
    slots: PidSlots

    def fds(self) -> Iterator[int]:
        yield from (self.host_mntns, self.lean_mntns, self.proc, self.seccomp_cache)
        if self.pins is not None:
            yield self.pins


@dataclass(frozen=True, slots=True)
class PodHandles:
    """A pod's namespaces, by fd; None where the pod uses the host's. ``mount`` is the pod's own small mount namespace: /shm is its
    /dev/shm, /etc has its files (``podfiles``) and, where the PID namespace is shared, /proc is a procfs of it. Containers' mount
    namespaces are unshared from it.

    A mount held as a detached tree would do for new kernels only: before 6.15 a detached tree cannot be cloned again.
    """

    mount: int
    network: int | None = None
    ipc: int | None = None
    uts: int | None = None
    user: int | None = None
    pid: int | None = None

    @classmethod
    def from_fds(cls, named: dict[str, int]) -> PodHandles:
        """From the names and fds of a ``pod.create`` reply; names of other fds are ignored."""
        return cls(**{name: fd for name, fd in named.items() if name in cls.__slots__})

    def named(self) -> dict[str, int]:
        pairs = {name: getattr(self, name) for name in self.__slots__}
        return {name: fd for name, fd in pairs.items() if fd is not None}
