"""StopPodSandbox: containers, network, namespaces, in this order. What is done is recorded, so a retry goes on where this stopped."""

from __future__ import annotations

import asyncio
from functools import partial

from cri.containers import stop as stop_container
from cri.containers.model import Container, Containers
from cri.network.base import Network
from cri.pods.model import Pod, Pods, now
from cri.state import failpoints
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1


async def stop(pod_id: str, *, pods: Pods, containers: Containers, supervisor: Supervisor, network: Network) -> None:
    """Stop the sandbox; one that is stopped or unknown is fine (the kubelet repeats this call until it succeeds)."""
    pod = pods.find(pod_id)
    if pod is not None:
        async with pod.lock:
            await release(pod, pods=pods, containers=containers, supervisor=supervisor, network=network)


async def release(pod: Pod, *, pods: Pods, containers: Containers, supervisor: Supervisor, network: Network) -> None:
    """Give back everything that a stopped sandbox does not have. ``pod.lock`` is held."""
    facts = pod.facts
    if facts.released_at:
        return
    pod.stopping = True
    pods.changed(pod)
    # A create that is past its check would bring a container into a sandbox without namespaces: it sees ``stopping`` and undoes itself.
    await containers.operations.drain(pod.creating)
    failpoints.hit("stop sandbox", "containers")
    await _end_all(list(pod.containers.values()), containers, supervisor)
    if not facts.stopped_at:
        facts.stopped_at = now()
        pods.save(pod)
        pods.tell(pod, v1.CONTAINER_STOPPED_EVENT)
    failpoints.hit("stop sandbox", "network")
    if facts.netns_path:
        await network.teardown(pod.network(partial(supervisor.pod_netlink, pod.id)))
    failpoints.hit("stop sandbox", "namespaces")
    await supervisor.delete_pod(pod.id)
    failpoints.hit("stop sandbox", "record")
    facts.released_at = now()
    facts.pid = 0
    pods.save(pod)


async def _end_all(members: list[Container], containers: Containers, supervisor: Supervisor) -> None:
    """Kill what runs and drop what was never started, all at once; one that cannot be killed is reported after the others are gone."""
    todo = [c for c in members if c.state != v1.CONTAINER_EXITED or not c.facts.released_at]
    if not todo:
        return
    results = await asyncio.gather(
        *(stop_container.end(c, containers=containers, supervisor=supervisor) for c in todo), return_exceptions=True
    )
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(str(other))
        raise errors[0]
