"""PortForward: connections to ports of a pod, made in its network namespace without running anything in it.

A socket belongs to the namespace in which it was made. The supervisor makes a handful inside the pod's; connecting them is the daemon's
business, and where that goes is the pod's loopback. IPv4 is tried first, then IPv6: some programs listen on one only.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final

from cri.errors import InvalidArgument, Unavailable
from cri.pods.model import Pod, Pods
from cri.streaming.portforward import Forward
from cri.streaming.server import Server
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1

CONNECT_TIMEOUT: Final = 30.0  # s: a listener whose queue is full does not answer
LOOPBACK: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def open_port_forward(
    request: v1.PortForwardRequest, *, pods: Pods, supervisor: Supervisor, streaming: Server
) -> v1.PortForwardResponse:  # fmt: skip
    """A URL where a client can open connections to the pod's ports."""
    pod = pods.get(request.pod_sandbox_id)
    pod.require_ready()
    for port in request.port:
        if not 0 < port < 1 << 16:
            raise InvalidArgument(f"{port} is not a port", field="port")
    return v1.PortForwardResponse(url=streaming.url(Forward(pod.id, tuple(request.port), lambda: Sockets(pod, supervisor))))


class Sockets:
    """Sockets of one session, fetched a few at a time."""

    def __init__(self, pod: Pod, supervisor: Supervisor) -> None:
        self._pod, self._supervisor = pod, supervisor
        self._spare: dict[int, list[socket.socket]] = {}
        self._fetching = asyncio.Lock()

    async def connect(self, port: int) -> socket.socket:
        """Raises Unavailable, which names what was tried."""
        tried = []
        for family, address in LOOPBACK:
            sock = await self._take(family)
            if sock is None:
                continue
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
            except OSError as error:  # TimeoutError is one
                sock.close()
                family_name = "IPv4" if family == socket.AF_INET else "IPv6"
                tried.append(f"{family_name}: {os.strerror(error.errno) if error.errno else 'no answer'}")
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise Unavailable(f"failed to connect to localhost:{port} inside the pod, {', '.join(tried)}")

    async def _take(self, family: socket.AddressFamily) -> socket.socket | None:
        if self._pod.host_network:
            try:
                return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError:  # a kernel without IPv6
                return None
        async with self._fetching:
            if not self._spare.get(family):
                self._pod.require_ready()
                for sock in await self._supervisor.pod_sockets(self._pod.id):
                    self._spare.setdefault(sock.family, []).append(sock)
            spare = self._spare.get(family)
            return spare.pop() if spare else None

    def close(self) -> None:
        """They would keep the namespace."""
        for socks in self._spare.values():
            for sock in socks:
                sock.close()
        self._spare.clear()
