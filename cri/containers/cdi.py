"""CDI devices of a container request."""

from __future__ import annotations

import asyncio

from cri.cdi import registry
from cri.cdi.model import Edits
from cri.errors import FailedPrecondition
from cri.node import Node
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
