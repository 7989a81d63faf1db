"""RemoveContainer: killed if it runs, then its root, volumes, bundle and record. Each step may be repeated."""

from __future__ import annotations

from cri.containers import stop
from cri.containers.model import Container, Containers
from cri.images.store import Images
from cri.pods.run import remove_directory, remove_tree
from cri.state import failpoints
from cri.supervisor import Supervisor


async def remove(container_id: str, *, containers: Containers, supervisor: Supervisor, images: Images) -> None:
    """Remove the container, by force where needed; one that is unknown is fine. Its log file stays: the kubelet removes it."""
    container = containers.find(container_id)
    if container is not None:
        await drop(container, containers=containers, supervisor=supervisor, images=images)


async def drop(container: Container, *, containers: Containers, supervisor: Supervisor, images: Images) -> None:
    """Remove a container that was found."""
    container.removing = True
    await stop.end(container, containers=containers, supervisor=supervisor)
    async with container.lock:
        if containers.find(container.id) is not container:
            return  # another call was faster
        failpoints.hit("remove container", "snapshot")
        await images.release(container.id)
        failpoints.hit("remove container", "volumes")
        await remove_tree(containers.layout.container_volumes(container.id))
        failpoints.hit("remove container", "bundle")
        remove_directory(containers.layout.bundle(container.id))
        failpoints.hit("remove container", "record")
        containers.forget(container)
