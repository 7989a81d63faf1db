"""UpdateContainerResources: in-place resize."""

from __future__ import annotations

from cri.containers.model import Containers
from cri.errors import FailedPrecondition
from cri.spec import resources
from cri.spec.inputs import HostFacts
from cri.state import records
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1


async def update(request: v1.UpdateContainerResourcesRequest, *, containers: Containers, supervisor: Supervisor, host: HostFacts) -> None:
    """Change limits of a created or running container; fields that are zero or empty stay as they are."""
    container = containers.get(request.container_id)
    async with container.lock:
        if container.removing or container.state not in (v1.CONTAINER_CREATED, v1.CONTAINER_RUNNING):
            raise FailedPrecondition(f"update: container {container.id} is in {v1.ContainerState.Name(container.state)} state")
        merged = resources.merge(container.config.linux.resources, request.linux)
        await supervisor.update_container(container.id, resources.build(merged, host, field="linux"))
        container.config.linux.resources.CopyFrom(merged)
        for key, value in request.annotations.items():
            container.config.annotations[key] = value
        container.config_json = records.config_json(container.config)
        containers.save(container)
