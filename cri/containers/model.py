"""A container: its configuration, the facts about it, and its state as they tell it. ``Containers`` is all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.state import records
from cri.state.layout import Layout
from cri.state.listing import ListCache
from cri.state.operations import Operations
from cri.state.records import ContainerFacts
from cri.state.store import Store
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.bundle import ExitRecord
from shim.oci.spec import Process

if TYPE_CHECKING:
    from cri.containers.stop import Stopping
    from cri.pods.model import Pod, Pods

log = logging.getLogger("cri.containers")

STATE_NAMES: Final = {v1.CONTAINER_CREATED: "created", v1.CONTAINER_RUNNING: "running", v1.CONTAINER_EXITED: "exited"}

# Facts that the supervisor keeps too (started, exited) are written a moment later, several at once: after a crash of the daemon they
# come back from it or from exit.json.
_SAVE_AFTER: Final = 0.05
_EARLY_EXITS: Final = 1024


def container_name(pod_id: str, metadata: v1.ContainerMetadata) -> str:
    """What makes a container unique in its pod, as one string."""
    if not metadata.name:
        raise InvalidArgument("must not be empty", field="config.metadata.name")
    if "\0" in metadata.name or "\n" in metadata.name:
        raise InvalidArgument("contains a control character", field="config.metadata.name")
    return f"{metadata.name}_{metadata.attempt}@{pod_id}"


class Container:
    """One container. Everything is derived from ``facts`` and ``config``; the rest are locks, waiters and caches."""

    __slots__ = (
        "config",
        "config_json",
        "ended",
        "execs",
        "facts",
        "listed",
        "lock",
        "name",
        "pod",
        "process",
        "releasing",
        "removing",
        "starting",
        "status",
        "stopping",
    )

    def __init__(self, facts: ContainerFacts, config: v1.ContainerConfig, config_json: msgspec.Raw, pod: Pod) -> None:
        self.facts, self.config, self.config_json, self.pod = facts, config, config_json, pod
        self.name = container_name(pod.id, config.metadata)
        self.lock = asyncio.Lock()  # held by start, by the decision to stop, by update and by remove
        self.ended = asyncio.Event()  # the process has exited and the record says so
        self.execs: set[str] = set()  # exec sessions in flight
        self.process: Process | None = None  # of the spec, loaded at the first exec
        self.releasing: asyncio.Task[None] | None = None
        self.removing = False
        self.starting = False  # StartContainer is waiting for the core
        self.stopping: Stopping | None = None
        self.listed: v1.Container | None = None
        self.status: v1.ContainerStatus | None = None
        if facts.finished_at:
            self.ended.set()

    @property
    def id(self) -> str:
        return self.facts.id

    @property
    def state(self) -> v1.ContainerState:
        facts = self.facts
        if facts.finished_at:
            return v1.CONTAINER_EXITED
        if facts.started_at:
            return v1.CONTAINER_RUNNING
        return v1.CONTAINER_CREATED if facts.created_at else v1.CONTAINER_UNKNOWN

    @property
    def running(self) -> bool:
        return bool(self.facts.started_at) and not self.facts.finished_at

    @property
    def own_pid_namespace(self) -> bool:
        """Whether the kernel kills every process of the container with its first one."""
        wanted = self.config.linux.security_context.namespace_options.pid
        return wanted == v1.CONTAINER or (wanted == v1.POD and self.pod.namespace_options.pid == v1.CONTAINER)

    async def ended_within(self, seconds: float) -> bool:
        """Whether the process has ended, or does so in this time."""
        try:
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    def require_running(self, what: str) -> None:
        """Refuse ``what`` (an exec, a log reopen) on a container that has no process."""
        if not self.running:
            raise FailedPrecondition(f"{what}: container {self.id} is in {v1.ContainerState.Name(self.state)} state")


class Containers:
    """All containers of this node: the table, their records, and the CreateContainer calls in flight."""

    def __init__(self, layout: Layout, pods: Pods) -> None:
        self.layout = layout
        self.lists: ListCache[v1.ListContainersResponse] = ListCache()
        self.store: Store[Container] = Store("container")
        self.operations = Operations("create container")
        self.records = records.Records(layout.container_records, ContainerFacts, v1.ContainerConfig)
        self.watchers: list[Callable[[Container, v1.ContainerEventType], None]] = []  # called when something has happened
        self._pods = pods
        self._dirty: dict[str, Container] = {}
        self._early: dict[str, ExitRecord] = {}

    def find(self, container_id: str) -> Container | None:
        return self.store.get(container_id)

    def get(self, container_id: str) -> Container:
        """The container, or NotFound, which the kubelet takes as proof that it is gone."""
        container = self.store.get(container_id)
        if container is None:
            raise NotFound(f"container {container_id!r} not found")
        return container

    def commit(self, container: Container) -> None:
        """The container exists from now on: its record first, then the tables."""
        self.records.write(container.facts, container.config_json)
        self.adopt(container, new=True)

    def adopt(self, container: Container, *, new: bool = False) -> None:
        """Enter a container whose record exists."""
        self.store.add(container)
        container.pod.containers[container.id] = container
        self._pods.changed(container.pod)
        if new:
            self.tell(container, v1.CONTAINER_CREATED_EVENT)
        early = self._early.pop(container.id, None)
        if early is not None:
            self.exited(container, early)

    def save(self, container: Container) -> None:
        """Write changed facts now: they are known to nobody else."""
        self.changed(container)
        self._dirty.pop(container.id, None)
        self.records.write(container.facts, container.config_json)

    def save_soon(self, container: Container) -> None:
        """Write changed facts in a moment: the supervisor knows them too."""
        self.changed(container)
        if not self._dirty:
            asyncio.get_running_loop().call_later(_SAVE_AFTER, self.flush)
        self._dirty[container.id] = container

    def write_now(self, container: Container) -> None:
        """Write facts that wait."""
        if self._dirty.pop(container.id, None) is not None:
            self.records.write(container.facts, container.config_json)

    def flush(self) -> None:
        """Write what waits. A full disk costs nothing but a line now and another try."""
        while self._dirty:
            container_id, container = self._dirty.popitem()
            try:
                self.records.write(container.facts, container.config_json)
            except OSError as e:
                log.error("record of container %s cannot be written: %s; trying again", container_id, e)
                self._dirty[container_id] = container
                asyncio.get_running_loop().call_later(1, self.flush)
                return

    def changed(self, container: Container) -> None:
        """Something that lists or status show is different."""
        container.listed = container.status = None
        self.store.version += 1
        self._pods.changed(container.pod)

    def forget(self, container: Container) -> None:
        self._dirty.pop(container.id, None)
        self.records.remove(container.id)
        self.store.discard(container)
        container.pod.containers.pop(container.id, None)
        self._pods.changed(container.pod)
        self.tell(container, v1.CONTAINER_DELETED_EVENT)

    def tell(self, container: Container, event: v1.ContainerEventType) -> None:
        """Tell the watchers; the container is in its new state."""
        for watcher in self.watchers:
            watcher(container, event)

    def exit_reported(self, container_id: str, record: ExitRecord) -> Container | None:
        """The supervisor says that a container has ended. One that is still being created is kept for its commit."""
        container = self.store.get(container_id)
        if container is not None:
            self.exited(container, record)
            return container
        if len(self._early) >= _EARLY_EXITS:
            del self._early[next(iter(self._early))]
        self._early[container_id] = record
        return None

    def exited(self, container: Container, record: ExitRecord) -> None:
        """Fold an exit record into the facts. The first one counts."""
        facts = container.facts
        if facts.finished_at:
            return
        facts.exit_code, facts.message = record.exit_code, record.message
        facts.reason = exit_reason(record)
        # A clock set back between start and exit must not make a container end before it began.
        facts.finished_at = max(record.finished_at, facts.started_at, facts.created_at, 1)
        facts.pid = 0
        container.ended.set()
        if container.stopping is not None:
            container.stopping.wake.set()
        self.save_soon(container)
        if not container.starting:  # else the start tells it, after its own event
            self.tell(container, v1.CONTAINER_STOPPED_EVENT)


def exit_reason(record: ExitRecord) -> str:
    """The word the kubelet shows: OOMKilled wins, a reason of the core comes next, then what the code says."""
    if record.oom_killed:
        return "OOMKilled"
    if record.reason:
        return record.reason
    return "Completed" if record.exit_code == 0 else "Error"
