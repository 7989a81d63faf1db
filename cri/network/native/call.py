"""What a native plugin works with: one operation on one attachment, the node's netlink, the pod's, and the rules to be."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cri.network.native.rules import Iptables, Plan
from cri.network.netlink import Socket

T = TypeVar("T")
Sysctls = Callable[[Mapping[str, str | None]], Awaitable[tuple[dict[str, str], dict[str, int]]]]

_SYSCTL = Path("/proc/sys")
_CHAIN_MAX = 28


async def to_its_end(function: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
    """In a thread, and awaited also if the caller is cancelled: what follows, a DEL or the end of a lock, must not overtake it."""
    work = asyncio.get_running_loop().run_in_executor(threads, function)
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        work.exception()
        raise asyncio.CancelledError
    return work.result()


class Host:
    """The node's side. Netlink blocks, so it happens in threads: one for all that makes something, which the kernel serializes anyway,
    several for deleting links, where a request sleeps for 17 ms without any lock (see cri/network/bridge.py)."""

    def __init__(self) -> None:
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cni")
        self._deleters = ThreadPoolExecutor(max_workers=10, thread_name_prefix="cni-delete")
        self._socket: Socket | None = None  # the maker's
        self.iptables = {4: Iptables(4), 6: Iptables(6)}

    async def make(self, function: Callable[[Socket], T]) -> T:
        return await to_its_end(lambda: function(self._own()), self._maker)

    async def delete(self, function: Callable[[Socket], T]) -> T:
        def alone() -> T:
            with Socket() as sock:
                return function(sock)

        return await to_its_end(alone, self._deleters)

    def _own(self) -> Socket:
        if self._socket is None:
            self._socket = Socket()
        return self._socket

    async def close(self) -> None:
        for threads in (self._maker, self._deleters):
            await asyncio.get_running_loop().run_in_executor(None, threads.shutdown)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass(slots=True)
class Call:
    """``runtime`` has the capability arguments that the plugin at work declares; ``netns`` is empty if the namespace is gone."""

    network: str
    container_id: str
    if_name: str
    netns: str
    version: str
    host: Host
    patience: float
    runtime: Mapping[str, Any] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)  # by address family
    sysctls: Sysctls | None = None
    netlink: Callable[[], Awaitable[int]] | None = None
    withdrawing: asyncio.Task[None] | None = None  # of rules, which must be over before an address is given back
    _inside: Socket | None = None

    def __post_init__(self) -> None:
        self.take_plans()

    def take_plans(self) -> dict[int, Plan]:
        """What has been planned so far; empty plans take its place."""
        plans, self.plans = self.plans, {version: Plan(owner=self.container_id) for version in (4, 6)}
        return plans

    @property
    def owner(self) -> tuple[str, str]:
        return self.container_id, self.if_name

    def hashed(self, prefix: str, length: int = _CHAIN_MAX) -> str:
        """A name of this attachment on this network, as CNI's plugins make it."""
        return (prefix + hashlib.sha512(f"{self.network}{self.container_id}".encode()).hexdigest())[:length]

    async def inside(self) -> Socket:
        """A socket in the pod's namespace."""
        if self._inside is None:
            if self.netlink is None:
                raise ValueError("no netlink socket in the pod's namespace")
            self._inside = Socket(await self.netlink())
        return self._inside

    async def withdrawn(self) -> None:
        """Raises what removing the rules did."""
        if self.withdrawing is not None:
            await self.withdrawing

    async def parameters(self, write: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, int]]:
        """Write and read parameters of the pod's namespace."""
        if self.sysctls is None:
            raise ValueError("no way into the pod's namespace")
        return await self.sysctls(write)

    def namespace(self) -> int:
        """A descriptor of the pod's namespace; -1 if it is gone."""
        return os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC) if self.netns else -1

    def close(self) -> None:
        if self._inside is not None:
            self._inside.close()
            self._inside = None


def node_sysctl(name: str, value: str) -> None:
    """A parameter of the node; one that is right already is not written (read-only /proc/sys). Raises OSError."""
    file = _SYSCTL / name
    if file.read_text().strip() != value:
        file.write_text(value)


def own_routes(link: str) -> None:
    """CVE-2020-10749: no router advertisement changes a link of ours. There is nothing to do without IPv6."""
    try:
        node_sysctl(f"net/ipv6/conf/{link}/accept_ra", "0")
    except FileNotFoundError:
        return
