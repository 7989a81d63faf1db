"""CDI devices of a container request."""

from __future__ import annotations

import asyncio

from cri.cdi import registry
from cri.cdi.model import Edits
from cri.errors import FailedPrecondition
from cri.network import devices
from cri.node import Node
from cri.pods.model import Pod
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1


async def edits(config: v1.ContainerConfig, node: Node) -> tuple[Edits, ...]:
    """What the devices of the request's field and annotations mean here. A request without any costs nothing."""
    names = [device.name for device in config.CDI_devices]
    if node.cdi is None:
        if names:
            raise FailedPrecondition("config.CDI_devices: CDI is switched off on this node (runtime.enable_cdi)")
        return ()
    if not names and not any(key.startswith(registry.ANNOTATION) for key in config.annotations):
        return ()
    return await asyncio.to_thread(node.cdi.resolve, registry.requested(names, config.annotations))


async def move_interfaces(wanted: tuple[Edits, ...], pod: Pod, supervisor: Supervisor) -> None:
    """Give the pod the network interfaces that its container's devices name. They stay with the pod."""
    names = [(device.host_interface_name, device.name) for edits in wanted for device in edits.net_devices or ()]
    if not names:
        return
    if not pod.facts.netns_path:
        raise FailedPrecondition(f"CDI netDevices: {names[0][0]!r}: the pod is in the host's network")
    sources, targets = zip(*names, strict=True)
    for kind, each in (("interface", sources), ("name", targets)):
        twice = next((name for name in each if each.count(name) > 1), None)
        if twice is not None:
            raise FailedPrecondition(f"CDI netDevices: two devices want the {kind} {twice!r}")
    netlink = await supervisor.pod_netlink(pod.id)
    await asyncio.to_thread(devices.move, names, netlink, pod.facts.netns_path)
