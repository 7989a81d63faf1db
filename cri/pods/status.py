"""PodSandboxStatus. Built once per change: the kubelet asks for every pod every second, and mostly nothing has happened."""

from __future__ import annotations

import json
import time
from typing import Any

from cri.containers.status import container_status
from cri.pods.model import Pod, Pods
from protos.runtime.v1 import api_pb2 as v1


def status(pod_id: str, *, verbose: bool, pods: Pods) -> v1.PodSandboxStatusResponse:
    """The sandbox with the statuses of its containers at one moment, ``timestamp``. Raises NotFound."""
    pod = pods.get(pod_id)
    response = pod.status
    if response is None:
        response = pod.status = v1.PodSandboxStatusResponse(
            status=pod_status(pod), containers_statuses=[container_status(c) for c in pod.containers.values()]
        )
    if verbose:
        answer = v1.PodSandboxStatusResponse()
        answer.CopyFrom(response)
        answer.info["info"] = json.dumps(_info(pod, pods))
        response = answer
    response.timestamp = time.time_ns()
    return response


def pod_status(pod: Pod) -> v1.PodSandboxStatus:
    """The sandbox alone, as events carry it too."""
    facts, config = pod.facts, pod.config
    built = v1.PodSandboxStatus(
        id=pod.id,
        metadata=config.metadata,
        state=pod.state,
        created_at=facts.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=facts.runtime_handler,
        linux=v1.LinuxPodSandboxStatus(namespaces=v1.Namespace(options=pod.namespace_options)),
        network=v1.PodSandboxNetworkStatus(),
    )
    # A stopped pod keeps no address: it may belong to another one already.
    if facts.ips and not facts.stopped_at:
        built.network.ip = facts.ips[0]
        built.network.additional_ips.extend(v1.PodIP(ip=ip) for ip in facts.ips[1:])
    return built


def listed(pod: Pod) -> v1.PodSandbox:
    """The sandbox as ListPodSandbox shows it."""
    if pod.listed is None:
        config = pod.config
        pod.listed = v1.PodSandbox(
            id=pod.id,
            metadata=config.metadata,
            state=pod.state,
            created_at=pod.facts.created_at,
            labels=config.labels,
            annotations=config.annotations,
            runtime_handler=pod.facts.runtime_handler,
        )
    return pod.listed


def _info(pod: Pod, pods: Pods) -> dict[str, Any]:
    """What crictl inspectp and scripts written for containerd look for, and where the time went."""
    facts = pod.facts
    return {
        "pid": facts.pid,
        "processStatus": "running" if pod.ready else "deleted",
        "netNamespaceClosed": bool(facts.netns_path) and bool(facts.released_at),
        "runtimeHandler": facts.runtime_handler,
        "stateDirectory": str(pods.layout.pod(pod.id)),
        "record": str(pods.records.path(pod.id)),
        "config": json.loads(bytes(pod.config_json)),
        "network": facts.network,
        "stagesMicroseconds": facts.stages,
        "runtimeSpec": {"linux": {"namespaces": _namespaces(pod)}},
    }


def _namespaces(pod: Pod) -> list[dict[str, str]]:
    """Namespaces that the pod has of its own, with the path where one can be entered (``nsenter --net=``), empty where there is none."""
    facts, options = pod.facts, pod.namespace_options
    own = {
        "network": not pod.host_network,
        "ipc": options.ipc != v1.NODE,
        "uts": not pod.host_network,
        "pid": options.pid == v1.POD,
        "user": options.HasField("userns_options") and options.userns_options.mode == v1.POD,
    }
    process = f"/proc/{facts.pid}/ns" if facts.pid else ""
    paths = {kind: f"{process}/{kind}" if process else "" for kind in own} | {"network": facts.netns_path}
    return [{"type": kind, "path": paths[kind]} for kind, has in own.items() if has]
