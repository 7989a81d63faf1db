"""The CRI RuntimeService: one delegating line per RPC, no logic. RPCs that are not built inherit UNIMPLEMENTED."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from cri import node
from cri.containers import attach, create, exec, exec_session, logs, remove, start, stop, update
from cri.containers import list as list_containers
from cri.containers import status as container_status
from cri.containers.model import Containers
from cri.events import Events
from cri.images.store import Images
from cri.network.base import Network
from cri.node import Node
from cri.pods import list as list_pods
from cri.pods import portforward, run
from cri.pods import remove as remove_pod
from cri.pods import status as pod_status
from cri.pods import stop as stop_pod
from cri.pods import update as update_pod
from cri.pods.model import Pods
from cri.stats import containers as container_stats
from cri.stats import metrics
from cri.stats import pods as pod_stats
from cri.stats.meters import Meters
from cri.streaming.server import Server
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """The collaborators of the verbs; each verb is handed those it uses."""

    pods: Pods
    containers: Containers
    supervisor: Supervisor
    images: Images
    network: Network
    node: Node
    events: Events
    meters: Meters
    streaming: Server


class RuntimeService(api_pb2_grpc.RuntimeServiceServicer):
    def __init__(self, parts: Parts) -> None:
        self._p = parts

    async def Version(self, request: v1.VersionRequest, context: Context) -> v1.VersionResponse:
        return node.version()

    async def Status(self, request: v1.StatusRequest, context: Context) -> v1.StatusResponse:
        return await node.status(self._p.node, verbose=request.verbose, supervisor=self._p.supervisor, network=self._p.network)

    async def RuntimeConfig(self, request: v1.RuntimeConfigRequest, context: Context) -> v1.RuntimeConfigResponse:
        return node.runtime_config(self._p.node)

    async def UpdateRuntimeConfig(self, request: v1.UpdateRuntimeConfigRequest, context: Context) -> v1.UpdateRuntimeConfigResponse:
        return node.update_runtime_config(request, network=self._p.network)

    async def RunPodSandbox(self, request: v1.RunPodSandboxRequest, context: Context) -> v1.RunPodSandboxResponse:
        p = self._p
        pod_id = await run.run(
            request, pods=p.pods, supervisor=p.supervisor, network=p.network, node=p.node, timeout=context.time_remaining()
        )
        return v1.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def StopPodSandbox(self, request: v1.StopPodSandboxRequest, context: Context) -> v1.StopPodSandboxResponse:
        p = self._p
        await stop_pod.stop(request.pod_sandbox_id, pods=p.pods, containers=p.containers, supervisor=p.supervisor, network=p.network)
        return v1.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: v1.RemovePodSandboxRequest, context: Context) -> v1.RemovePodSandboxResponse:
        p = self._p
        await remove_pod.remove(
            request.pod_sandbox_id,
            pods=p.pods,
            containers=p.containers,
            supervisor=p.supervisor,
            network=p.network,
            images=p.images,
        )
        return v1.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: v1.PodSandboxStatusRequest, context: Context) -> v1.PodSandboxStatusResponse:
        return pod_status.status(request.pod_sandbox_id, verbose=request.verbose, pods=self._p.pods)

    async def ListPodSandbox(self, request: v1.ListPodSandboxRequest, context: Context) -> v1.ListPodSandboxResponse:
        return list_pods.list_pods(request.filter, pods=self._p.pods)

    async def UpdatePodSandboxResources(
        self, request: v1.UpdatePodSandboxResourcesRequest, context: Context
    ) -> v1.UpdatePodSandboxResourcesResponse:
        update_pod.update(request, pods=self._p.pods)
        return v1.UpdatePodSandboxResourcesResponse()

    async def CreateContainer(self, request: v1.CreateContainerRequest, context: Context) -> v1.CreateContainerResponse:
        p = self._p
        container_id = await create.create(
            request,
            pods=p.pods,
            containers=p.containers,
            supervisor=p.supervisor,
            images=p.images,
            node=p.node,
            timeout=context.time_remaining(),
        )
        return v1.CreateContainerResponse(container_id=container_id)

    async def StartContainer(self, request: v1.StartContainerRequest, context: Context) -> v1.StartContainerResponse:
        await start.start(request.container_id, containers=self._p.containers, supervisor=self._p.supervisor)
        return v1.StartContainerResponse()

    async def StopContainer(self, request: v1.StopContainerRequest, context: Context) -> v1.StopContainerResponse:
        await stop.stop(request.container_id, request.timeout, containers=self._p.containers, supervisor=self._p.supervisor)
        return v1.StopContainerResponse()

    async def RemoveContainer(self, request: v1.RemoveContainerRequest, context: Context) -> v1.RemoveContainerResponse:
        p = self._p
        await remove.remove(request.container_id, containers=p.containers, supervisor=p.supervisor, images=p.images)
        return v1.RemoveContainerResponse()

    async def ListContainers(self, request: v1.ListContainersRequest, context: Context) -> v1.ListContainersResponse:
        return list_containers.list_containers(request.filter, containers=self._p.containers, pods=self._p.pods)

    async def ContainerStatus(self, request: v1.ContainerStatusRequest, context: Context) -> v1.ContainerStatusResponse:
        return container_status.status(request.container_id, verbose=request.verbose, containers=self._p.containers)

    async def UpdateContainerResources(
        self, request: v1.UpdateContainerResourcesRequest, context: Context
    ) -> v1.UpdateContainerResourcesResponse:
        await update.update(request, containers=self._p.containers, supervisor=self._p.supervisor, host=self._p.node.host)
        return v1.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(self, request: v1.ReopenContainerLogRequest, context: Context) -> v1.ReopenContainerLogResponse:
        await logs.reopen(request.container_id, containers=self._p.containers, supervisor=self._p.supervisor)
        return v1.ReopenContainerLogResponse()

    async def ExecSync(self, request: v1.ExecSyncRequest, context: Context) -> v1.ExecSyncResponse:
        return await exec.exec_sync(request, containers=self._p.containers, supervisor=self._p.supervisor)

    async def Exec(self, request: v1.ExecRequest, context: Context) -> v1.ExecResponse:
        p = self._p
        return exec_session.open_exec(request, containers=p.containers, supervisor=p.supervisor, streaming=p.streaming)

    async def Attach(self, request: v1.AttachRequest, context: Context) -> v1.AttachResponse:
        p = self._p
        return attach.open_attach(request, containers=p.containers, supervisor=p.supervisor, streaming=p.streaming)

    async def PortForward(self, request: v1.PortForwardRequest, context: Context) -> v1.PortForwardResponse:
        p = self._p
        return portforward.open_port_forward(request, pods=p.pods, supervisor=p.supervisor, streaming=p.streaming)

    # The verbs of the streaming RPCs are generators: nothing runs until gRPC asks for the first message.

    def StreamPodSandboxes(self, request: v1.StreamPodSandboxesRequest, context: Context) -> AsyncIterator[v1.StreamPodSandboxesResponse]:
        return list_pods.stream_pods(request.filter, pods=self._p.pods)

    def StreamContainers(self, request: v1.StreamContainersRequest, context: Context) -> AsyncIterator[v1.StreamContainersResponse]:
        return list_containers.stream_containers(request.filter, containers=self._p.containers, pods=self._p.pods)

    def GetContainerEvents(self, request: v1.GetEventsRequest, context: Context) -> AsyncIterator[v1.ContainerEventResponse]:
        return self._p.events.stream(partial(context.send_initial_metadata, ()))

    async def ContainerStats(self, request: v1.ContainerStatsRequest, context: Context) -> v1.ContainerStatsResponse:
        return await container_stats.container_stats(request.container_id, containers=self._p.containers, meters=self._p.meters)

    async def ListContainerStats(self, request: v1.ListContainerStatsRequest, context: Context) -> v1.ListContainerStatsResponse:
        p = self._p
        return await container_stats.list_container_stats(request.filter, containers=p.containers, pods=p.pods, meters=p.meters)

    def StreamContainerStats(
        self, request: v1.StreamContainerStatsRequest, context: Context
    ) -> AsyncIterator[v1.StreamContainerStatsResponse]:
        p = self._p
        return container_stats.stream_container_stats(request.filter, containers=p.containers, pods=p.pods, meters=p.meters)

    async def PodSandboxStats(self, request: v1.PodSandboxStatsRequest, context: Context) -> v1.PodSandboxStatsResponse:
        p = self._p
        return await pod_stats.pod_stats(request.pod_sandbox_id, pods=p.pods, meters=p.meters, supervisor=p.supervisor)

    async def ListPodSandboxStats(self, request: v1.ListPodSandboxStatsRequest, context: Context) -> v1.ListPodSandboxStatsResponse:
        p = self._p
        return await pod_stats.list_pod_stats(request.filter, pods=p.pods, meters=p.meters, supervisor=p.supervisor)

    def StreamPodSandboxStats(
        self, request: v1.StreamPodSandboxStatsRequest, context: Context
    ) -> AsyncIterator[v1.StreamPodSandboxStatsResponse]:
        p = self._p
        return pod_stats.stream_pod_stats(request.filter, pods=p.pods, meters=p.meters, supervisor=p.supervisor)

    async def ListMetricDescriptors(self, request: v1.ListMetricDescriptorsRequest, context: Context) -> v1.ListMetricDescriptorsResponse:
        return metrics.list_descriptors()

    async def ListPodSandboxMetrics(self, request: v1.ListPodSandboxMetricsRequest, context: Context) -> v1.ListPodSandboxMetricsResponse:
        return await metrics.list_metrics(pods=self._p.pods, meters=self._p.meters, supervisor=self._p.supervisor)

    def StreamPodSandboxMetrics(
        self, request: v1.StreamPodSandboxMetricsRequest, context: Context
    ) -> AsyncIterator[v1.StreamPodSandboxMetricsResponse]:
        return metrics.stream_metrics(pods=self._p.pods, meters=self._p.meters, supervisor=self._p.supervisor)
