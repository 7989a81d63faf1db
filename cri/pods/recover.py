"""The start of the daemon: records become pods and containers again, and what nobody answers for is given back.

``load`` is short and asks nobody: records, exit records and what the supervisor said when we met. After it the daemon serves, and 50
running containers are listed at once. ``settle`` does the rest beside the first requests, each object in a task of its own, so that one
that hangs delays nobody.

A pod's or container's directory under ``state`` is its intent: made before anything is acquired, removed after everything is released.
A directory without a record is a creation that the end of the last daemon cut short; nobody was told its id, so it is undone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from functools import partial

from cri.containers.exits import Exits
from cri.containers.model import Container, Containers
from cri.images.store import Images
from cri.network.base import Network, PodNetwork
from cri.pods import stop
from cri.pods.model import Pod, Pods, now
from cri.pods.run import INTENT, remove_directory, remove_tree
from cri.state import records
from cri.state.records import PodFacts
from cri.supervisor import ContainerFacts as Known
from cri.supervisor import Snapshot, Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci import bundle
from shim.oci.bundle import ExitRecord

LOST_CODE = 255
LOST = "Unknown"

log = logging.getLogger("cri.recovery")


class Recovery:
    """One start of the daemon."""

    def __init__(self, pods: Pods, containers: Containers, supervisor: Supervisor, network: Network, images: Images, exits: Exits) -> None:
        self._pods, self._containers, self._exits = pods, containers, exits
        self._supervisor, self._network, self._images = supervisor, network, images
        self._layout = pods.layout
        self._lost_pods: set[str] = set()
        self._lost_containers: set[str] = set()

    def load(self) -> None:
        """Fill the tables. No await, nothing that can hang."""
        known = self._supervisor.snapshot()
        self._supervisor.on_replaced = self._replaced
        for pod_facts, pod_config, raw in self._pods.records.load():
            pod = Pod(pod_facts, pod_config, raw)
            self._pods.store.add(pod)
            self._reconcile_pod(pod, known)
        for facts, config, raw in self._containers.records.load():
            owner = self._pods.find(facts.pod_id)
            if owner is None:
                log.error("container %s: its sandbox %s has no usable record; it is removed", facts.id, facts.pod_id)
                self._containers.records.remove(facts.id)
                self._lost_containers.add(facts.id)
                continue
            container = Container(facts, config, raw, owner)
            self._containers.adopt(container)
            self._reconcile_container(container, known.containers.get(facts.id))
        self._lost_pods |= ({*_names(self._layout.pods), *known.pods}) - {pod.id for pod in self._pods.store}
        found = {*_names(self._layout.bundles), *_names(self._layout.volumes), *known.containers}
        self._lost_containers |= found - {c.id for c in self._containers.store}
        log.info(
            "%d sandboxes and %d containers recovered; %d and %d half-made ones to undo",
            len(self._pods.store),
            len(self._containers.store),
            len(self._lost_pods),
            len(self._lost_containers),
        )

    def _reconcile_pod(self, pod: Pod, known: Snapshot) -> None:
        facts = pod.facts
        alive = pod.id in known.pods and known.pods[pod.id].ready and facts.boot_id == self._pods.boot_id
        if alive and not facts.stopped_at:
            return
        pod.stopping = True
        if not facts.stopped_at:
            # Its namespaces went with the last boot, or with a supervisor that nobody could follow.
            facts.stopped_at = now()
            self._pods.save(pod)
            self._pods.tell(pod, v1.CONTAINER_STOPPED_EVENT)

    def _reconcile_container(self, container: Container, known: Known | None) -> None:
        facts = container.facts
        if facts.finished_at:
            return
        if facts.boot_id != self._pods.boot_id:
            self._containers.exited(container, _lost("the machine was restarted"))
            return
        if known is not None:
            self._note_start(container, known)
        ended = (known.exit if known is not None else None) or self._exit_record(container)
        if ended is None and known is None:
            ended = _lost("its process was lost together with all of the runtime")
        if ended is not None:
            self._containers.exited(container, ended)

    def _note_start(self, container: Container, known: Known) -> None:
        facts = container.facts
        if known.started_at and not facts.started_at:
            facts.started_at, facts.pid = known.started_at, known.pid
            self._containers.save_soon(container)
            self._containers.tell(container, v1.CONTAINER_STARTED_EVENT)

    def _replaced(self) -> None:
        """``Supervisor.on_replaced``: what the calls that were in flight have done after all, and which pods could not be followed."""
        known = self._supervisor.snapshot()
        for container in self._containers.store:
            found = known.containers.get(container.id)
            if found is not None and not container.facts.finished_at:
                self._note_start(container, found)
        for pod in self._pods.store:
            if not pod.facts.stopped_at:
                self._reconcile_pod(pod, known)

    def _exit_record(self, container: Container) -> ExitRecord | None:
        try:
            fd = os.open(self._layout.bundle(container.id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return bundle.read_exit(fd)
        except Failure as failure:
            log.error("container %s: %s", container.id, failure)
            return None
        finally:
            os.close(fd)

    async def settle(self) -> None:
        """Give back what is left over; every failure is logged, and none stops the others."""
        work: list[tuple[str, Awaitable[None]]] = []
        work += [(f"container {one}", self._undo_container(one)) for one in self._lost_containers]
        await _all(work)
        work = [(f"sandbox {one}", self._undo_pod(one)) for one in self._lost_pods]
        work += [(f"sandbox {pod.id}", self._finish(pod)) for pod in self._pods.store if pod.stopping and not pod.facts.released_at]
        for container in self._containers.store:
            if container.facts.finished_at and not container.facts.released_at:
                self._exits.release(container)
        await _all(work)
        await _all([("network", self._recover_network()), ("snapshots", self._sweep())])

    # Who is live is asked in the same step of the event loop as the answer is used: creations go on meanwhile.

    async def _recover_network(self) -> None:
        live = {pod.id for pod in self._pods.store if pod.facts.netns_path and not pod.facts.released_at}
        await self._network.recover(live | self._pods.operations.ids())

    async def _sweep(self) -> None:
        await self._images.sweep({c.id for c in self._containers.store} | self._containers.operations.ids())

    async def _undo_container(self, container_id: str) -> None:
        await self._supervisor.delete_container(container_id)
        await self._images.release(container_id)
        await remove_tree(self._layout.container_volumes(container_id))
        remove_directory(self._layout.bundle(container_id))

    async def _undo_pod(self, pod_id: str) -> None:
        await self._network.teardown(self._intent(pod_id))
        await self._supervisor.delete_pod(pod_id)
        remove_directory(self._layout.pod(pod_id))

    def _intent(self, pod_id: str) -> PodNetwork:
        """The pod as RunPodSandbox meant it; by its id alone where even that is unreadable."""
        try:
            data = (self._layout.pod(pod_id) / INTENT).read_bytes()
            facts, config, raw = records.parse(records.decoder_for(PodFacts), data, v1.PodSandboxConfig())
        except FileNotFoundError:  # in the host's network, or cut short before it was written
            return PodNetwork(pod_id=pod_id, netns_path=str(self._layout.netns(pod_id)))
        except (OSError, *records.UNREADABLE) as e:
            log.warning("sandbox %s: intent cannot be read (%s); released by its id", pod_id, e)
            return PodNetwork(pod_id=pod_id, netns_path=str(self._layout.netns(pod_id)))
        return Pod(facts, config, raw).network(partial(self._supervisor.pod_netlink, pod_id))

    async def _finish(self, pod: Pod) -> None:
        """A stop that was cut short, or a pod of an earlier boot."""
        async with pod.lock:
            await stop.release(pod, pods=self._pods, containers=self._containers, supervisor=self._supervisor, network=self._network)


def _lost(why: str) -> ExitRecord:
    return ExitRecord(LOST_CODE, now(), reason=LOST, message=why)


def _names(directory: os.PathLike[str]) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


async def _all(work: list[tuple[str, Awaitable[None]]]) -> None:
    results = await asyncio.gather(*(one for _, one in work), return_exceptions=True)
    for (what, _), result in zip(work, results, strict=True):
        if isinstance(result, Exception):
            log.error("%s: not released: %s", what, result)
