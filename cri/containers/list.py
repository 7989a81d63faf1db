"""ListContainers and StreamContainers with all their filters."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cri.containers.model import Container, Containers
from cri.containers.status import listed
from cri.pods.model import Pods
from cri.state.listing import labels_match, pages
from protos.runtime.v1 import api_pb2 as v1


def list_containers(question: v1.ContainerFilter, *, containers: Containers, pods: Pods) -> v1.ListContainersResponse:
    """Containers that match every condition; ids may be unique beginnings. The answer is shared: nobody may change it."""
    key = question.SerializeToString(deterministic=True)
    version = containers.store.version
    answer = containers.lists.get(version, key)
    if answer is None:
        found = _matching(question, containers, pods)
        answer = containers.lists.put(version, key, v1.ListContainersResponse(containers=[listed(c) for c in found]))
    return answer


async def stream_containers(
    question: v1.ContainerFilter, *, containers: Containers, pods: Pods
) -> AsyncIterator[v1.StreamContainersResponse]:
    """The same in several messages."""
    for page in pages([listed(c) for c in _matching(question, containers, pods)]):
        yield v1.StreamContainersResponse(containers=page)


def _matching(question: v1.ContainerFilter, containers: Containers, pods: Pods) -> list[Container]:
    found: list[Container]
    if question.id:
        one = containers.find(question.id)
        found = [one] if one is not None else []
    else:
        found = list(containers.store)
    if question.pod_sandbox_id:
        pod = pods.find(question.pod_sandbox_id)
        found = [c for c in found if c.pod is pod]
    if question.HasField("state"):
        found = [c for c in found if c.state == question.state.state]
    if question.label_selector:
        found = [c for c in found if labels_match(question.label_selector, c.config.labels)]
    return found
