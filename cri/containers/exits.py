"""What the supervisor reports of its own accord: exits and OOM kills."""

from __future__ import annotations

import asyncio
import logging

from cri.containers import stop
from cri.containers.model import Container, Containers
from cri.supervisor import Supervisor
from shim.oci.bundle import ExitRecord

log = logging.getLogger("cri.containers")


class Exits:
    """Folds exits into the records and lets the runtime core forget what has ended."""

    def __init__(self, containers: Containers, supervisor: Supervisor) -> None:
        self._containers, self._supervisor = containers, supervisor
        self._tasks: set[asyncio.Task[None]] = set()

    def reported(self, container_id: str, record: ExitRecord) -> None:
        """``Supervisor.on_exit``."""
        container = self._containers.exit_reported(container_id, record)
        if container is not None:
            self.release(container)

    def out_of_memory(self, container_id: str) -> None:
        """``Supervisor.on_oom``: a process of the container was killed; not necessarily its first."""
        log.warning("container %s: the kernel killed a process of it, out of memory", container_id)

    def release(self, container: Container) -> None:
        """Give the cgroup back soon; RemoveContainer tries again if this fails."""
        task = asyncio.create_task(self._release(container), name=f"release {container.id[:13]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, container: Container) -> None:
        try:
            await stop.release(container, containers=self._containers, supervisor=self._supervisor)
        except Exception as error:
            log.warning("container %s: not released yet: %s", container.id, error)
