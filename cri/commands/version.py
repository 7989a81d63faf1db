"""``cri-shim version``: ours, and the daemon's if one answers."""

from __future__ import annotations

import platform

from cri.commands import client


def main(socket: str, ours: str) -> int:
    """Always 0: no daemon is an answer too."""
    from protos.runtime.v1 import api_pb2 as v1

    print(f"cri-shim {ours} (Python {platform.python_version()}, Linux {platform.release()})")
    with client.connect(socket) as daemon:
        try:
            answer = daemon.runtime.Version(v1.VersionRequest(), timeout=2)
        except client.RpcError as error:
            print(f"daemon: {client.explain(error, socket)}")
        else:
            print(f"daemon: {answer.runtime_name} {answer.runtime_version}, CRI {answer.runtime_api_version}, at {socket}")
    return 0
