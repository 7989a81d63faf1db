"""ListPodSandbox and StreamPodSandboxes with their filter."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cri.pods.model import Pod, Pods
from cri.pods.status import listed
from cri.state.listing import labels_match, pages
from protos.runtime.v1 import api_pb2 as v1


def list_pods(question: v1.PodSandboxFilter, *, pods: Pods) -> v1.ListPodSandboxResponse:
    """Sandboxes that match every condition of the filter; an id may be the unique beginning of one. The answer is shared."""
    key = question.SerializeToString(deterministic=True)
    version = pods.store.version
    answer = pods.lists.get(version, key)
    if answer is None:
        answer = pods.lists.put(version, key, v1.ListPodSandboxResponse(items=[listed(pod) for pod in _matching(question, pods)]))
    return answer


async def stream_pods(question: v1.PodSandboxFilter, *, pods: Pods) -> AsyncIterator[v1.StreamPodSandboxesResponse]:
    """The same in several messages."""
    for page in pages([listed(pod) for pod in _matching(question, pods)]):
        yield v1.StreamPodSandboxesResponse(pod_sandboxes=page)


def _matching(question: v1.PodSandboxFilter, pods: Pods) -> list[Pod]:
    if question.id:
        pod = pods.find(question.id)
        found = [pod] if pod is not None else []
    else:
        found = list(pods.store)
    if question.HasField("state"):
        found = [pod for pod in found if pod.state == question.state.state]
    if question.label_selector:
        found = [pod for pod in found if labels_match(question.label_selector, pod.config.labels)]
    return found
