"""No pod network: pods that need one are refused, pods on the host's network run. What a node has until CNI is configured."""

from __future__ import annotations

from collections.abc import Collection

from cri.errors import FailedPrecondition
from cri.network.base import PodNetwork, Result, Status


class AbsentNetwork:
    """``base.Network`` that is never ready, and says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def status(self) -> Status:
        return Status(False, "NetworkPluginNotReady", self._why)

    async def setup(self, pod: PodNetwork) -> Result:
        raise FailedPrecondition(f"no pod network: {self._why}")

    async def teardown(self, pod: PodNetwork) -> None:
        """Nothing was set up."""

    async def recover(self, live: Collection[str]) -> None:
        """Nothing to repair."""

    def update_pod_cidr(self, cidr: str) -> None:
        """Nothing to address."""

    async def close(self) -> None:
        """Nothing is held."""
