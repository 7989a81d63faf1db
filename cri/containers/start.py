"""StartContainer."""

from __future__ import annotations

from cri.containers.model import Container, Containers
from cri.errors import CriError, FailedPrecondition
from cri.pods.model import now
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci.bundle import ExitRecord

# The exit code and reason that containerd and Docker give a container whose program could not be executed.
START_ERROR_CODE = 128
START_ERROR = "StartError"


async def start(container_id: str, *, containers: Containers, supervisor: Supervisor) -> None:
    """Let the process run. A program that cannot be executed ends the container with reason StartError and is the error."""
    container = containers.get(container_id)
    async with container.lock:
        if container.removing:
            raise FailedPrecondition(f"container {container.id} is being removed")
        if container.state != v1.CONTAINER_CREATED:
            raise FailedPrecondition(f"start: container {container.id} is in {v1.ContainerState.Name(container.state)} state")
        container.pod.require_ready()
        try:
            started = await supervisor.start_container(container.id)
        except (Failure, CriError) as error:
            _failed(container, containers, error)
            raise
        facts = container.facts
        facts.pid = started.pid if not facts.finished_at else 0
        facts.started_at = started.started_at
        if facts.finished_at:  # it was so short that its exit came first
            facts.finished_at = max(facts.finished_at, facts.started_at)
        containers.save_soon(container)


def _failed(container: Container, containers: Containers, error: Exception) -> None:
    containers.exited(container, ExitRecord(START_ERROR_CODE, now(), reason=START_ERROR, message=str(error)))
