"""A pod: its configuration, the facts about it, and its state as they tell it. ``Pods`` is all of them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.network.base import PodNetwork
from cri.state import records
from cri.state.layout import Layout, boot_id
from cri.state.listing import ListCache
from cri.state.operations import Operations
from cri.state.records import PodFacts
from cri.state.store import Store
from protos.runtime.v1 import api_pb2 as v1

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cri.containers.model import Container


def pod_name(metadata: v1.PodSandboxMetadata) -> str:
    """What makes a sandbox unique, as one string. ``_`` cannot occur in a Kubernetes name, so no two pods meet in it."""
    for field, value in (("name", metadata.name), ("namespace", metadata.namespace), ("uid", metadata.uid)):
        if not value and field == "name":
            raise InvalidArgument("must not be empty", field="config.metadata.name")
        if "\0" in value or "\n" in value:
            raise InvalidArgument("contains a control character", field=f"config.metadata.{field}")
    return f"{metadata.name}_{metadata.namespace}_{metadata.uid}_{metadata.attempt}"


class Pod:
    """One pod sandbox. Everything is derived from ``facts`` and ``config``; the rest are locks and caches."""

    __slots__ = ("config", "config_json", "containers", "creating", "facts", "listed", "lock", "name", "status", "stopping")

    def __init__(self, facts: PodFacts, config: v1.PodSandboxConfig, config_json: msgspec.Raw) -> None:
        self.facts, self.config, self.config_json = facts, config, config_json
        self.name = pod_name(config.metadata)
        self.containers: dict[str, Container] = {}
        self.creating: set[str] = set()  # ids of containers whose CreateContainer is in flight
        self.lock = asyncio.Lock()  # held by stop and remove
        self.stopping = False  # StopPodSandbox has begun: no new containers
        self.listed: v1.PodSandbox | None = None
        self.status: v1.PodSandboxStatusResponse | None = None

    @property
    def id(self) -> str:
        return self.facts.id

    @property
    def state(self) -> v1.PodSandboxState:
        ready = self.facts.created_at and not self.facts.stopped_at
        return v1.SANDBOX_READY if ready else v1.SANDBOX_NOTREADY

    @property
    def ready(self) -> bool:
        """Whether containers may be created and started in it."""
        return not self.stopping and bool(self.facts.created_at) and not self.facts.stopped_at

    @property
    def namespace_options(self) -> v1.NamespaceOption:
        return self.config.linux.security_context.namespace_options

    @property
    def host_network(self) -> bool:
        return self.namespace_options.network == v1.NODE

    def require_ready(self) -> None:
        """Refuse work in a sandbox that is stopped or being stopped; the kubelet makes a new one then."""
        if not self.ready:
            raise FailedPrecondition(f"sandbox {self.id} is not ready: it is {'being stopped' if not self.facts.stopped_at else 'stopped'}")

    def network(self, netlink: Callable[[], Awaitable[int]] | None) -> PodNetwork:
        """The pod as the network sees it."""
        metadata = self.config.metadata
        return PodNetwork(
            pod_id=self.id,
            netns_path=self.facts.netns_path,
            namespace=metadata.namespace,
            name=metadata.name,
            uid=metadata.uid,
            hostname=self.config.hostname,
            netlink=netlink,
            port_mappings=tuple(self.config.port_mappings),
            annotations=dict(self.config.annotations),
            labels=dict(self.config.labels),
            dns=self.config.dns_config if self.config.HasField("dns_config") else None,
            cgroup_parent=self.config.linux.cgroup_parent,
        )


class Pods:
    """All pods of this node: the table, their records, and the RunPodSandbox calls in flight."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.boot_id = boot_id()
        self.lists: ListCache[v1.ListPodSandboxResponse] = ListCache()
        self.store: Store[Pod] = Store("sandbox")
        self.operations = Operations("run sandbox")
        self.levels: set[str] = set()  # SELinux levels of RunPodSandbox calls in flight
        self.records = records.Records(layout.pod_records, PodFacts, v1.PodSandboxConfig)
        self.watchers: list[Callable[[Pod, v1.ContainerEventType], None]] = []  # called when something has happened

    def find(self, pod_id: str) -> Pod | None:
        return self.store.get(pod_id)

    def get(self, pod_id: str) -> Pod:
        """The pod, or NotFound, which the kubelet takes as proof that it is gone."""
        pod = self.store.get(pod_id)
        if pod is None:
            raise NotFound(f"sandbox {pod_id!r} not found")
        return pod

    def commit(self, pod: Pod) -> None:
        """The pod exists from now on: its record first, then the table."""
        self.records.write(pod.facts, pod.config_json)
        self.store.add(pod)
        self.tell(pod, v1.CONTAINER_CREATED_EVENT)
        self.tell(pod, v1.CONTAINER_STARTED_EVENT)

    def save(self, pod: Pod) -> None:
        """Write changed facts."""
        self.changed(pod)
        self.records.write(pod.facts, pod.config_json)

    def changed(self, pod: Pod) -> None:
        """Something that lists or status show is different."""
        pod.listed = pod.status = None
        self.store.version += 1

    def forget(self, pod: Pod) -> None:
        self.records.remove(pod.id)
        self.store.discard(pod)
        self.tell(pod, v1.CONTAINER_DELETED_EVENT)

    def tell(self, pod: Pod, event: v1.ContainerEventType) -> None:
        """Tell the watchers; the pod is in its new state."""
        for watcher in self.watchers:
            watcher(pod, event)


def now() -> int:
    """Nanoseconds since the epoch, as CRI timestamps are."""
    return time.time_ns()
