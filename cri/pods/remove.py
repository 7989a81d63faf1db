"""RemovePodSandbox: stopped if it is not, then its containers, its directory and its record."""

from __future__ import annotations

from cri.containers import remove as remove_container
from cri.containers.model import Containers
from cri.images.store import Images
from cri.network.base import Network
from cri.pods import stop
from cri.pods.model import Pods
from cri.pods.run import remove_directory
from cri.state import failpoints
from cri.supervisor import Supervisor


async def remove(pod_id: str, *, pods: Pods, containers: Containers, supervisor: Supervisor, network: Network, images: Images) -> None:
    """Remove the sandbox and all in it, by force where needed; one that is unknown is fine."""
    pod = pods.find(pod_id)
    if pod is None:
        return
    async with pod.lock:
        if pods.find(pod.id) is not pod:
            return  # another call was faster
        await stop.release(pod, pods=pods, containers=containers, supervisor=supervisor, network=network)
        for container in list(pod.containers.values()):
            await remove_container.drop(container, containers=containers, supervisor=supervisor, images=images)
        failpoints.hit("remove sandbox", "state directory")
        remove_directory(pods.layout.pod(pod.id))
        failpoints.hit("remove sandbox", "record")
        pods.forget(pod)
