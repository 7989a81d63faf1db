"""PodSandboxStats, ListPodSandboxStats and StreamPodSandboxStats."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from cri.containers.model import Container
from cri.pods.model import Pod, Pods
from cri.state.listing import labels_match, pages
from cri.stats import containers as container_stats
from cri.stats import messages, network
from cri.stats import usage as samples
from cri.stats.meters import Meters, Reading
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1


async def pod_stats(pod_id: str, *, pods: Pods, meters: Meters, supervisor: Supervisor) -> v1.PodSandboxStatsResponse:
    """What one sandbox uses, and its containers. Raises NotFound."""
    pod = pods.get(pod_id)
    return v1.PodSandboxStatsResponse(stats=await _one(pod, own_group(pod, parents(pods)), meters, supervisor))


async def list_pod_stats(
    question: v1.PodSandboxStatsFilter, *, pods: Pods, meters: Meters, supervisor: Supervisor
) -> v1.ListPodSandboxStatsResponse:
    """What each ready sandbox uses that matches every condition of the filter; the id may be a unique beginning."""
    return v1.ListPodSandboxStatsResponse(stats=await _many(question, pods, meters, supervisor))


async def stream_pod_stats(
    question: v1.PodSandboxStatsFilter, *, pods: Pods, meters: Meters, supervisor: Supervisor
) -> AsyncIterator[v1.StreamPodSandboxStatsResponse]:
    """The same in several messages."""
    for page in pages(await _many(question, pods, meters, supervisor)):
        yield v1.StreamPodSandboxStatsResponse(pod_sandbox_stats=page)


def parents(pods: Pods) -> Counter[str]:
    """How many ready pods each cgroup parent has."""
    return Counter(pod.config.linux.cgroup_parent for pod in pods.store if not pod.facts.stopped_at)


def own_group(pod: Pod, parents: Counter[str]) -> bool:
    """Whether the pod's cgroup parent is its alone. The kubelet makes one for each pod; other clients put many pods into one, or none."""
    return parents[pod.config.linux.cgroup_parent] == 1


def reading(pod: Pod, own: bool, meters: Meters, members: Sequence[Reading]) -> Reading | None:
    """The pod's group, which counts more than its containers do: memory of those that are gone, PID 1. Without one, their sum."""
    found = meters.pod(pod) if own else None
    if found is not None:
        return found
    together = samples.total([each.usage for each in members])
    if together is None:
        return None
    rates = [each.rate for each in members if each.rate is not None]
    return Reading(time.time_ns(), together, sum(rates) if rates else None)


async def _many(question: v1.PodSandboxStatsFilter, pods: Pods, meters: Meters, supervisor: Supervisor) -> list[v1.PodSandboxStats]:
    counted = parents(pods)
    return [await _one(pod, own_group(pod, counted), meters, supervisor) for pod in _matching(question, pods)]


def _matching(question: v1.PodSandboxStatsFilter, pods: Pods) -> list[Pod]:
    if question.id:
        pod = pods.find(question.id)
        found = [pod] if pod is not None else []
    else:
        found = list(pods.store)
    return [pod for pod in found if pod.state == v1.SANDBOX_READY and labels_match(question.label_selector, pod.config.labels)]


async def _one(pod: Pod, own: bool, meters: Meters, supervisor: Supervisor) -> v1.PodSandboxStats:
    config = pod.config
    stats = v1.PodSandboxStats(
        attributes=v1.PodSandboxAttributes(id=pod.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations)
    )
    members: list[Container] = list(pod.containers.values())
    await meters.layers.first(members)
    interfaces = await network.read(pod, supervisor)
    taken = [(container, meters.container(container)) for container in members]
    whole = reading(pod, own, meters, [sample for _, sample in taken if sample is not None])
    stats.linux.CopyFrom(
        v1.LinuxPodSandboxStats(
            cpu=messages.cpu(whole) if whole is not None else None,
            memory=messages.memory(whole) if whole is not None else None,
            io=messages.io(whole) if whole is not None else None,
            process=messages.processes(whole) if whole is not None else None,
            network=messages.network(time.time_ns(), interfaces),
            containers=[container_stats.one(container, sample, meters) for container, sample in taken],
        )
    )
    return stats
