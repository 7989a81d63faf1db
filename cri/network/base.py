"""What a pod network is, whichever way it is made: the built-in bridge, CNI plugins, or nothing (host network)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from protos.runtime.v1 import api_pb2 as v1


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """One pod as a network sees it.

    ``netns_path`` is the pin of the pod's network namespace. ``netlink`` gives a NETLINK_ROUTE socket that was opened inside that
    namespace (a child of the supervisor opens it: the daemon is threaded and never calls setns); the network that asked for it closes it.
    """

    pod_id: str
    netns_path: str
    namespace: str = ""
    name: str = ""
    uid: str = ""
    hostname: str = ""
    netlink: Callable[[], Awaitable[int]] | None = None
    port_mappings: tuple[v1.PortMapping, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    dns: v1.DNSConfig | None = None
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What a pod got. ``ips`` has the primary address first; ``raw`` is JSON-able detail for verbose status."""

    ips: tuple[str, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)


class Status(NamedTuple):
    """The NetworkReady condition of the CRI Status call. ``pending``: the first answer since the start is about to be known."""

    ready: bool
    reason: str = ""
    message: str = ""
    pending: bool = False


class Network(Protocol):
    """Every implementation passes tests/kernel/test_network_suite.py."""

    async def setup(self, pod: PodNetwork) -> Result:
        """Connect the pod. Whatever survives us is recorded before it is acquired; a failure leaves nothing behind."""
        ...

    async def teardown(self, pod: PodNetwork) -> None:
        """Disconnect the pod and release its addresses. Idempotent; works when the namespace or the record is gone."""
        ...

    def status(self) -> Status: ...

    async def recover(self, live: Collection[str]) -> None:
        """After a start of the daemon: repair what the node must have, release what belongs to pods that are not in ``live``."""
        ...

    def update_pod_cidr(self, cidr: str) -> None:
        """The kubelet's UpdateRuntimeConfig: the node's pod CIDR, or several, comma-separated."""
        ...

    async def close(self) -> None: ...
