"""UpdatePodSandboxResources: the kubelet tells what a pod has after an in-place resize."""

from __future__ import annotations

from cri.pods.model import Pods
from cri.state import records
from protos.runtime.v1 import api_pb2 as v1


def update(request: v1.UpdatePodSandboxResourcesRequest, *, pods: Pods) -> None:
    """Record the new resources. The pod's own cgroup is the kubelet's: it has written the limits there before it asks."""
    pod = pods.get(request.pod_sandbox_id)
    pod.require_ready()
    linux = pod.config.linux
    if request.HasField("overhead"):
        linux.overhead.CopyFrom(request.overhead)
    if request.HasField("resources"):
        linux.resources.CopyFrom(request.resources)
    pod.config_json = records.config_json(pod.config)
    pods.save(pod)
