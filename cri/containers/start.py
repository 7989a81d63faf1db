"""StartContainer."""

from __future__ import annotations

from cri.containers.model import Containers
from cri.errors import FailedPrecondition
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure

# Seconds for the exit record of a program that could not be executed; the error of the start comes first.
_RECORD = 2.0


async def start(container_id: str, *, containers: Containers, supervisor: Supervisor) -> None:
    """Let the process run. A program that cannot be executed ends the container with reason StartError and is the error."""
    container = containers.get(container_id)
    async with container.lock:
        if container.removing:
            raise FailedPrecondition(f"container {container.id} is being removed")
        if container.state != v1.CONTAINER_CREATED:
            raise FailedPrecondition(f"start: container {container.id} is in {v1.ContainerState.Name(container.state)} state")
        container.pod.require_ready()
        facts = container.facts
        container.starting = True
        try:
            started = await supervisor.start_container(container.id)
            facts.pid = started.pid if not facts.finished_at else 0
            facts.started_at = started.started_at
            if facts.finished_at:  # it was so short that its exit came first
                facts.finished_at = max(facts.finished_at, facts.started_at)
            containers.save_soon(container)
            containers.tell(container, v1.CONTAINER_STARTED_EVENT)
        except Failure:
            # Whether this was the end of the container only the core knows: a program that could not be executed is followed by an
            # exit record with reason StartError; a supervisor that was replaced in between says what became of it.
            await container.ended_within(_RECORD)
            raise
        finally:
            container.starting = False
            if facts.finished_at:
                containers.tell(container, v1.CONTAINER_STOPPED_EVENT)
